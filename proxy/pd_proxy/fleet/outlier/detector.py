"""Who may be given a request now: what the breaker decides, kept up with time.

Backends in an ejection, a slow start or a rest are watched; while there is none, a look at a pool costs nothing here.
Nothing runs by itself: what time has changed is brought up to date whenever somebody looks.
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

_LONGEST_REST = 10.0  # seconds; an engine's Retry-After is a guess, and is not to take it out for good


class OutlierDetector:
    """Takes note of how legs went, and ejects.

    Arguments:
        peers: the other backends that could take a backend's requests: up, not draining, of its pool and model.
        clock: seconds, never going back.
    Attributes:
        watches: backends in an ejection, a slow start or a rest. While there are none, all that serve are fit.
        ejections: by pool, backend, leg and reason.
    """

    def __init__(
        self, settings: BreakerSettings, peers: Callable[[Backend], list[Backend]], clock: Callable[[], float]
    ) -> None:
        self._breaker = Breaker(settings)
        self._peers = peers
        self._clock = clock
        self.watches: set[Backend] = set()
        self.ejections: Counter[tuple[str, str, str, str]] = Counter()

    # How legs went

    def succeeded(self, backend: Backend, leg: LegName) -> None:
        backend.outlier_stats[leg].note(True, self._clock())

    def failed(self, backend: Backend, leg: LegName, error: BackendError) -> None:
        """A leg failed by the backend's fault. One that says it is busy has not failed: it rests, if it says how
        long."""
        now = self._clock()
        stats = backend.outlier_stats[leg]
        if isinstance(error, BackendBusy):
            if error.retry_after:
                backend.resting_until = now + min(float(error.retry_after), _LONGEST_REST)
                self.watches.add(backend)
        elif not stats.ejected(now):  # what fails during an ejection has been paid for
            stats.note(False, now)
            self._judge(backend, leg, now, str(error))

    def leaves(self, backend: Backend, what: str) -> None:
        """A backend's engine has shown that it is stopping or paused. It looks idle then, and may look healthy for as
        long as it drains: it is ejected on its own word, whatever share of its pool is out. What runs on it may end."""
        now = self._clock()
        for leg in backend.legs:
            stats = backend.outlier_stats[leg]
            if not stats.leaving(now):
                self._eject(backend, leg, stats, "leaving", what, now)

    def leaving(self, backend: Backend) -> bool:
        """Whether a backend is ejected on its own word."""
        now = self._clock()
        return any(backend.outlier_stats[leg].leaving(now) for leg in backend.legs)

    def timed(self, backend: Backend, leg: LegName, seconds: float, tokens: int) -> None:
        """How long a leg took; for decode: each of its tokens."""
        now = self._clock()
        stats = backend.outlier_stats[leg]
        if not stats.ejected(now) and self._breaker.timed(backend.role, leg, stats, seconds, tokens, now):
            self._judge(backend, leg, now, f"slower than its pool: {seconds:.3g} s at its last {leg} leg")

    def _judge(self, backend: Backend, leg: LegName, now: float, what: str) -> None:
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
        if reason == "consecutive":  # nothing gets through: those that wait there would fail too, only later
            backend.give_up_waiting("was ejected")

    # Coming and going

    def returned(self, backend: Backend) -> None:
        """A backend has come up: what it was before is forgotten. Its load grows slowly, unless it is one of those
        that the gateway began with: these are all alike."""
        now = self._clock()
        for stats in backend.outlier_stats.values():
            stats.lift(now)
        backend.resting_until = 0.0
        if backend.known:
            self._start_slowly(backend, now, now)
        backend.known = True

    def forget(self, backend: Backend) -> None:
        """A backend has left for good."""
        self.watches.discard(backend)
        for key in [key for key in self.ejections if key[1] == backend.url]:
            del self.ejections[key]

    def _start_slowly(self, backend: Backend, since: float, now: float) -> None:
        backend.slow_since = since
        backend.factor = self._breaker.factor(since, now)
        self.watches.add(backend)

    # Who is fit

    def refresh(self) -> float:
        """Bring everything up to date; returns the time."""
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
        """Those of `serving` that should get a request: not ejected, unless too few would be left; of these the ones
        that do not rest, where there are any.

        Arguments:
            serving: backends that are up and could serve it.
            members: counts all that could, were they up.
        """
        now = self.refresh()
        fit = [backend for backend in serving if not backend.outlier_stats[leg].ejected(now)]
        if len(fit) < len(serving) and self._breaker.panics(len(fit), members()):
            fit = [backend for backend in serving if not backend.outlier_stats[leg].leaving(now)] or serving
        return [backend for backend in fit if backend.resting_until <= now] or fit

    def panics(self, serving: Sequence[Backend], leg: LegName, members: int) -> bool:
        """Whether ejections of these are being ignored."""
        now = self._clock()
        fit = sum(not backend.outlier_stats[leg].ejected(now) for backend in serving)
        return fit < len(serving) and self._breaker.panics(fit, members)

    def ejected_for(self, backend: Backend) -> dict[LegName, tuple[float, str]]:
        """The legs that a backend is ejected for, with the seconds that are left, and why."""
        now = self.refresh()
        return {
            leg: (stats.ejected_until - now, stats.reason)
            for leg in backend.legs
            if (stats := backend.outlier_stats[leg]).ejected(now)
        }
