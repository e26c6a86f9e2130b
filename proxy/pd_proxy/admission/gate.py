"""The gate: counts the requests that are in the gateway, and refuses new ones once the gateway shuts down."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from pd_proxy.errors import Draining


class Gate:
    """The set of tasks that serve requests. Every request enters the gate when it begins, and leaves it when it ends.

    Attributes:
        draining: the gateway is about to shut down, and /ready answers 503.
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
        """Whether new requests are refused."""
        return self._closed

    @closed.setter
    def closed(self, closed: bool) -> None:
        self._closed = closed
        if closed and self.on_close is not None:
            self.on_close()

    @property
    def inside(self) -> int:
        """The number of requests that have begun and not ended."""
        return len(self._tasks)

    def enter(self, task: asyncio.Task[Any]) -> None:
        """Note that a request has begun.

        Arguments:
            task: the task that serves it.
        Raises:
            Draining: the gate is closed.
        """
        if self._closed:
            raise Draining("this gateway is shutting down; try again elsewhere", retry_after=1)
        self._tasks.add(task)
        self._empty.clear()

    def leave(self, task: asyncio.Task[Any]) -> None:
        """Note that a request has ended. Does nothing where it was refused."""
        self._tasks.discard(task)
        if not self._tasks:
            self._empty.set()

    async def wait_empty(self, seconds: float) -> bool:
        """Wait until no request is left, at most `seconds`. Returns whether none is."""
        try:
            async with asyncio.timeout(seconds):
                await self._empty.wait()
        except TimeoutError:
            return False
        return True

    def evict(self) -> None:
        """Cancel all requests. Each ends with an error, or with an error event where its answer has begun."""
        for task in tuple(self._tasks):
            task.cancel()
