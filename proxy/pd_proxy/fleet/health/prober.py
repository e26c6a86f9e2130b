"""Active health checks: one watcher a backend, which brings it into the rotation and takes it out.

httpx carries the probes and tenacity repeats them. The health path of a backend's kind decides, and whether it sleeps,
as vLLM calls a sleeping engine healthy; its models and its version are learnt on the way in and now and then after.
Probes say whether a backend is alive; whether it is any good, its requests say.

Where most backends fail a check at the same moment, or the event loop was late, they are asked again before any is
taken out (`mass_failure.py`).

Backends that are down may be many, and then they are many at once: a rack without power, a fleet that is still to be
started. All of them together are probed at most `_MOST_DOWN` times a second, and few of them have a log line of their
own.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from random import random
from typing import Any, Protocol
from urllib.parse import urlsplit

import msgspec
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    wait_exponential,
    wait_fixed,
)

from pd_proxy.decoding import decode_json
from pd_proxy.errors import BackendError, BackendTimedOut
from pd_proxy.fleet.backend import Backend
from pd_proxy.fleet.findings import Finding, found
from pd_proxy.fleet.fleet import Fleet
from pd_proxy.fleet.health.fingerprints import CONFIGURATION, configured, counted, speaker
from pd_proxy.fleet.health.identity import read_facts
from pd_proxy.fleet.health.kv_cache import Cache, read_cache
from pd_proxy.fleet.health.mass_failure import Checks, Excuse, Run
from pd_proxy.fleet.health.profile import Profile, read_from_elsewhere, read_profile
from pd_proxy.fleet.health.sentinel import Sentinel, SentinelClosed
from pd_proxy.handoff.coordinates import Coordinates
from pd_proxy.handoff.traits import Traits
from pd_proxy.http.control import Answer, Control
from pd_proxy.http.reachability import code_of, reason_of, speaks_tls, why_unreachable
from pd_proxy.settings.bounds import Health

log = logging.getLogger("pd_proxy.fleet")

_RELEARN = 15.0  # seconds; LoRA adapters come and go at run time
_MOST_ASKED = 50  # engines a second, for models that nobody is known to have: some percent of a core
_PATIENCE = 10.0  # seconds for an engine's configuration: vLLM looks at its whole environment for it
_RESTS = {
    "is_sleeping": "it is asleep, or paused (POST /admin/wake_up, or the engine's own /resume, ends that)",
    "is_paused": "it is paused (POST /resume to the engine ends that)",
}
_CLOSE_LOOK = 0.25  # seconds between probes of a backend whose engine is stopping
_FIRST_WAIT = 0.1  # seconds between the first probes of a backend that is down: engines start in bursts
_JITTER = 0.25  # share of a wait that is left to chance, lest backends that went down together are probed together
_MOST_DOWN = 20  # probes a second of all backends that are down: some percent of a core
_LINES = 10  # log lines about single backends that are down, in `_LINES_FOR` seconds; of the rest one tells
_LINES_FOR = 5.0
_BETWEEN_FAILURES = 0.2  # seconds between a failed probe and the next, of a backend that is up
_NOT_AS_EXPECTED = (ValueError, KeyError, TypeError, AttributeError)  # of an answer's JSON


class ProbeFailed(Exception):
    """A probe that says the backend should get no requests; the text says why, for people.

    Arguments:
        code: of `findings.py`.
    """

    def __init__(self, message: str, code: str = "failed") -> None:
        super().__init__(message)
        self.code = code

    def finding(self, backend: Backend) -> Finding:
        """The same of a backend, with what to do about it."""
        return found(self.code, f"{backend.role} backend {backend.url} is not up: {self}", backend.url)


class Guide(Protocol):
    """What a connector says of its engines' coordinates."""

    @property
    def traits(self) -> Traits: ...

    def info_url(self, coordinates: Coordinates) -> str: ...

    def learn(self, coordinates: Coordinates, answer: bytes) -> Coordinates: ...


