"""Outlier detection: applies the rules of `breaker.py` to legs' outcomes, and ends ejections when their time is over.

A backend is watched while it is ejected, in its slow start, or resting. While none is watched, a look at a pool costs
nothing here. No task runs: what has changed with time is brought up to date when a pool is looked at.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence

from pd_proxy.errors import BackendBusy, BackendError
from pd_proxy.fleet.backend import Backend
from pd_proxy.fleet.outlier.breaker import Breaker, Reason
from pd_proxy.fleet.outlier.statistics import LegName, OutlierStats
from pd_proxy.fleet.state import Fitness
from pd_proxy.settings.bounds import BreakerSettings

log = logging.getLogger("pd_proxy.fleet")

_LONGEST_REST = 10.0  # seconds; an engine's Retry-After is a guess, and must not take it out of the rotation for long


class OutlierDetector:
    """Notes the outcomes of legs, and ejects backends.

    Arguments:
        peers: returns the other backends that could take a backend's requests: up, not draining, of its pool and model.
        clock: a monotonic clock, in seconds.
    Attributes:
        watches: the backends that are ejected, in their slow start or resting. While there are none, all backends that
            serve are fit.
        ejections: the number of ejections by pool, backend, leg and reason.
    """

    def __init__(
        self, settings: BreakerSettings, peers: Callable[[Backend], list[Backend]], clock: Callable[[], float]
    ) -> None:
        self._breaker = Breaker(settings)
        self._peers = peers
        self._clock = clock
        self.watches: set[Backend] = set()
        self.ejections: Counter[tuple[str, str, str, str]] = Counter()

    # Outcomes of legs

    def succeeded(self, backend: Backend, leg: LegName) -> None:
        """Note that a leg succeeded."""
        backend.outlier_stats[leg].note(True, self._clock())

    def failed(self, backend: Backend, leg: LegName, error: BackendError) -> None:
        """Note that a leg failed through the backend's fault. A backend that answers that it is busy has not failed: it
        rests, if it says for how long."""
        now = self._clock()
        stats = backend.outlier_stats[leg]
        if isinstance(error, BackendBusy):
            if error.retry_after:
                backend.resting_until = now + min(float(error.retry_after), _LONGEST_REST)
                self.watches.add(backend)
        elif not stats.ejected(now):  # failures during an ejection do not count again
            stats.note(False, now)
            self._check(backend, leg, now, str(error))

    def leaves(self, backend: Backend, what: str) -> None:
        """Eject a backend whose engine has shown that it is stopping or paused, whatever share of its pool is ejected:
        it looks idle, and may look healthy for as long as it drains. Requests that run on it may end."""
        now = self._clock()
        for leg in backend.legs:
            stats = backend.outlier_stats[leg]
            if not stats.leaving(now):
                self._eject(backend, leg, stats, "leaving", what, now)

    def leaving(self, backend: Backend) -> bool:
        """Whether a backend is ejected since its engine is stopping or paused."""
        now = self._clock()
        return any(backend.outlier_stats[leg].leaving(now) for leg in backend.legs)

    def timed(self, backend: Backend, leg: LegName, seconds: float, tokens: int) -> None:
        """Note how long a leg took; for decode: each of its tokens."""
        now = self._clock()
        stats = backend.outlier_stats[leg]
        if not stats.ejected(now) and self._breaker.timed(backend.role, leg, stats, seconds, tokens, now):
            self._check(backend, leg, now, f"slower than its pool: {seconds:.3g} s at its last {leg} leg")

    def _check(self, backend: Backend, leg: LegName, now: float, what: str) -> None:
        others = [peer.outlier_stats[leg] for peer in self._peers(backend)]
        stats = backend.outlier_stats[leg]
        reason = self._breaker.verdict(leg, stats, others, now)
        if reason is not None and backend.up and not backend.draining and self._breaker.may_eject(others, now):
            self._eject(backend, leg, stats, reason, what, now)

    def _eject(
        self, backend: Backend, leg: LegName, stats: OutlierStats, reason: Reason, what: str, now: float
    ) -> None:
        seconds = self._breaker.eject(stats, reason, now)
        self.ejections[backend.role, backend.url, leg, reason] += 1
        self.watches.add(backend)
        log.warning(
            "%s backend %s is ejected for %g s (%s of its %s legs): %s",
            *(backend.role, backend.url, seconds, reason, leg, what),
        )
        if reason == "consecutive":  # no request succeeds there: those that wait would only fail later
            backend.give_up_waiting("was ejected")

    # Coming and going

    def returned(self, backend: Backend) -> None:
        """Note that a backend has come up: its statistics begin anew. It has a slow start, unless the gateway started
        with it and it comes up for the first time: such backends are all equally new."""
        now = self._clock()
        for stats in backend.outlier_stats.values():
            stats.lift(now)
        backend.resting_until = 0.0
        if backend.needs_slow_start:
            self._start_slowly(backend, now, now)
        backend.needs_slow_start = True

    def forget(self, backend: Backend) -> None:
        """Forget a backend that has left the fleet."""
        self.watches.discard(backend)
        for key in [key for key in self.ejections if key[1] == backend.url]:
            del self.ejections[key]

    def _start_slowly(self, backend: Backend, since: float, now: float) -> None:
        backend.slow_since = since
        backend.factor = self._breaker.factor(since, now)
        self.watches.add(backend)

    # Who is fit

    def refresh(self) -> float:
        """Bring all watched backends up to date; returns the time."""
        now = self._clock()
        for backend in tuple(self.watches):
            self._bring_up_to_date(backend, now)
        return now

    def _bring_up_to_date(self, backend: Backend, now: float) -> None:
        ejected = False
        for leg in backend.legs:
            stats = backend.outlier_stats[leg]
            if stats.ejected(now):
                ejected = True
            elif stats.fitness is Fitness.EJECTED:
                log.info("%s backend %s is back after its ejection (%s)", backend.role, backend.url, stats.reason)
                stats.end_ejection()
                self._start_slowly(backend, stats.ejected_until, now)
        if backend.slow_since is not None:
            backend.factor = self._breaker.factor(backend.slow_since, now)
            if backend.factor == 1.0:
                backend.slow_since = None
        if not ejected and backend.slow_since is None and backend.resting_until <= now:
            self.watches.discard(backend)

    def fit(self, serving: list[Backend], leg: LegName, members: Callable[[], int]) -> list[Backend]:
        """The backends of `serving` that should get a request: those that are not ejected, unless too few are left; of
        these the ones that do not rest, if there are any.

        Arguments:
            serving: the backends that are up and could serve the request.
            members: returns the number of backends that could serve it, up or not.
        """
        now = self.refresh()
        fit = [backend for backend in serving if not backend.outlier_stats[leg].ejected(now)]
        if len(fit) < len(serving) and self._breaker.panics(len(fit), members()):
            fit = [backend for backend in serving if not backend.outlier_stats[leg].leaving(now)] or serving
        return [backend for backend in fit if backend.resting_until <= now] or fit

    def panics(self, serving: Sequence[Backend], leg: LegName, members: int) -> bool:
        """Whether the ejections of these backends are ignored now."""
        now = self._clock()
        fit = sum(not backend.outlier_stats[leg].ejected(now) for backend in serving)
        return fit < len(serving) and self._breaker.panics(fit, members)

    def ejected_for(self, backend: Backend) -> dict[LegName, tuple[float, str]]:
        """The legs that a backend is ejected for, with the seconds that are left and the reason."""
        now = self.refresh()
        return {
            leg: (stats.ejected_until - now, stats.reason)
            for leg in backend.legs
            if (stats := backend.outlier_stats[leg]).ejected(now)
        }
