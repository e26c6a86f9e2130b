"""How fast the queue empties, and what follows for those who wait.

The rate is measured, not derived from the bounds: requests let in from the queue, divided by the time in which somebody
waited. Time without a queue says nothing about what the engines could do, so it does not count. A queue that stands
still makes the rate fall, until so little is remembered that there is none.
"""

from __future__ import annotations

from math import ceil

from proxy.admission.clients import LATEST, SOONEST

# What is remembered: at least the last 32 requests and the last 10 s of waiting, as long as that is not above 30 s; at
# most twice that. Fewer requests would make the rate jump with each batch that an engine ends at once; more time would
# make it miss that a pool shrank, or is back.
_REQUESTS = 32
_SECONDS = 10.0
_MOST_SECONDS = 30.0
_ENOUGH = 5
"""Requests without which there is no rate: a queue that has just begun refuses nobody on a guess."""


class Pace:
    """The rate at which a queue empties. Times are seconds of any clock that does not go back."""

    __slots__ = ("_requests", "_seconds", "_since")

    def __init__(self) -> None:
        self._requests = 0.0
        self._seconds = 0.0
        self._since: float | None = None

    def waiting(self, somebody: bool, now: float) -> None:
        """Note whether there is a queue from now on."""
        self._fold(now)
        self._since = now if somebody else None

    def let_in(self, now: float) -> None:
        """One of those who waited was let in."""
        self._fold(now)
        self._requests += 1

    def seconds(self, requests: float, now: float) -> float | None:
        """In how many seconds `requests` of those who wait are let in; None while there is nothing to go by."""
        self._fold(now)
        if self._requests < _ENOUGH:
            return None
        return requests * self._seconds / self._requests

    def retry_after(self, waiting: int, now: float) -> int:
        """Whole seconds in which all who wait now will have been let in, within sane bounds."""
        seconds = self.seconds(waiting, now)
        return SOONEST if seconds is None else max(SOONEST, min(LATEST, ceil(seconds)))

    def _fold(self, now: float) -> None:
        if self._since is not None:
            self._seconds += now - self._since
            self._since = now
            while self._seconds > 2 * _MOST_SECONDS or (
                self._requests > 2 * _REQUESTS and self._seconds > 2 * _SECONDS
            ):
                self._requests /= 2
                self._seconds /= 2
