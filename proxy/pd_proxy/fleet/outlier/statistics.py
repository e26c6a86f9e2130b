"""How one backend does at one kind of leg: what the breaker judges by, and what it has decided.

Plain values; the time is passed in. Only the last seconds are remembered, so nothing has to be forgiven: what was bad
long ago has left the window.
"""

from __future__ import annotations

from math import exp, log
from typing import Literal

from pd_proxy.fleet.state import FITNESS, Event, Fitness
from pd_proxy.transitions import after

LegName = Literal["prefill", "decode", "encode"]

LEAVING = "leaving"
"""The `reason` of an ejection by the engine's own word."""
_SLICES = 10  # of a window: what is old goes in steps of a tenth of it
_WEIGHT = 0.2  # of a new time in a running mean: about the last ten count
_FULL_MEMORY = 5  # until there are so many, the mean is a plain one
_LEAST_SECONDS = 1e-6  # a clock's grain; zero has no logarithm


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
        self._current = self._slices[0]  # that of now, up to `_until`
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
        """Forget what is too old."""
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
    """How one backend does at one kind of leg.

    Arguments:
        window: seconds for which a leg's outcome counts.
    Attributes:
        consecutive: failures since the last good leg.
        window: good and bad legs of late.
        samples: times noted since it last began anew.
        excess: running mean of log(seconds / what its pool usually takes for such a leg).
        timed_at: when the last time was noted.
        level: how often it was ejected, less what good time took back; the time out doubles with it.
        ejected_until: the end of the last ejection; 0 when there was none.
        fitness: `EJECTED` until the end of the ejection has been noticed (`OutlierDetector.refresh`).
        reason: of that ejection; empty while it is fit.
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
        """Forget how it did; how often it was ejected is kept."""
        self.window.clear()
        self.consecutive = 0
        self.samples = 0
        self.excess = 0.0
        self.timed_at = 0.0
        self._log_seconds = 0.0

    def note(self, good: bool, now: float) -> None:
        """A leg went well, or failed."""
        self.consecutive = 0 if good else self.consecutive + 1
        self.window.note(good, now)

    def note_time(self, taken: float, usual: float, now: float) -> None:
        """A leg took so long (decode: for each token).

        Arguments:
            taken, usual: logarithms of its seconds, and of what its pool usually takes.
        """
        self.samples = samples = self.samples + 1
        weight = _WEIGHT if samples > _FULL_MEMORY else 1 / samples
        self._log_seconds += weight * (taken - self._log_seconds)
        self.excess += weight * (taken - usual - self.excess)
        self.timed_at = now

    def seconds_above(self, excess: float) -> float:
        """How much longer its legs take than those of a backend with another `excess`."""
        return exp(self._log_seconds) * (1 - exp(excess - self.excess))

    def lift(self, now: float) -> None:
        """End an ejection, since the engine that comes up now is not the one that failed."""
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
        """The time of an ejection is over."""
        self.fitness = after(FITNESS, self.fitness, Event.RETURN)
        self.reason = ""

    def ejected(self, now: float) -> bool:
        """Whether it is ejected now."""
        return now < self.ejected_until

    def leaving(self, now: float) -> bool:
        """Whether it is out because its engine has shown that it is stopping or paused."""
        return self.reason == LEAVING and now < self.ejected_until


def log_seconds(seconds: float) -> float:
    """The natural logarithm of a time; times differ by factors, and one freak must not outweigh ten others."""
    return log(seconds if seconds > _LEAST_SECONDS else _LEAST_SECONDS)
