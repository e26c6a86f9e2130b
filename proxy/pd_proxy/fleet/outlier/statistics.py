"""Outlier statistics: how well one backend does one kind of leg, and whether it is ejected for it.

These are plain values; the time is passed in. Only the last seconds count: old failures have left the window.
"""

from __future__ import annotations

from math import exp, log
from typing import Literal

from pd_proxy.fleet.state import FITNESS, Event, Fitness
from pd_proxy.transitions import after

LegName = Literal["prefill", "decode", "encode"]

LEAVING = "leaving"
"""The `reason` of an ejection because the engine is stopping or paused."""
_SLICES = 10  # of a window: old legs leave it in steps of a tenth
_WEIGHT = 0.2  # of a new time in a running mean: about the last ten times count
_FULL_MEMORY = 5  # with fewer times, the running mean is the arithmetic mean
_LEAST_SECONDS = 1e-6  # the resolution of a clock; zero has no logarithm


class Window:
    """Counts of good and bad legs over the last seconds.

    Arguments:
        seconds: how long a leg counts.
    """

    __slots__ = ("_current", "_scale", "_slices", "_slot", "_until", "bad", "good")

    def __init__(self, seconds: float) -> None:
        self._scale = _SLICES / seconds
        self._slices = [[0, 0] for _ in range(_SLICES)]
        self._slot = 0
        self._current = self._slices[0]  # the slice of now, until `_until`
        self._until = 1 / self._scale
        self.good = 0
        self.bad = 0

    def note(self, good: bool, now: float) -> None:
        """Count one leg."""
        if now >= self._until:
            self.roll(now)
        if good:
            self._current[0] += 1
            self.good += 1
        else:
            self._current[1] += 1
            self.bad += 1

    def roll(self, now: float) -> None:
        """Forget the legs that are too old."""
        slot = int(now * self._scale)
        if slot <= self._slot:
            return
        if slot - self._slot >= _SLICES:
            self.clear()
        else:
            for passed in range(self._slot + 1, slot + 1):
                old = self._slices[passed % _SLICES]
                self.good -= old[0]
                self.bad -= old[1]
                old[0] = old[1] = 0
        self._slot = slot
        self._current = self._slices[slot % _SLICES]
        self._until = (slot + 1) / self._scale

    def clear(self) -> None:
        """Forget everything."""
        for old in self._slices:
            old[0] = old[1] = 0
        self.good = self.bad = 0


class OutlierStats:
    """How well one backend does one kind of leg.

    Arguments:
        window: seconds for which a leg's outcome counts.
    Attributes:
        consecutive: the number of failures since the last good leg.
        window: the good and bad legs of the last seconds.
        samples: the number of times that were noted since the statistics began anew.
        excess: running mean of log(seconds / usual seconds of its pool for such a leg).
        timed_at: when the last time was noted.
        level: the number of ejections, less those that time in the rotation has taken back; the length of an ejection
            doubles with it.
        ejected_until: the end of the last ejection; 0 if there was none.
        fitness: `EJECTED` until the end of the ejection has been noticed (`OutlierDetector.refresh`).
        reason: of the ejection; empty while the backend is fit.
    """

    __slots__ = (
        "_log_seconds",
        "consecutive",
        "ejected_until",
        "excess",
        "fitness",
        "level",
        "reason",
        "samples",
        "timed_at",
        "window",
    )

    def __init__(self, window: float) -> None:
        self.window = Window(window)
        self.level = 0
        self.fitness = Fitness.FIT
        self.ejected_until = 0.0
        self.reason = ""
        self.begin_anew()

    def begin_anew(self) -> None:
        """Forget the outcomes and times of legs; the level of ejections is kept."""
        self.window.clear()
        self.consecutive = 0
        self.samples = 0
        self.excess = 0.0
        self.timed_at = 0.0
        self._log_seconds = 0.0

    def note(self, good: bool, now: float) -> None:
        """Note that a leg succeeded or failed."""
        self.consecutive = 0 if good else self.consecutive + 1
        self.window.note(good, now)

    def note_time(self, taken: float, usual: float, now: float) -> None:
        """Note how long a leg took (decode: for each token).

        Arguments:
            taken: the logarithm of its seconds.
            usual: the logarithm of the seconds that its pool usually takes.
        """
        self.samples = samples = self.samples + 1
        weight = _WEIGHT if samples > _FULL_MEMORY else 1 / samples
        self._log_seconds += weight * (taken - self._log_seconds)
        self.excess += weight * (taken - usual - self.excess)
        self.timed_at = now

    def seconds_above(self, excess: float) -> float:
        """By how many seconds its legs take longer than those of a backend with another `excess`."""
        return exp(self._log_seconds) * (1 - exp(excess - self.excess))

    def lift(self, now: float) -> None:
        """End an ejection because the backend has come up again: its engine is not the process that failed."""
        self.fitness = after(FITNESS, self.fitness, Event.RESTART)
        self.ejected_until = min(self.ejected_until, now)
        self.reason = ""
        self.begin_anew()

    def eject(self, until: float, reason: str) -> None:
        """Begin an ejection."""
        self.fitness = after(FITNESS, self.fitness, Event.EJECT)
        self.ejected_until = until
        self.reason = reason

    def end_ejection(self) -> None:
        """End an ejection whose time is over."""
        self.fitness = after(FITNESS, self.fitness, Event.RETURN)
        self.reason = ""

    def ejected(self, now: float) -> bool:
        """Whether the backend is ejected now."""
        return now < self.ejected_until

    def leaving(self, now: float) -> bool:
        """Whether the backend is ejected because its engine has shown that it is stopping or paused."""
        return self.reason == LEAVING and now < self.ejected_until


def log_seconds(seconds: float) -> float:
    """The natural logarithm of a time: times differ by factors, and one extreme time must not outweigh ten others."""
    return log(seconds if seconds > _LEAST_SECONDS else _LEAST_SECONDS)
