"""Serves the one-leg routes: a request without a hand-off goes to one backend, and to another if that fails.

Until the client has been sent a byte, a failure leads to another try, as long as the whole request is kept. When a try
ends, its lease is released and its connection closed or back in its pool.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from time import monotonic

from pd_proxy.decoding import Undecodable, decode_json
from pd_proxy.dialects.engine_errors import engine_error
from pd_proxy.dialects.usage import read_usage
from pd_proxy.errors import (
    BackendError,
    BackendLacksModel,
    BackendLost,
    BackendRejected,
    BackendsKilled,
    BackendTimedOut,
    BackendUnreachable,
    InvalidRequest,
    ModelNotFound,
    NoBackend,
    RouteNotFound,
)
from pd_proxy.fleet.backend import Backend, Lease, Role
from pd_proxy.fleet.fleet import Fleet
from pd_proxy.fleet.retry_budget import Permit
from pd_proxy.flow.attempt import answering_leg
from pd_proxy.flow.hops import Hops
from pd_proxy.flow.legs import Legs
from pd_proxy.flow.request import leg_id
from pd_proxy.flow.retry import Job, Retries, backoff
from pd_proxy.flow.single_request import SingleRequest, Source
from pd_proxy.flow.suspicion import Cuts, Suspicion
from pd_proxy.http.deadlines import Deadlines
from pd_proxy.http.upload import Upload
from pd_proxy.placement.ask import Ask
from pd_proxy.placement.decide import choose
from pd_proxy.relay.passthrough import Passthrough
from pd_proxy.settings.tree import Settings
from pd_proxy.telemetry.records import RequestRecord, Stage

log = logging.getLogger("pd_proxy.flow")

_MOST_REFUSAL = 64 * 1024  # bytes that are read of one


class Single:
    """Serves one-leg requests over a fleet.

    Arguments:
        legs: has the connections.
        random: returns a number in [0, 1), for ties and random policies.
        suspicion: decides which requests must not go to another engine.
    """

    def __init__(
        self, settings: Settings, fleet: Fleet, legs: Legs, random: Callable[[], float], suspicion: Suspicion
    ) -> None:
        self._retries = Retries(settings.retries.attempts, fleet, suspicion)
        self._policies = {role: getattr(settings.policy, role) for role in ("prefill", "decode", "mixed")}
        self._answer_limit = settings.limits.answer
        self._idle_seconds = settings.timeouts.idle
        self._whole_limit = Deadlines(settings.timeouts.prefill)
        self._audio_limit = Deadlines(settings.timeouts.first_token)
        self._idle_limit = Deadlines(settings.timeouts.idle)
        self._fleet = fleet
        self._legs = legs
        self._suspicion = suspicion
        self._random = random
        self._turn = 0

    @property
    def hops(self) -> Hops:
        """Says which requests have come back."""
        return self._legs.hops

    async def run(self, request: SingleRequest) -> None:
        """Serve a request: the client has its whole answer when this returns.

        Raises:
            GatewayError: the client has no answer; or a part of it, where `request.client.started`.
        """
        try:
            await self._retries.run(_Tries(self, request))
        finally:
            request.give_permit_back()

    async def attempt(self, request: SingleRequest, tries: int) -> bool:
        """Place and run one try of a request. Returns False if the backend has no such route.

        Raises:
            BackendError: the try failed.
            NoBackend: the backend has no such route, and the request cannot be sent again.
        """
        backend = request.backend = self._place(request)
        if request.retried is not None:
            request.record.retries.append(request.retried)
            request.retried = None
        request.record.reach(Stage.PREFILLING if answering_leg(backend) == "prefill" else Stage.DECODING)
        if backend.url in request.avoid:
            await asyncio.sleep(backoff(tries))
        with Lease(backend, request.tokens if request.route.computes else 0) as lease:
            if await self._try(request, backend, lease):
                return True
        if not request.again:
            raise NoBackend(f"an engine without {request.path} was asked; the next is another", retry_after=1)
        return False

    def _place(self, request: SingleRequest) -> Backend:
        """Choose the backend of the next try: from the best pool that has one which has not failed the request; if none
        has, from the best pool.

        Raises:
            NoBackend, RouteNotFound: no backend that is up can serve it; no backend at all has the route.
            BackendError: no backend is left; the error of the last try.
        """
        found = [
            [b for b in self._fleet.candidates(role, request.model, request.tokens) if b.offers(request.path)]
            for role in request.route.roles
        ]
        fresh = [[b for b in pool if b.url not in request.avoid] for pool in found]
        candidates = next(filter(None, fresh), None) or next(filter(None, found), None)
        if candidates is None:
            if request.error is not None:
                request.unplaceable = True
                raise request.error
            raise self._nobody(request)
        self._turn += 1
        role, tokens = candidates[0].role, request.tokens
        ask = Ask(self._random, self._turn, monotonic(), tokens, tokens)
        backend = choose(candidates, role, self._policies[role], ask)
        request.record.placed(backend.role, backend.url)
        return backend

    def _nobody(self, request: SingleRequest) -> NoBackend | RouteNotFound:
        """The error for a request that no backend can serve."""
        serving = [b for b in self._fleet if b.serves(request.model)]
        if serving and not any(b.offers(request.path) for b in serving):
            whose = "no engine here" if request.model is None else f"no engine that serves {request.model[:256]!r}"
            return RouteNotFound(f"{whose} offers {request.path}")
        return NoBackend(f"no backend that offers {request.path} is up", retry_after=1)

    async def _try(self, request: SingleRequest, backend: Backend, lease: Lease) -> bool:
        """Run one try on one backend. Returns False if it has no such route.

        Raises:
            BackendError: the try failed.
        """
        body = request.body

        def begin() -> None:
            lease.on_lost = None  # from here on the stream is checked itself
            request.begin_stream()

        passthrough = Passthrough(
            backend.url,
            request.client,
            begin,
            limit=self._answer_limit,
            first=self._audio_limit if request.route.form else self._whole_limit,
            idle=self._idle_limit,
        )
        origin = self._legs.origin(backend)
        headers = self._headers(request)
        try:
            if isinstance(body, bytes):
                passthrough.connection = await origin.send(request.path, headers, (body,), passthrough)
                lease.on_lost = passthrough.fail
                passthrough.sent()
                await passthrough.answered
            else:
                upload = await Upload.open(origin, request.path, body.content_type, headers, passthrough)
                passthrough.connection = upload
                lease.on_lost = passthrough.fail
                await self._send_on(request, body, backend, upload, passthrough)
        finally:
            passthrough.abort()
        if passthrough.status != 200:
            if _lacks_route(passthrough.status, passthrough.body):
                backend.lacks.add(request.path)
                return False
            raise engine_error(backend.url, passthrough.status, passthrough.headers, passthrough.body)
        self._answer(request, passthrough)
        if request.route.computes:
            self._fleet.succeeded(backend, answering_leg(backend))
        return True

    def _headers(self, request: SingleRequest) -> bytes:
        """The headers of a new leg, as whole lines."""
        record = request.record
        record.leg = leg_id(record.request_id)
        own = self._legs.headers_after(request.hops)
        return b"x-request-id: %b\r\n%b%b" % (record.leg.encode("ascii"), own, record.trace)

    def _answer(self, request: SingleRequest, passthrough: Passthrough) -> None:
        """End the client's stream, or send it the engine's answer in one piece."""
        record = request.record
        if passthrough.streamed:
            request.client.end()
        else:
            answer, usage = passthrough.whole()
            if counted := read_usage(usage):
                record.prompt_tokens = counted.prompt_tokens or 0
                record.tokens = counted.completion_tokens or 0
                record.cached_tokens = counted.cached_tokens
            record.status = 200
            request.client.respond(200, request.headers(*passthrough.passed_headers()), answer)

    async def _send_on(
        self, request: SingleRequest, source: Source, backend: Backend, upload: Upload, passthrough: Passthrough
    ) -> None:
        """Send a form as it arrives, and wait for the answer, which may come before the end of the form."""
        pump = asyncio.create_task(self._pump(request, source, backend, upload))
        try:
            await asyncio.wait((pump, passthrough.answered), return_when=asyncio.FIRST_COMPLETED)
            if not passthrough.answered.done():
                await pump  # whose error is the request's
                passthrough.sent()
            await passthrough.answered
        finally:
            pump.cancel()
            await asyncio.wait((pump,))
            if not pump.cancelled():
                pump.exception()  # it has been raised, or the answer matters more

    async def _pump(self, request: SingleRequest, source: Source, backend: Backend, upload: Upload) -> None:
        """Send a form as it arrives.

        Raises:
            BackendTimedOut: the engine does not read.
            GatewayError: the client's form is wrong, or the client has left.
        """
        piece: bytes = bytes(source.kept or b"")
        while True:
            if piece:
                try:
                    async with asyncio.timeout(self._idle_seconds):
                        await upload.write(piece)
                except TimeoutError:
                    raise BackendTimedOut(f"{backend.url} read nothing for {self._idle_seconds:g} s") from None
            if source.whole:
                break
            piece = await source.more()
            if request.model is None and (model := source.model) is not None:
                request.model = request.record.model = model
                self._check_late_model(model, backend)
        upload.finish()

    def _check_late_model(self, model: str, backend: Backend) -> None:
        """Check the model of a form, which became known after the backend had been chosen.

        Raises:
            ModelNotFound, InvalidRequest: the backend does not serve it.
        """
        if backend.serves(model):
            return
        if not self._fleet.knows(model):
            raise ModelNotFound(f"The model `{model[:256]}` does not exist.", param="model")
        raise InvalidRequest("a long form must have its `model` before its file", param="model")

    async def spare_engines(self, job: Job, error: BackendError) -> None:
        """As `Retries.spare_engines`."""
        await self._retries.spare_engines(job, error)

    def failed(self, request: SingleRequest, error: BackendError) -> None:
        """A try of a request has failed: note that, and report it to the fleet."""
        backend = request.backend
        assert backend is not None
        request.avoid.add(backend.url)
        request.cuts = self._suspicion.note(request.cuts, answering_leg(backend), backend, error)
        request.record.error = str(error)
        if isinstance(error, BackendLacksModel) and request.model is not None:
            self._fleet.lost_model(backend, request.model)
        if request.route.computes and isinstance(error, BackendRejected):
            self._fleet.succeeded(backend, answering_leg(backend))  # an engine that refuses a request is alive
        elif request.route.computes or isinstance(error, BackendUnreachable | BackendLost):
            self._fleet.failed(backend, error, answering_leg(backend))


class _Tries:
    """A one-leg request, as a `retry.Job`."""

    __slots__ = ("_request", "_single")
    waits_for_permit = False

    def __init__(self, single: Single, request: SingleRequest) -> None:
        self._single = single
        self._request = request

    @property
    def record(self) -> RequestRecord:
        return self._request.record

    @property
    def cuts(self) -> Cuts | None:
        return self._request.cuts

    @property
    def size(self) -> int:
        body = self._request.body
        return len(body if isinstance(body, bytes) else body.kept or b"")

    @property
    def answering(self) -> bool:
        return self._request.client.started

    @property
    def repeatable(self) -> bool:
        return self._request.again and not self._request.unplaceable

    def attempt(self, tries: int) -> Awaitable[bool]:
        return self._single.attempt(self._request, tries)

    def failed(self, error: BackendError) -> None:
        request = self._request
        request.give_permit_back()
        if error is not request.error:  # it is the same where no backend was left for the next try
            request.error = error
            self._single.failed(request, error)

    async def resume(self, error: BackendError) -> bool:
        await self._single.spare_engines(self, error)
        raise error

    @property
    def failed_pool(self) -> Role:
        assert self._request.backend is not None
        return self._request.backend.role

    def hold(self, permit: Permit) -> None:
        self._request.permit = permit

    def note_retry(self, error: BackendError) -> None:
        assert self._request.backend is not None
        self._request.retried = answering_leg(self._request.backend), error.reason

    def given_up(self, error: BackendError) -> Exception:
        return error

    def killed(self, error: BackendsKilled) -> None: ...


def _lacks_route(status: int, body: bytes) -> bool:
    """Whether an engine has refused the route and not the request. A refusal of the model is a 404 too, but has a
    message that names the model."""
    if status in (405, 501):
        return True
    if status != 404:
        return False
    try:
        answer = decode_json(body[:_MOST_REFUSAL])
    except Undecodable:
        return True  # a web server's own
    error = answer.get("error") if isinstance(answer, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    if not isinstance(message, str):
        return True  # FastAPI's own has a `detail`
    said = message.strip(" .").lower()
    return said in ("", "not found", "file not found") or said.startswith("invalid url")
