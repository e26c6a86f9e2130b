"""The rate at which the queue empties, and the expected wait of a request.

The rate is measured, not derived from the bounds: the number of requests admitted from the queue, divided by the time
in which the queue was not empty. Time with an empty queue does not count, since it does not show how fast the engines
could be. The rate falls while no request leaves the queue.
"""

from __future__ import annotations

from math import ceil

from pd_proxy.admission.clients import LATEST, SOONEST

# A period ends after 32 requests and 10 s with a queue, or after 30 s with a queue. The rate is that of the present
# period and the one before. With fewer requests it would jump with each batch that an engine ends at once. Over a
# longer
# time it would follow too late when backends leave or come back.
_REQUESTS = 32
_SECONDS = 10.0
_MAX_SECONDS = 30.0
_ENOUGH = 5
"""The fewest requests from which a rate is taken before the first period has ended. A queue that has just begun has no
rate yet, and refuses no request because of its deadline."""


class Pace:
    """Measures the rate at which a queue empties. All times are in seconds of a monotonic clock."""

    __slots__ = ("_before", "_requests", "_seconds", "_since")

    def __init__(self) -> None:
        self._requests = 0
        self._seconds = 0.0
        self._before = (0, 0.0)  # requests and seconds of the period before
        self._since: float | None = None

    def note_waiting(self, waiting: bool, now: float) -> None:
        """Note whether any request waits from now on."""
        self._note(now)
        self._since = now if waiting else None

    def note_admitted(self, now: float) -> None:
        """Note that a request from the queue was admitted."""
        self._note(now, 1)

    def seconds(self, requests: int, now: float) -> float | None:
        """The seconds in which as many requests should be admitted from the queue; None while there is no rate yet."""
        self._note(now)
        seen, seconds = self._requests + self._before[0], self._seconds + self._before[1]
        if seen < _ENOUGH and seconds < _MAX_SECONDS:
            return None
        return requests * seconds / max(1, seen)

    def retry_after(self, waiting: int, now: float) -> int:
        """Whole seconds until all requests that wait now should have been admitted, between `SOONEST` and `LATEST`."""
        seconds = self.seconds(waiting, now)
        return SOONEST if seconds is None else max(SOONEST, min(LATEST, ceil(seconds)))

    def _note(self, now: float, admitted: int = 0) -> None:
        self._requests += admitted
        if self._since is None:
            return
        self._seconds += now - self._since
        self._since = now
        if self._seconds >= _MAX_SECONDS or (self._requests >= _REQUESTS and self._seconds >= _SECONDS):
            self._before = (self._requests, self._seconds)
            self._requests, self._seconds = 0, 0.0
