"""One tiny request through each new pair, so that no user pays for the engines' first handshake.

When a backend comes up, it is paired with those of the other role that are up: with eight of them at most, and four
requests run at a time in all. So a fleet of 50 and 50 that starts at once sees some 800 requests of one token in a row
of fours, and not 2,500 together; pairs beyond the eight are warmed by their first real request, as is any pair that one
reaches before its turn. Nothing waits for it: /ready does not, and neither do requests.

It is nobody's request: it shows in no metric of clients', and whatever comes of it says nothing for or against a
backend. It does hold leases, since it is work for the engines, and a backend that is draining must wait for it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress

import msgspec

from proxy.errors import BackendError, GatewayError
from proxy.fleet.backend import Backend, Lease
from proxy.fleet.fleet import Fleet
from proxy.fleet.notices import Notices
from proxy.fleet.standing import LegName
from proxy.flow.callbacks import Callbacks
from proxy.flow.legs import Legs, Limbo, Try, new_try, remember
from proxy.flow.request import Request, new_id
from proxy.handoff.body import read_body
from proxy.handoff.connector import Connector
from proxy.relay.client import Flow, Headers
from proxy.settings import Settings
from proxy.telemetry.records import ITL_BOUNDS, Distribution, RequestRecord

log = logging.getLogger("pd_proxy.flow")

_PEERS = 8  # pairs for each newcomer: enough that the least-loaded of a pool is mostly one of them
_AT_ONCE = 4
_PATIENCE = 30.0  # seconds for one pair; a handshake that fails takes an engine 5
# Longer than a block of any engine (16 tokens on GPUs, 128 on Ascend), so that there is something to transfer. An id
# goes before it, so that no engine has it in its prefix cache and can do without the other.
_PROMPT = "The decode backend reads the cache of the prefill backend and goes on from there. " * 12

Pair = tuple[str, str]


class Nobody:
    """A client that throws away what it is given."""

    def __init__(self) -> None:
        self.started = False
        self.gone = False
        self.flow: Flow | None = None
        self.on_gone: Callable[[], object] | None = None

    def respond(self, status: int, headers: Headers, body: bytes) -> None:
        self.started = True

    def start(self, status: int, headers: Headers) -> None:
        self.started = True

    def write(self, data: bytes) -> None: ...

    def chunks(self) -> None:
        return None

    def end(self, data: bytes = b"") -> None: ...

    def cut(self) -> None: ...

    async def flushed(self) -> None: ...


class _Mute:
    """Takes what legs tell the fleet and telemetry, and tells nobody."""

    def succeeded(self, backend: Backend, leg: LegName) -> None: ...

    def failed(
        self, backend: Backend, error: BackendError, leg: LegName, handoff_from: Backend | None = None
    ) -> None: ...

    def timed(self, backend: Backend, leg: LegName, seconds: float, tokens: int) -> None: ...

    def gaps(self, pool: str, backend: str) -> Distribution:
        return Distribution(ITL_BOUNDS)

    def handoff_released(self, claimed: bool) -> None: ...

    def finished(self, record: RequestRecord) -> None: ...


class Warmup:
    """Warms pairs up while it runs. A sink of request records, by which it hears of pairs that are warm already."""

    def __init__(
        self,
        settings: Settings,
        fleet: Fleet,
        connectors: Mapping[str, Connector],
        notices: Notices,
        callbacks: Callbacks | None = None,
    ) -> None:
        self._on = settings.warmup
        self._fleet = fleet
        self._connectors = connectors
        self._callbacks = callbacks or Callbacks(None)
        self._legs = Legs(settings, _Mute(), _Mute(), notices)
        self._warm: set[Pair] = set()
        self._waiting: dict[Pair, tuple[Backend, Backend]] = {}
        self._workers: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Warm up whatever comes up from now on."""
        if self._on:
            self._fleet.on_up = self._came_up

    async def stop(self) -> None:
        """End what is running."""
        self._fleet.on_up = None
        self._waiting.clear()
        workers = tuple(self._workers)
        for worker in workers:
            worker.cancel()
        for worker in workers:
            with suppress(asyncio.CancelledError):
                await worker
        self._legs.close()

    def forget(self, backend: Backend) -> None:
        """A backend has left."""
        self._cool(backend)
        self._legs.forget(backend)

    def finished(self, record: RequestRecord) -> None:
        """A real request has ended: the pair it went through is warm."""
        handed_over = record.prefill and not record.fallback and record.first_token_reason != "whole"
        if self._on and handed_over and record.status == 200:
            self._warm.add((record.prefill, record.decode))

    def _cool(self, backend: Backend) -> None:
        """Whatever is at a backend's address now, nobody has shaken hands with it."""
        known = {other.url for other in self._fleet}
        self._warm = {pair for pair in self._warm if backend.url not in pair and known.issuperset(pair)}

    def _came_up(self, backend: Backend) -> None:
        self._cool(backend)
        if backend.role in ("mixed", "encode"):
            return
        own = self._fleet.pool(backend.role)
        pool = self._fleet.pool("decode" if backend.role == "prefill" else "prefill")
        others = [b for b in pool if usable(b) and b.group == backend.group]
        first = own.index(backend) * _PEERS  # newcomers that come together spread over their peers
        for number in range(min(_PEERS, len(others))):
            other = others[(first + number) % len(others)]
            prefill, decode = (backend, other) if backend.role == "prefill" else (other, backend)
            model = model_of(prefill, decode)
            if model is not None and self._fleet.pairing.pairs(prefill, decode, model or None):
                self._waiting[prefill.url, decode.url] = (prefill, decode)
        for _ in range(min(_AT_ONCE - len(self._workers), len(self._waiting))):
            worker = asyncio.create_task(self._work(), name="warm-up")
            self._workers.add(worker)
            worker.add_done_callback(self._workers.discard)

    async def _work(self) -> None:
        while self._waiting:
            pair = next(iter(self._waiting))
            prefill, decode = self._waiting.pop(pair)
            if pair in self._warm or not (usable(prefill) and usable(decode)):
                continue
            try:
                async with asyncio.timeout(_PATIENCE):
                    await self._warm_up(prefill, decode)
            except (GatewayError, TimeoutError) as error:
                log.debug("warming up %s and %s failed: %s", *pair, error or f"not done within {_PATIENCE:g} s")
            except Exception:
                log.exception("warming up %s and %s failed", *pair)  # a defect of ours; serving goes on without it
            else:
                self._warm.add(pair)
                log.debug("%s and %s are warm", *pair)

    async def _warm_up(self, prefill: Backend, decode: Backend) -> None:
        """Both legs of a request for one token.

        Raises:
            GatewayError: it did not get through.
        """
        members = {"prompt": f"{new_id()} {_PROMPT}", "max_tokens": 1, "temperature": 0}
        if model := model_of(prefill, decode):
            members["model"] = model
        body = read_body(msgspec.json.encode(members), "completions")
        request = Request(body, Nobody(), RequestRecord("completions"))
        connector = self._connectors[decode.connector]
        with Lease(decode, request.decode_tokens) as decode_lease, Lease(prefill, request.prefill_tokens) as lease:
            attempt = new_try(request, connector, lease, decode, callbacks=self._callbacks)
            if connector.called_back or attempt.plan.together:
                await self._together(attempt, prefill, lease, decode, decode_lease)
                return
            handoff, _ = attempt.plan.take(await self._legs.prefill(attempt, prefill, lease))
            lease.release()
            if handoff is None:
                return  # such an engine hands nothing over, and has no hand to shake
            remember(attempt, lease, handoff)
            attempt.limbo = Limbo(self._fleet, prefill, handoff, self._legs.bound(attempt.plan))
            try:
                await self._legs.decode_whole(attempt, decode, decode_lease)
            finally:
                attempt.limbo.close()

    async def _together(
        self, attempt: Try, prefill: Backend, lease: Lease, decode: Backend, decode_lease: Lease
    ) -> None:
        """Both legs at once, or prefill's when decode's engine has called."""
        plan = attempt.plan
        assert plan.handoff is not None
        attempt.limbo = Limbo(self._fleet, prefill, plan.handoff, self._legs.bound(plan))
        waits = plan.connector.called_back
        called = self._callbacks.expect(attempt.id, plan.connector, decode.url) if waits else nullcontext()
        try:
            with called as call:
                async with asyncio.TaskGroup() as legs:
                    legs.create_task(self._legs.decode_whole(attempt, decode, decode_lease))
                    if call is not None:
                        attempt.heard = await call.wait(_PATIENCE)
                    await self._legs.prefill(attempt, prefill, lease)
        finally:
            attempt.limbo.close()


def usable(backend: Backend) -> bool:
    """Whether a backend takes requests."""
    return backend.up and not backend.draining


def model_of(prefill: Backend, decode: Backend) -> str | None:
    """A model that both serve; empty where neither has named one, None where they have none in common."""
    if prefill.models is None or decode.models is None:
        return next(iter(prefill.models or decode.models or {}), "")
    return next((model for model in decode.models if model in prefill.models), None)
