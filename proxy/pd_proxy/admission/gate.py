"""The gate every request passes: it counts those inside, and closes when the gateway drains."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from pd_proxy.errors import Draining


class Gate:
    """Every request enters it as a task and leaves it again.

    Attributes:
        draining: the gateway is about to leave; /ready says so.
        on_close: called when the gate closes.
    """

    def __init__(self) -> None:
        self.draining = False
        self.on_close: Callable[[], object] | None = None
        self._closed = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def closed(self) -> bool:
        """No new request may start."""
        return self._closed

    @closed.setter
    def closed(self, closed: bool) -> None:
        self._closed = closed
        if closed and self.on_close is not None:
            self.on_close()

    @property
    def inside(self) -> int:
        """Requests that have begun and not ended."""
        return len(self._tasks)

    def enter(self, task: asyncio.Task[Any]) -> None:
        """Let a request in.

        Raises:
            Draining: the gate is closed.
        """
        if self._closed:
            raise Draining("this gateway is shutting down; try again elsewhere", retry_after=1)
        self._tasks.add(task)
        self._empty.clear()

    def leave(self, task: asyncio.Task[Any]) -> None:
        """A request has ended, or was never let in."""
        self._tasks.discard(task)
        if not self._tasks:
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
