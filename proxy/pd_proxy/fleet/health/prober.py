"""Active health checks: a watcher for each backend, which brings it into the rotation and takes it out.

The control plane's client sends the probes, and tenacity repeats them. A backend is up if its health path answers 200
and it is not asleep: vLLM calls a sleeping engine healthy. Models and version are read when a backend comes up, and
every `_RELEARN` seconds after. Probes decide whether a backend is alive; how well it works is decided by its requests
(`fleet/outlier/`).

If most backends fail a check at the same moment, or the event loop was late, they are asked again before any is taken
out (`mass_failure.py`).

Many backends may be down at once, as in a rack without power or a fleet that has not been started. All of them together
are probed at most `_MOST_DOWN` times a second, and only few have a log line of their own (`down_log.py`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from random import random
from urllib.parse import urlsplit

from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    wait_exponential,
    wait_fixed,
)

from pd_proxy.fleet.backend import Backend
from pd_proxy.fleet.fleet import Fleet
from pd_proxy.fleet.health.discovery import CoordinatesReader, Discovery
from pd_proxy.fleet.health.down_log import LINES_FOR, DownLog
from pd_proxy.fleet.health.identities import Identities
from pd_proxy.fleet.health.kv_cache import Cache
from pd_proxy.fleet.health.mass_failure import Checks, Excuse, Run
from pd_proxy.fleet.health.probe import Probe, ProbeFailed
from pd_proxy.http.control import Control
from pd_proxy.http.reachability import speaks_tls
from pd_proxy.settings.bounds import Health

log = logging.getLogger("pd_proxy.fleet")

_RELEARN = 15.0  # seconds; LoRA adapters are loaded and unloaded at run time
_MOST_ASKED = 50  # engines a second that are asked for a model that none is known to have: some percent of a core
_CLOSE_LOOK = 0.25  # seconds between probes of a backend whose engine is stopping
_FIRST_WAIT = 0.1  # seconds between the first probes of a backend that is down: engines start in bursts
_JITTER = 0.25  # the random share of a wait, so that backends that went down together are not probed together
_MOST_DOWN = 20  # probes a second of all backends that are down: some percent of a core
_BETWEEN_FAILURES = 0.2  # seconds between a failed probe and the next, of a backend that is up


class Prober:
    """Watches every backend of a fleet.

    Arguments:
        control: sends the probes; its timeout bounds each request.
        on_leave: called with each backend that has left the fleet.
        reads_caches: whether to read how much engines' KV caches hold, which placement uses.
        learns_identity: whether the identity of a backend's engine is needed (`identities.py`).
        connectors: by name: how to recognise its engines and to read their coordinates.
        sentinel_headers: header lines of each request over a sentinel connection.
    """

    def __init__(
        self,
        fleet: Fleet,
        settings: Health,
        control: Control,
        *,
        on_leave: Callable[[Backend], object] = lambda backend: None,
        reads_caches: bool = False,
        learns_identity: Callable[[Backend], bool] = lambda backend: False,
        connectors: Mapping[str, CoordinatesReader] | None = None,
        sentinel_headers: bytes = b"",
    ) -> None:
        self._fleet = fleet
        self._settings = settings
        self._control = control
        self._on_leave = on_leave
        self._reads_caches = reads_caches
        self._probe = Probe(control, settings.timeout)
        self._discovery = Discovery(fleet, self._probe, settings.timeout, connectors or {})
        self._identities = Identities(control, settings.timeout, learns_identity, sentinel_headers)
        self.probe, self.lives = self._probe.probe, self._probe.lives
        self.why_unreachable = self._probe.why_unreachable
        self.profile, self.read_from_elsewhere = self._discovery.profile, self._discovery.read_from_elsewhere
        self._watchers: dict[Backend, asyncio.Task[None]] = {}
        self._rounds: set[asyncio.Task[None]] = set()
        self._next_round: asyncio.Task[None] | None = None
        self._not_before = float("-inf")  # when the next round may begin
        self._down = 0  # the number of backends that are down, and probed until they are up
        self._quiet = DownLog()
        self._checks = Checks(control.timeout, fleet.delays)
        self._excused_logged = float("-inf")
        self._unsubscribe: Callable[[], None] = lambda: None

    def start(self) -> None:
        """Watch the backends in the fleet, and those that join it later."""
        self._unsubscribe = self._fleet.subscribe(on_join=self._join, on_leave=self._leave)
        for backend in self._fleet:
            self._join(backend)

    async def stop(self) -> None:
        """End all watchers."""
        self._unsubscribe()
        watchers = [*self._watchers.values(), *self._rounds]
        for watcher in watchers:
            watcher.cancel()
        for watcher in watchers:
            with suppress(asyncio.CancelledError):
                await watcher
        self._watchers.clear()

    def _join(self, backend: Backend) -> None:
        if self._reads_caches and backend.role != "encode":
            # Nothing is known of its cache yet. Other workers may use it already, and report what they have sent to it.
            self._fleet.set_cache(backend, Cache())
        self._watchers[backend] = asyncio.create_task(self._watch(backend), name=f"probe {backend.url}")

    def _leave(self, backend: Backend) -> None:
        if watcher := self._watchers.pop(backend, None):
            watcher.cancel()
        self._probe.forget(backend)
        self._discovery.forget(backend)
        self._checks.forget(backend)
        self._on_leave(backend)

    async def ask_models(self) -> None:
        """Ask all backends that are up which models they serve; returns when they have answered. Requests that name an
        unknown model call it. Calls at the same time share one round of questions, and rounds are bounded by
        `_MOST_ASKED`: a call that comes sooner waits for the next round, since its model may have been loaded after the
        last one."""
        if self._next_round is None:
            self._next_round = asyncio.create_task(self._ask_all(), name="ask for models")
            self._rounds.add(self._next_round)
            self._next_round.add_done_callback(self._rounds.discard)
        await asyncio.shield(self._next_round)

    async def _ask_all(self) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(self._not_before - loop.time())
        asked = [backend for backend in self._fleet if backend.up]
        self._next_round, self._not_before = None, loop.time() + len(asked) / _MOST_ASKED
        await asyncio.gather(*(self._ask(backend) for backend in asked))

    async def _ask(self, backend: Backend) -> None:
        try:
            models = await self._discovery.models(backend)
        except ProbeFailed as failure:
            log.info("%s backend %s did not report its models: %s", backend.role, backend.url, failure)
        else:
            self._fleet.set_models(backend, models, backend.version)

    async def _watch(self, backend: Backend) -> None:
        while True:
            try:
                await self._until_up(backend)
                await self._until_down(backend)
            except Exception:  # whatever an engine answers, its watcher must not end
                log.exception("watching %s backend %s failed; the watcher continues", backend.role, backend.url)
                await asyncio.sleep(self._settings.interval)
            finally:
                self._identities.disconnect(backend)

    async def _until_up(self, backend: Backend) -> None:
        """Probe a backend until it is up, at growing intervals."""
        slower = wait_exponential(multiplier=_FIRST_WAIT, max=self._settings.longest_wait)

        def wait(state: RetryCallState) -> float:
            return max(slower(state), (self._down - 1) / _MOST_DOWN) * (1 - _JITTER * random())

        self._down += 1
        try:
            async for attempt in AsyncRetrying(
                retry=retry_if_exception_type(ProbeFailed),
                wait=wait,
                before_sleep=lambda state: self._still_down(backend, state),
            ):
                with attempt:
                    await self.probe_and_learn(backend)
        finally:
            self._down -= 1
        await self._identities.connect(backend)
        if self._reads_caches:
            await self._discovery.read_cache(backend)
        backend.attention.clear()
        self._checks.forget(backend)
        self._fleet.bring_in(backend)

    def _still_down(self, backend: Backend, state: RetryCallState) -> None:
        failure = state.outcome.exception() if state.outcome else None
        reason = str(failure) if state.outcome else "not probed yet"
        if isinstance(failure, ProbeFailed) and failure.code == "refused":
            # Streams that went on when the backend was taken out, such as those of an engine that drains, may hang by
            # now: an engine whose drain is too short leaves their connections open and silent.
            backend.give_up_waiting(reason)
        if backend.removed:
            self._fleet.forget_idle()
        if reason != backend.reason:
            backend.note_down(reason)
            self._quiet.report(backend, reason)

    async def _until_down(self, backend: Backend) -> None:
        """Probe a backend at the interval, and at once when a request has failed. Returns when the probes fail, or a
        request has taken it out."""
        loop = asyncio.get_running_loop()
        learnt = loop.time()
        while True:
            called = False
            with suppress(TimeoutError):
                async with asyncio.timeout(self._interval(backend)):
                    called = await backend.attention.wait()
            backend.attention.clear()
            if backend.removed:
                self._fleet.forget_idle()
            if not backend.up:
                return
            if called:
                backend.forget_location()
            if failure := await self._fails(backend):
                self._fleet.take_out(backend, str(failure))
                return
            if stale := loop.time() - learnt > _RELEARN:
                learnt = loop.time()
            if stale or called:  # after a failure it may be another engine, with other models and coordinates
                with suppress(ProbeFailed):
                    await self._discovery.learn(backend)
            await self._identities.keep(backend, anew=stale)

    async def _fails(self, backend: Backend) -> ProbeFailed | None:
        """Why a backend is to leave the rotation: `health.failures` probes in a row have failed that are not excused.
        None if it stays."""
        loop, checks = asyncio.get_running_loop(), self._checks
        run = Run(self._settings.failures, loop.time())

        def stop(state: RetryCallState) -> bool:
            others = (other for other in self._fleet if other.up and other is not backend)
            out = run.failed(checks, others, loop.time())
            if run.last is not None:
                self._excuse(run.last)
            return out

        try:
            async for attempt in AsyncRetrying(
                retry=retry_if_exception_type(ProbeFailed),
                stop=stop,
                wait=wait_fixed(min(_BETWEEN_FAILURES, self._settings.interval)),
                reraise=True,
            ):
                with attempt:
                    checks.began(backend, loop.time())
                    try:
                        await self.probe(backend)
                    except ProbeFailed:
                        checks.ended(backend, False)
                        raise
                    checks.ended(backend, True)
        except ProbeFailed as failure:
            return failure
        return None

    def _excuse(self, why: Excuse) -> None:
        """Count a failed check that does not take its backend out; one log line stands for all at the same time."""
        self._fleet.excused_checks[why] += 1
        now = asyncio.get_running_loop().time()
        if now - self._excused_logged < LINES_FOR:
            return
        self._excused_logged = now
        up = [backend for backend in self._fleet if backend.up]
        failing = sum(self._checks.fails(backend, now) for backend in up)
        log.warning(
            "health checks of %d of %d backends failed %s: they are asked again before any is taken out",
            *(failing, len(up)),
            "while this gateway's event loop stood still" if why == "late" else "at the same time",
        )

    async def probe_and_learn(self, backend: Backend) -> None:
        """Ask a backend that is not up whether it is healthy, and for what must be known before its first request.

        Raises:
            ProbeFailed: it should get no requests.
        """
        try:
            await self.probe(backend)
            await self._discovery.learn(backend, anew=True)
        except ProbeFailed as failure:
            parts = urlsplit(backend.url)
            suspect = failure.code in ("no_http", "no_engine") and parts.scheme == "http"
            if suspect and await speaks_tls(
                self._control, parts.hostname or "", parts.port or 80, self._settings.timeout
            ):
                raise ProbeFailed(f"it speaks TLS ({failure})", "speaks_tls") from failure
            raise

    def _interval(self, backend: Backend) -> float:
        """Seconds to the next probe. A backend that is stopping is probed more often: it may be back after a moment."""
        usual = self._settings.interval
        return min(usual, _CLOSE_LOOK) if self._fleet.outlier_detector.leaving(backend) else usual
