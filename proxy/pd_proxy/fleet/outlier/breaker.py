"""The rules of outlier detection: when a backend that is alive is ejected, and for how long.

The rules are functions of the outlier statistics; the time is passed in. The settings are those of Envoy's outlier
detection, and slowness is a third cause. A backend is ejected for

- `consecutive`: a number of failures in a row;
- `success_rate`: too small a share of good legs in the window, *relative to the rest of its pool*. If all backends fail
  alike (the link between the pools is broken, the model cannot answer), the cause is not the backend;
- `slow`: its legs take `slow_ratio` times as long as the median of its pool.

Slowness is the ratio of a backend's time to the pool's median, both as running means of logarithms. It is the median,
since a mean of three backends would follow the slow one. It is a ratio, since the usual alternative, the deviation in
units of the pool's own spread, is meaningless among three backends that are nearly equal: the spread is then nearly
zero, and each of them is an outlier. Prefill legs of different lengths are made comparable by the time that the whole
pool takes for prompts of that size. At least three backends are needed to call one of them slow. In a pool of two none
is ejected for slowness, since that would take half of the capacity only because the other backend is faster.
(Least-loaded placement sends a slow backend fewer requests anyway, since its requests are in flight for longer.)

Invariants: at most the share `max_ejected` of the backends that are up is ejected, and never the last one. A backend
whose engine says that it is stopping or paused (`leaving`) is ejected without that bound. If no other backend is left,
it gets requests all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from statistics import median
from typing import Literal

from pd_proxy.fleet.outlier.statistics import LegName, OutlierStats, log_seconds
from pd_proxy.settings.bounds import BreakerSettings

Reason = Literal["consecutive", "success_rate", "slow", "leaving"]

FEWEST = 3  # backends that must have been timed before one of them can be called slow
_STALE = 120.0  # seconds after which a time says nothing about a backend any more
_FEWEST_TOKENS = 5  # the pace of a shorter stream is random
_USUAL_WEIGHT = 1 / 64  # of one leg in its pool's usual time: small, so that all backends are compared with one value
# The least number of seconds (decode: for each token) by which a slow backend is slower. Clients do not notice less,
# and on fast engines a ratio alone would be noise.
_NOTICEABLE: dict[LegName, float] = {"prefill": 0.1, "decode": 0.005, "encode": 0.1}
_LEAST_FACTOR = 0.1  # the share of its usual load that a backend gets when its slow start begins


class Breaker:
    """The rules, with their settings."""

    def __init__(self, settings: BreakerSettings) -> None:
        self._settings = settings
        self._log_ratio = log(settings.slow_ratio) if settings.slow_ratio else float("inf")
        self._usual: dict[tuple[str, LegName, int], float] = {}

    def timed(self, pool: str, leg: LegName, stats: OutlierStats, seconds: float, tokens: int, now: float) -> bool:
        """Note how long a leg took.

        Arguments:
            seconds: prefill: of the leg; decode: the mean for each token.
            tokens: prefill: those that were computed; decode: those that were generated.
        Returns: whether the backend may be slow, so that the cost of a `verdict` is justified.
        """
        if leg == "decode" and tokens < _FEWEST_TOKENS:
            return False
        key = (pool, leg, tokens.bit_length() if leg == "prefill" else 0)
        taken = log_seconds(seconds)
        usual = self._usual.get(key, taken)
        stats.note_time(taken, usual, now)
        self._usual[key] = usual + _USUAL_WEIGHT * (taken - usual)
        # The usual time is a mean over the pool, which includes the slow backend. An outlier differs less from it than
        # from the median, but by a quarter even if three quarters of the legs are its own. A leg that is not noticeably
        # slow needs no verdict; the next one that is asks for it.
        return (
            stats.excess > self._log_ratio / 4
            and seconds > _NOTICEABLE[leg]
            and stats.samples >= self._settings.minimum_volume
        )

    def verdict(self, leg: LegName, stats: OutlierStats, others: Sequence[OutlierStats], now: float) -> Reason | None:
        """Why a backend should be ejected; None if it should not.

        Arguments:
            others: the statistics of the other backends of its pool that are up, ejected or not.
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
        """Whether one more backend of a pool may be ejected.

        Arguments:
            others: as for `verdict`.
        """
        up = len(others) + 1
        ejected = sum(other.ejected(now) for other in others) + 1
        return ejected < up and ejected <= self._settings.max_ejected * up

    def eject(self, stats: OutlierStats, reason: Reason, now: float) -> float:
        """Eject a backend; returns for how many seconds. Each ejection lasts twice as long as the one before, and each
        `window` of seconds in the rotation takes one doubling back."""
        settings = self._settings
        good_time = max(0.0, now - stats.ejected_until)
        level = max(0, stats.level - int(good_time / settings.window)) if stats.level else 0
        seconds = settings.ejection * 2.0**level
        if seconds < settings.longest_ejection:  # a higher level would not last longer, but take longer to go down
            level += 1
        seconds = min(seconds, settings.longest_ejection)
        stats.begin_anew()
        stats.level = level
        stats.eject(now + seconds, reason)
        return seconds

    def factor(self, since: float, now: float) -> float:
        """The share of its usual load that a backend gets during its slow start, from 0.1 to 1.

        Arguments:
            since: when it returned.
        """
        duration = self._settings.slow_start
        passed = now - since
        return 1.0 if passed >= duration else max(_LEAST_FACTOR, passed / duration)

    def panics(self, fit: int, members: int) -> bool:
        """Whether so few backends of a pool are left that its ejections are ignored (Envoy's panic threshold).

        Arguments:
            fit: the number of backends that are up and not ejected.
            members: the number of all backends of the pool that are to take requests, up or not.
        """
        return fit == 0 or fit < self._settings.panic_threshold * members
