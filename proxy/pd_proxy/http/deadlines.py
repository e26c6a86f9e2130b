"""Time limits of one length, for any number of waits at once.

Nearly every wait ends long before its limit, so what counts is the price of setting one and taking it back: here a
dictionary's insertion and removal. One timer of the event loop runs for all of them. Limits of one length end in the
order in which they began, and dictionaries keep that order.
"""

from __future__ import annotations

import asyncio
import logging
from time import monotonic
from typing import Protocol

log = logging.getLogger("pd_proxy.relay")


class Waiting(Protocol):
    """What has a time limit. Told once, unless it was forgotten before."""

    def overdue(self, seconds: float) -> None:
        """The limit, of so many seconds, has passed."""


class Deadlines:
    """The limits of one length.

    Arguments:
        seconds: from `watch` to the limit; None: there is none.
    """

    __slots__ = ("_loop", "_open", "_timer", "seconds")

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self._open: dict[Waiting, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def watch(self, waiting: Waiting, loop: asyncio.AbstractEventLoop) -> None:
        """The time of `waiting` begins. It must not be watched already."""
        if self.seconds is None:
            return
        self._open[waiting] = monotonic() + self.seconds
        if self._timer is None or loop is not self._loop:
            self._loop = loop
            self._timer = loop.call_later(self.seconds, self._look)

    def forget(self, waiting: Waiting) -> None:
        """It has ended; or it was never watched."""
        self._open.pop(waiting, None)

    def oldest(self, seconds: float) -> Waiting | None:
        """What has waited longest, if that is for so many seconds."""
        for waiting, deadline in self._open.items():
            assert self.seconds is not None
            return waiting if monotonic() - (deadline - self.seconds) >= seconds else None
        return None

    def _look(self) -> None:
        self._timer = None
        assert self.seconds is not None and self._loop is not None
        while self._open:
            waiting, deadline = next(iter(self._open.items()))
            left = deadline - monotonic()
            if left > 0:
                self._timer = self._loop.call_later(left, self._look)
                return
            del self._open[waiting]
            try:
                waiting.overdue(self.seconds)
            except Exception:  # of one of them; the others' limits hold
                log.exception("a time limit of %g s could not be enforced", self.seconds)
