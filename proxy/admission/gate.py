"""The gate every request passes: it counts those inside, and closes when the gateway drains."""

from __future__ import annotations

import asyncio
from types import TracebackType

from proxy.errors import Draining


class Gate:
    """A context manager around each request's life.

    Attributes:
        inside: requests that have begun and not ended.
        draining: the gateway is about to leave; /ready says so.
        closed: no new request may start.
    """

    def __init__(self) -> None:
        self.inside = 0
        self.draining = False
        self.closed = False
        self._tasks: set[asyncio.Task[object]] = set()
        self._empty = asyncio.Event()
        self._empty.set()

    def __enter__(self) -> Gate:
        if self.closed:
            raise Draining("this gateway is shutting down; try again elsewhere", retry_after=1)
        self.inside += 1
        self._empty.clear()
        if task := asyncio.current_task():
            self._tasks.add(task)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.inside -= 1
        if task := asyncio.current_task():
            self._tasks.discard(task)
        if not self.inside:
            self._empty.set()

    async def empty(self, seconds: float) -> bool:
        """Wait until nobody is inside; whether that came true in time."""
        try:
            async with asyncio.timeout(seconds):
                await self._empty.wait()
        except TimeoutError:
            return False
        return True

    def evict(self) -> None:
        """Cancel every request inside. Each answers its client as well as it can."""
        for task in tuple(self._tasks):
            task.cancel()
