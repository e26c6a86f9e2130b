"""How fast the queue empties, and how long a request will wait.

The rate is measured, not derived from the bounds: requests let in from the queue, divided by the time in which one
waited. Time without a queue says nothing about what the engines could do, so it does not count. A queue that stands
still makes the rate fall.
"""

from __future__ import annotations

from math import ceil

from pd_proxy.admission.clients import LATEST, SOONEST

# A period ends after 32 requests and 10 s of waiting, or after 30 s; this one and the one before it are remembered.
# Fewer requests would make the rate jump with each batch that an engine ends at once; more time would make it miss that
# a pool shrank, or is back.
_REQUESTS = 32
_SECONDS = 10.0
_MOST_SECONDS = 30.0
_ENOUGH = 5
"""Requests that make a rate before a whole period does: a queue that has just begun refuses nobody on a guess."""


class Pace:
    """The rate at which a queue empties. Times are seconds of any clock that does not go back."""

    __slots__ = ("_before", "_requests", "_seconds", "_since")

    def __init__(self) -> None:
        self._requests = 0
        self._seconds = 0.0
        self._before = (0, 0.0)  # the same of the last period
        self._since: float | None = None

    def waiting(self, somebody: bool, now: float) -> None:
        """Note whether there is a queue from now on."""
        self._note(now)
        self._since = now if somebody else None

    def let_in(self, now: float) -> None:
        """One of those who waited was let in."""
        self._note(now, 1)

    def seconds(self, requests: int, now: float) -> float | None:
        """In how many seconds `requests` of those who wait are let in; None while there is nothing to go by."""
        self._note(now)
        seen, seconds = self._requests + self._before[0], self._seconds + self._before[1]
        if seen < _ENOUGH and seconds < _MOST_SECONDS:
            return None
        return requests * seconds / max(1, seen)

    def retry_after(self, waiting: int, now: float) -> int:
        """Whole seconds in which all who wait now will have been let in, within sane bounds."""
        seconds = self.seconds(waiting, now)
        return SOONEST if seconds is None else max(SOONEST, min(LATEST, ceil(seconds)))

    def _note(self, now: float, let_in: int = 0) -> None:
        self._requests += let_in
        if self._since is None:
            return
        self._seconds += now - self._since
        self._since = now
        if self._seconds >= _MOST_SECONDS or (self._requests >= _REQUESTS and self._seconds >= _SECONDS):
            self._before = (self._requests, self._seconds)
            self._requests, self._seconds = 0, 0.0
