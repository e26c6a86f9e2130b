"""Waits for a state instead of sleeping: predicates are checked after every change.

Invariant: `changed` costs one comparison while nothing waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Watch:
    """Wakes the waiters whose predicate has become true."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []

    def changed(self) -> None:
        """Check the predicates: something may have changed."""
        if not self._waiting:
            return
        still = []
        for predicate, future in self._waiting:
            if future.done():
                continue
            try:
                true = predicate()
            except Exception as error:
                future.set_exception(error)
                continue
            if true:
                future.set_result(None)
            else:
                still.append((predicate, future))
        self._waiting = still

    async def wait_for(self, predicate: Callable[[], bool], timeout: float = 30.0) -> None:
        """Return once `predicate()` is true; raises TimeoutError after `timeout` seconds."""
        if predicate():
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((predicate, future))
        async with asyncio.timeout(timeout):
            await future
