"""When a backend that is alive is no good: pure rules over standings, with the time passed in.

The knobs are Envoy's outlier detection, with a third cause, slowness. A backend is ejected for

- `consecutive`: so many failures in a row;
- `success_rate`: too small a share of good legs in the window, *relative to the rest of its pool*: where all fail
  alike (a broken link between the pools, a model that cannot answer) the fault is not its own;
- `slow`: its legs take `slow_ratio` times as long as the median of its pool.

Slowness is a ratio to the pool's median, of running means of logarithms. The median moves little when one of three is
slow, where a mean would follow it; a ratio, because the usual other choice, the deviation from the median in units of
the pool's own spread, is meaningless among three backends that are nearly equal (the spread is then next to nothing,
and everybody an outlier). Prefill legs of all lengths are made comparable by what the whole pool takes for prompts of
that size. It takes three backends to say who is the odd one: in a pool of two nobody is ejected for slowness, since
with half of the capacity at stake "the other one is faster" is too little to go by. (Least-loaded placement gives a
slow backend less all the same: what it has stays in flight for longer.)

Invariants: never more than `max_ejected` of those that are up, and never the last of them. What has said itself that it
is stopping or paused (`leaving`) is ejected without such a bound, but left with nobody else it is asked all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from statistics import median
from typing import Literal

from pd_proxy.fleet.outlier.statistics import LegName, OutlierStats, log_seconds
from pd_proxy.settings.bounds import BreakerSettings

Reason = Literal["consecutive", "success_rate", "slow", "leaving"]

FEWEST = 3  # backends that must have been timed before one of them can be the odd one
_STALE = 120.0  # seconds after which a time says nothing of how a backend is now
_FEWEST_TOKENS = 5  # a shorter stream's pace is chance
_USUAL_WEIGHT = 1 / 64  # of one leg in what its pool usually takes: slow, so that all are measured with one rod
# Seconds (decode: a token) by which a slow backend is slower, at least: nobody notices less, and on fast engines a
# ratio alone would be noise.
_NOTICEABLE: dict[LegName, float] = {"prefill": 0.1, "decode": 0.005, "encode": 0.1}
_LEAST_FACTOR = 0.1  # of a backend's load when its slow start begins


class Breaker:
    """Judges standings."""

    def __init__(self, settings: BreakerSettings) -> None:
        self._settings = settings
        self._log_ratio = log(settings.slow_ratio) if settings.slow_ratio else float("inf")
        self._usual: dict[tuple[str, LegName, int], float] = {}

    def timed(self, pool: str, leg: LegName, stats: OutlierStats, seconds: float, tokens: int, now: float) -> bool:
        """Note how long a leg took.

        Arguments:
            seconds: prefill: of the leg; decode: the mean for each token.
            tokens: prefill: those computed; decode: those given.
        Returns: whether it looks slow, so that a `verdict` is worth its price.
        """
        if leg == "decode" and tokens < _FEWEST_TOKENS:
            return False
        key = (pool, leg, tokens.bit_length() if leg == "prefill" else 0)
        taken = log_seconds(seconds)
        usual = self._usual.get(key, taken)
        stats.note_time(taken, usual, now)
        self._usual[key] = usual + _USUAL_WEIGHT * (taken - usual)
        # What is usual is a mean over the pool, the slow one included: an outlier stands out less from it than from the
        # median, but by a quarter even where three quarters of the legs are its own. A leg that nobody notices changes
        # no verdict; the next one that is noticed asks for it.
        return (
            stats.excess > self._log_ratio / 4
            and seconds > _NOTICEABLE[leg]
            and stats.samples >= self._settings.minimum_volume
        )

    def verdict(self, leg: LegName, stats: OutlierStats, others: Sequence[OutlierStats], now: float) -> Reason | None:
        """Why a backend should be ejected, if it should.

        Arguments:
            others: the standings of the rest of its pool that is up, ejected or not.
        """
        if stats.consecutive >= self._settings.consecutive_failures:
            return "consecutive"
        if self._fails_often(stats, others, now):
            return "success_rate"
        if self._is_slow(leg, stats, others, now):
            return "slow"
        return None

    def _fails_often(self, stats: OutlierStats, others: Sequence[OutlierStats], now: float) -> bool:
        for each in (stats, *others):
            each.window.roll(now)
        own = stats.window
        if own.good + own.bad < self._settings.minimum_volume:
            return False
        good = sum(other.window.good for other in others)
        all_ = good + sum(other.window.bad for other in others)
        pools = good / all_ if all_ >= self._settings.minimum_volume else 1.0
        return own.good / (own.good + own.bad) < self._settings.success_rate * pools

    def _is_slow(self, leg: LegName, stats: OutlierStats, others: Sequence[OutlierStats], now: float) -> bool:
        if stats.samples < self._settings.minimum_volume:
            return False
        known = [
            other.excess
            for other in others
            if other.samples >= self._settings.minimum_volume and now - other.timed_at <= _STALE
        ]
        if len(known) + 1 < FEWEST:
            return False
        middle = median([stats.excess, *known])
        return stats.excess - middle >= self._log_ratio and stats.seconds_above(middle) >= _NOTICEABLE[leg]

    def may_eject(self, others: Sequence[OutlierStats], now: float) -> bool:
        """Whether one more of a pool may be ejected.

        Arguments:
            others: as for `verdict`.
        """
        up = len(others) + 1
        ejected = sum(other.ejected(now) for other in others) + 1
        return ejected < up and ejected <= self._settings.max_ejected * up

    def eject(self, stats: OutlierStats, reason: Reason, now: float) -> float:
        """Eject; returns for how many seconds. Each time lasts twice as long as the one before, and every `window` of
        seconds in the rotation takes one doubling back."""
        settings = self._settings
        good_time = max(0.0, now - stats.ejected_until)
        level = max(0, stats.level - int(good_time / settings.window)) if stats.level else 0
        seconds = settings.ejection * 2.0**level
        if seconds < settings.longest_ejection:  # else a level more would only take longer to be taken back
            level += 1
        seconds = min(seconds, settings.longest_ejection)
        stats.begin_anew()
        stats.level = level
        stats.eject(now + seconds, reason)
        return seconds

    def factor(self, since: float, now: float) -> float:
        """The share of its usual load that a backend may be given, from 0.1 to 1, so long after its return."""
        duration = self._settings.slow_start
        passed = now - since
        return 1.0 if passed >= duration else max(_LEAST_FACTOR, passed / duration)

    def panics(self, fit: int, members: int) -> bool:
        """Whether so few of a pool are left that its ejections must be ignored.

        Arguments:
            fit: backends that are up and not ejected.
            members: all of the pool that are to take requests, up or not.
        """
        return fit == 0 or fit < self._settings.panic_threshold * members
