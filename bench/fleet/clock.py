"""Virtual time: a heap of events, without any real waiting."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any


class Clock:
    """The time of a simulated run.

    Attributes:
        now: seconds since the run's start.
        events: how many events have been handled.
    """

    __slots__ = ("_heap", "_number", "events", "now")

    def __init__(self) -> None:
        self.now = 0.0
        self.events = 0
        self._heap: list[tuple[float, int, Callable[[Any], object], Any]] = []
        self._number = 0

    def at(self, time: float, what: Callable[[Any], object], about: Any = None) -> None:
        """Call `what(about)` at `time`. Events of the same time are handled in the order in which they were added."""
        self._number += 1
        heappush(self._heap, (time, self._number, what, about))

    def run(self, until: float = float("inf")) -> None:
        """Handle all events up to and including `until`."""
        heap = self._heap
        while heap and heap[0][0] <= until:
            time, _, what, about = heappop(heap)
            self.now = time
            self.events += 1
            what(about)