class Prober:
    """Watches every backend of a fleet while it runs.

    Arguments:
        control: asks the engines; its timeout bounds one probe.
        on_leave: told of backends that have left the fleet.
        reads_caches: placement wants to know what engines' KV caches hold.
        learns_facts: whether to keep a `Tether` to a backend that is up, and over it what is sure of the engine.
        guides: by connector: how to learn the coordinates of an engine that speaks it.
        tether_headers: what each request over it carries, as whole lines.
    """

    def __init__(
        self,
        fleet: Fleet,
        settings: Health,
        control: Control,
        *,
        on_leave: Callable[[Backend], object] = lambda backend: None,
        reads_caches: bool = False,
        learns_facts: Callable[[Backend], bool] = lambda backend: False,
        guides: Mapping[str, Guide] | None = None,
        tether_headers: bytes = b"",
    ) -> None:
        self._fleet = fleet
        self._settings = settings
        self._control = control
        self._on_leave = on_leave
        self._reads_caches = reads_caches
        self._learns_facts = learns_facts
        self._guides = guides or {}
        self._tether_headers = tether_headers
        self._tethers: dict[Backend, Sentinel] = {}
        self._told: dict[Backend, Coordinates] = {}  # coordinates as people set them
        self._watchers: dict[Backend, asyncio.Task[None]] = {}
        self._resting: dict[Backend, set[str]] = {}  # where they have said that they can
        self._rounds: set[asyncio.Task[None]] = set()
        self._next_round: asyncio.Task[None] | None = None
        self._not_before = float("-inf")  # when the next round may begin
        self._down = 0  # backends that are being probed until they are up
        self._quiet = _Quiet()
        self._checks = Checks(control.timeout, fleet.delays)
        self._excused_told = float("-inf")
        self._unsubscribe: Callable[[], None] = lambda: None

    def start(self) -> None:
        """Watch what is in the fleet now and whatever joins later."""
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
            # Nothing is known of it yet, but other workers may have met it, and tell what they have sent there.
            self._fleet.holds(backend, Cache())
        self._watchers[backend] = asyncio.create_task(self._watch(backend), name=f"probe {backend.url}")

    def _leave(self, backend: Backend) -> None:
        if watcher := self._watchers.pop(backend, None):
            watcher.cancel()
        self._resting.pop(backend, None)
        self._told.pop(backend, None)
        self._checks.forget(backend)
        self._on_leave(backend)

    async def ask_models(self) -> None:
        """Ask all that are up which models they serve; returns when they have said. It is for requests that name an
        unknown one, so it is done once for all that come together, and no faster than `_MOST_ASKED`: who comes sooner
        waits for the next time, since what it wants may have been loaded after the last."""
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
            models = await self._models(backend)
        except ProbeFailed as failure:
            log.info("%s backend %s did not say which models it has: %s", backend.role, backend.url, failure)
        else:
            self._fleet.learnt(backend, models, backend.version)

    async def _watch(self, backend: Backend) -> None:
        while True:
            try:
                await self._until_up(backend)
                await self._until_down(backend)
            except Exception:  # whatever an engine may answer, its watcher must not end
                log.exception("watching %s backend %s failed; it goes on", backend.role, backend.url)
                await asyncio.sleep(self._settings.interval)
            finally:
                self._untie(backend)

    async def _until_up(self, backend: Backend) -> None:
        """Probe until it answers, ever more slowly."""
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
                    await self.negotiate(backend)
        finally:
            self._down -= 1
        await self._tie(backend)
        if self._reads_caches:
            await self._read_cache(backend)
        backend.attention.clear()
        self._checks.forget(backend)
        self._fleet.bring_in(backend)

    def _still_down(self, backend: Backend, state: RetryCallState) -> None:
        failure = state.outcome.exception() if state.outcome else None
        reason = str(failure) if state.outcome else "not probed yet"
        if isinstance(failure, ProbeFailed) and failure.code == "refused":
            # Streams that went on when it was taken out, as those of an engine that drains, may hang by now: a drain
            # that is too short leaves their connections open and silent.
            backend.give_up_waiting(reason)
        if backend.removed:
            self._fleet.forget_idle()
        if reason != backend.reason:
            backend.note_down(reason)
            self._quiet.tell(backend, reason)

    async def _until_down(self, backend: Backend) -> None:
        """Probe at the interval, or at once when a request failed, until the probes fail or a request took it out."""
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
            if stale or called:  # what failed may be another engine by now, with other models and coordinates
                with suppress(ProbeFailed):
                    await self._learn(backend)
            await self._hold(backend, anew=stale)

    async def _fails(self, backend: Backend) -> ProbeFailed | None:
        """Why a backend is to leave the rotation: `health.failures` probes in a row have failed, and say something
        about it."""
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
        """Count a failed check that does not take its backend out; one line of the log tells of all at one time."""
        self._fleet.excused_checks[why] += 1
        now = asyncio.get_running_loop().time()
        if now - self._excused_told < _LINES_FOR:
            return
        self._excused_told = now
        up = [backend for backend in self._fleet if backend.up]
        failing = sum(self._checks.fails(backend, now) for backend in up)
        log.warning(
            "health checks of %d of %d backends failed %s: they are asked again before any is taken out",
            *(failing, len(up)),
            "while this gateway's event loop stood still" if why == "late" else "at the same time",
        )

    async def negotiate(self, backend: Backend) -> None:
        """Ask a backend that is not up whether it is well, and for what must be known of it before its first request.

        Raises:
            ProbeFailed: it should get no requests.
        """
        try:
            await self.probe(backend)
            await self._learn(backend, anew=True)
        except ProbeFailed as failure:
            parts = urlsplit(backend.url)
            suspect = failure.code in ("no_http", "no_engine") and parts.scheme == "http"
            if suspect and await speaks_tls(
                self._control, parts.hostname or "", parts.port or 80, self._settings.timeout
            ):
                raise ProbeFailed(f"it speaks TLS ({failure})", "speaks_tls") from failure
            raise

    async def profile(self, backend: Backend) -> Profile:
        """What an engine tells of how it was started."""
        configuration = b""
        for page in CONFIGURATION:
            if configuration := await self._page(backend.url + page, _PATIENCE):
                break
        path = backend.kind.metrics
        metrics = await self._page(backend.url + path, self._settings.timeout) if path else b""
        profile = read_profile(configuration, metrics)
        contexts = [card.get("max_model_len") for card in (backend.models or {}).values()]
        known = [context for context in contexts if isinstance(context, int) and context > 0]
        return msgspec.structs.replace(profile, context=min(known)) if known else profile

    async def _read_cache(self, backend: Backend) -> None:
        """Learn how much an engine's KV cache holds. One that does not say is no worse for it."""
        path = backend.kind.metrics
        if backend.role != "encode":
            metrics = await self._page(backend.url + path, self._settings.timeout) if path else b""
            self._fleet.holds(backend, read_cache(metrics))

    async def read_from_elsewhere(self, backend: Backend) -> int | None:
        """How many prompt tokens an engine has taken out of others' KV caches; None where it does not say."""
        path = backend.kind.metrics
        return read_from_elsewhere(await self._page(backend.url + path, self._settings.timeout)) if path else None

    async def why_unreachable(self, host: str, port: int) -> str:
        """Why no connection to an address comes about, for people; empty where one does."""
        return await why_unreachable(self._control, host, port, self._settings.timeout)

    async def lives(self, backend: Backend) -> bool:
        """Whether a backend may be alive. One that is slow to say so may be: the machine is busy, or this one is."""
        try:
            await self.probe(backend)
        except ProbeFailed as failure:
            return failure.code == "timeout"
        return True

    def _interval(self, backend: Backend) -> float:
        """Seconds to the next probe. One that is stopping is looked at closely: it may be gone and back in no time."""
        usual = self._settings.interval
        return min(usual, _CLOSE_LOOK) if self._fleet.outlier_detector.leaving(backend) else usual

    async def probe(self, backend: Backend) -> None:
        """Ask once whether it is healthy and awake.

        Raises:
            ProbeFailed: anything but 200 in time.
        """
        path = backend.kind.health
        answer = await self._get(backend, path)
        if (status := answer.status) == 508:
            raise ProbeFailed("it is this gateway itself, or leads back to it", "no_engine")
        if status != 200:
            code = "key_refused" if status in (401, 403) else "unhealthy" if status >= 500 else "no_engine"
            raise ProbeFailed(f"{path} answered {status}", code)
        if member := await self._rests(backend):
            raise ProbeFailed(_RESTS[member], "asleep")

    async def _learn(self, backend: Backend, *, anew: bool = False) -> None:
        """Read the model ids and the version. An engine without one of the two is no worse for it, one that cannot be
        reached is.

        Arguments:
            anew: it may be another engine than before.
        Raises:
            ProbeFailed: it should get no requests.
        """
        backend.lacks.clear()
        models = await self._models(backend)
        version = ""
        path, member = backend.kind.version
        if path and (answer := await self._get(backend, path)).status != 404:
            version = backend.version
            if answer.status == 200:
                with suppress(*_NOT_AS_EXPECTED):
                    version = str(decode_json(answer.body)[member])
        self._fleet.learnt(backend, models, version)
        if self._fleet.is_to_tell(backend) and (anew or not backend.told):
            self._fleet.told(backend, await self._tell(backend))
        await self._locate(backend)

    async def _tell(self, backend: Backend) -> str:
        """Which hand-off protocol an engine speaks, as far as it tells."""
        marks = {name: guide.traits.fingerprints for name, guide in self._guides.items()}
        for page in CONFIGURATION:
            if known := configured(await self._page(backend.url + page, _PATIENCE)):
                return speaker(known, marks)
        if path := backend.kind.metrics:
            series = counted(await self._page(backend.url + path, self._settings.timeout))
            if name := speaker(series, marks):
                return name
        return await self._show(backend) if backend.role == "prefill" else ""

    async def _show(self, backend: Backend) -> str:
        """The protocol whose page about a prefill engine's coordinates there is; empty where there is none."""
        for name, guide in self._guides.items():
            coordinates = msgspec.structs.replace(
                backend.coordinates, port=backend.coordinates.port or guide.traits.port
            )
            if url := guide.info_url(coordinates):
                with suppress(*_NOT_AS_EXPECTED):
                    guide.learn(coordinates, await self._page(url, self._settings.timeout))
                    return name
        return ""

    async def _page(self, url: str, seconds: float) -> bytes:
        """A page, or nothing where it is not there."""
        try:
            answer = await self._control.ask(url, seconds=seconds)
        except BackendError:
            return b""
        return answer.body if answer.status == 200 else b""

    async def _models(self, backend: Backend) -> dict[str, dict[str, Any]] | None:
        """The models that a backend serves now, or what was known of them where it does not say."""
        answer = await self._get(backend, "/v1/models")
        if answer.status in (401, 403):
            raise ProbeFailed(f"/v1/models answered {answer.status}: set backend_api_key", "key_refused")
        if answer.status == 200:
            with suppress(*_NOT_AS_EXPECTED):
                return {str(card["id"]): dict(card) for card in decode_json(answer.body)["data"]}
        return backend.models

    async def _locate(self, backend: Backend) -> None:
        """Ask an engine for what its connector's legs must know of it, unless it says so by itself.

        Raises:
            ProbeFailed: it did not say, so that no hand-off can come about.
        """
        guide = self._guides.get(backend.connector)
        if (
            guide is not None
            and guide.traits.registers
            and backend.role in ("prefill", "decode")
            and not backend.registered
        ):
            raise ProbeFailed("its engine has not registered at zmq.registrations", "unregistered")
        if guide is None or backend.role != "prefill":
            return
        told = self._told.setdefault(backend, backend.coordinates)
        if not told.port:
            told = msgspec.structs.replace(told, port=guide.traits.port)
        if not backend.coordinates.port:
            backend.locate(told)
        urls = [backend.url + page for page in guide.traits.info_pages] or [guide.info_url(told)]
        if not urls[0]:
            return
        for url in urls:
            try:
                answer = await self._fetch(url, url)
            except ProbeFailed as failure:
                raise ProbeFailed(str(failure), "no_coordinates") from failure
            if answer.status != 404:
                break
        try:
            if answer.status != 200:
                raise ValueError(f"status {answer.status}")
            backend.locate(guide.learn(told, answer.body))
        except _NOT_AS_EXPECTED as error:
            raise ProbeFailed(f"{url} did not tell where its KV cache is: {error}", "no_coordinates") from None

    async def _rests(self, backend: Backend) -> str:
        """The member by which it says that it takes no requests though it is well, or an empty string. Only engines in
        development mode can, and only they have the routes; one without the first is not asked for the others."""
        for path, member in backend.kind.rests.items():
            if backend.up and path not in self._resting.get(backend, ()):
                continue
            try:
                answer = await self._get(backend, path)
            except ProbeFailed as failure:
                if backend.up and failure.code == "timeout":
                    break  # vLLM answers this between two steps, /health at any time: a long step is no rest
                raise
            can = self._resting.setdefault(backend, set())
            if answer.status != 200:
                can.discard(path)
                break
            can.add(path)
            with suppress(*_NOT_AS_EXPECTED):
                if decode_json(answer.body)[member] is True:
                    return member
        return ""

    async def _tie(self, backend: Backend) -> None:
        """Learn an engine's facts, over a connection that is held for as long as they are to be believed. They are
        unknown where that does not come about, which is no fault: its hand-offs are then those that fit any engine."""
        self._untie(backend)
        kind = backend.kind
        if not self._learns_facts(backend) or not (kind.metrics and kind.version[0]):
            return
        seconds = self._settings.timeout
        try:
            tether = await Sentinel.tie(
                backend.url,
                self._tether_headers,
                lambda: backend.learn(None),
                seconds,
                lambda: self._control.trust,
            )
            self._tethers[backend] = tether
            said = [await tether.ask(page, seconds) for page in (kind.metrics, "/v1/models", kind.version[0])]
        except SentinelClosed as error:
            log.debug("%s backend %s told nothing of itself: %s", backend.role, backend.url, error)
            self._untie(backend)
            return
        facts = read_facts(*(body if status == 200 else b"" for status, body in said))
        if facts is None or not tether.holds:
            self._untie(backend)
        else:
            backend.learn(facts)

    async def _hold(self, backend: Backend, *, anew: bool) -> None:
        """Keep a tether from growing idle, or tie it again.

        Arguments:
            anew: look again where nothing could be learnt before.
        """
        tether, facts = self._tethers.get(backend), backend.facts
        if tether is not None and tether.holds and facts is not None:
            with suppress(SentinelClosed):
                status, answer = await tether.ask(backend.kind.version[0], self._settings.timeout)
                if status == 200 and facts.version.encode() not in answer:
                    backend.learn(None)
        elif anew or tether is not None:
            await self._tie(backend)

    def _untie(self, backend: Backend) -> None:
        if backend.facts is not None:
            backend.learn(None)
        if tether := self._tethers.pop(backend, None):
            tether.close()

    async def _get(self, backend: Backend, path: str) -> Answer:
        return await self._fetch(backend.url + path, path)

    async def _fetch(self, url: str, path: str) -> Answer:
        try:
            return await self._control.ask(url)
        except BackendTimedOut:
            raise ProbeFailed(f"{path} did not answer within {self._control.timeout:g} s", "timeout") from None
        except BackendError as error:
            raise ProbeFailed(f"{path} could not be asked: {reason_of(error)}", code_of(error)) from error


class _Quiet:
    """Logs which backends are not up: the first of many by name, of the rest only how many."""

    def __init__(self) -> None:
        self._since = float("-inf")
        self._told = 0
        self._untold: Counter[str] = Counter()

    def tell(self, backend: Backend, reason: str) -> None:
        """A backend is not up, for another reason than before."""
        loop = asyncio.get_running_loop()
        if loop.time() - self._since > _LINES_FOR and not self._untold:
            self._since, self._told = loop.time(), 0
        if self._told < _LINES:
            self._told += 1
            log.warning("%s backend %s is not up: %s", backend.role, backend.url, reason)
            return
        if not self._untold:
            loop.call_at(self._since + _LINES_FOR, self._sum_up)
        self._untold[reason] += 1

    def _sum_up(self) -> None:
        (reason, _), number = self._untold.most_common(1)[0], self._untold.total()
        self._untold.clear()
        log.warning("%d more backends are not up (GET /admin/backends), most of them: %s", number, reason)
