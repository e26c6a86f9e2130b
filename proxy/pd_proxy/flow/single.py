"""One-leg routes: a request that makes no hand-off goes to one backend that can serve it, or to another if that fails.

Until the client has been given a byte, a failure leads to another try as long as the request is still here to be sent
again. Whatever ends a try, its lease is released and its connection closed or back in its pool.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from time import monotonic
from typing import Protocol

import msgspec

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
from pd_proxy.fleet.retry_budget import amplifies
from pd_proxy.flow.attempt import answering_leg
from pd_proxy.flow.hops import Hops
from pd_proxy.flow.legs import Legs
from pd_proxy.flow.request import EVENT_STREAM, leg_id
from pd_proxy.flow.suspicion import Cuts, Suspicion, warn
from pd_proxy.http.deadlines import Deadlines
from pd_proxy.http.response import ClientResponse, Headers
from pd_proxy.http.upload import Upload
from pd_proxy.placement.ask import Ask
from pd_proxy.placement.decide import choose
from pd_proxy.relay.passthrough import Passthrough
from pd_proxy.settings.tree import Settings
from pd_proxy.telemetry.records import RequestRecord, Stage

log = logging.getLogger("pd_proxy.flow")

_FIRST_BACKOFF = 0.05  # seconds before a backend that has just failed is tried again
_LONGEST_BACKOFF = 1.0
_MOST_REFUSAL = 64 * 1024  # bytes that are read of one

# Prompts without a decode phase are prefill's business, where they hold up no stream; so is tokenising, which prefill's
# API servers do all day, while those of decode have every token of every stream to write.
_PREFILL_LIKE: tuple[Role, ...] = ("mixed", "prefill", "decode")
# What generates text is decode's.
_DECODE_LIKE: tuple[Role, ...] = ("mixed", "decode", "prefill")


@dataclass(frozen=True, slots=True)
class Route:
    """A one-leg route.

    Attributes:
        endpoint: what metrics call it.
        roles: the pools that may serve it, the best first.
        computes: the model runs for it. How the others fare says nothing about that, so the breaker does not hear of
            them: an engine that only tokenises well would look fit.
        form: the request is a multipart form, and sent on as it comes.
    """

    endpoint: str
    roles: tuple[Role, ...] = _PREFILL_LIKE
    computes: bool = True
    form: bool = False


ROUTES: dict[str, Route] = {
    "/v1/chat/completions/batch": Route("batch", _DECODE_LIKE),
    "/v1/chat/completions/render": Route("render", computes=False),
    "/v1/completions/render": Route("render", computes=False),
    "/v1/messages/render": Route("render", computes=False),
    "/v1/responses/render": Route("render", computes=False),
    "/v1/embeddings": Route("embeddings"),
    "/v1/rerank": Route("rerank"),
    "/v2/rerank": Route("rerank"),
    "/rerank": Route("rerank"),
    "/v1/score": Route("score"),
    "/score": Route("score"),
    "/pooling": Route("pooling"),
    "/classify": Route("classify"),
    "/v1/moderations": Route("moderations"),
    "/v1/audio/transcriptions": Route("transcriptions", _DECODE_LIKE, form=True),
    "/v1/audio/translations": Route("translations", _DECODE_LIKE, form=True),
    "/tokenize": Route("tokenize", computes=False),
    "/detokenize": Route("detokenize", computes=False),
    "/v1/messages/count_tokens": Route("count_tokens", computes=False),
}


class Source(Protocol):
    """A request body that is still coming.

    Attributes:
        content_type: of what the engine gets.
        kept: all that has come so far, as long as it is short enough to be sent again; else None.
        model: the model that it asks for, once that has come.
        whole: it has all come.
    """

    @property
    def content_type(self) -> bytes: ...
    @property
    def kept(self) -> bytearray | None: ...
    @property
    def model(self) -> str | None: ...
    @property
    def whole(self) -> bool: ...

    async def more(self) -> bytes:
        """The next piece, which may be empty. Only while it is not whole.

        Raises:
            GatewayError, or what the surface uses for a client that has left.
        """


class SingleRequest(msgspec.Struct):
    """A client's request on its way.

    Attributes:
        path: the route, here and at the engine.
        body: JSON, or a form that is still coming.
        model: None where the request names none, or has not yet.
        tokens: what it puts on its backend, estimated.
        avoid: URLs of backends that failed it.
        cuts: the engines that may have died with it, where there are any.
        hops: the gateways that it has come through; empty where it came from a client.
    """

    path: str
    client: ClientResponse
    record: RequestRecord
    body: bytes | Source
    model: str | None
    tokens: int
    avoid: set[str] = msgspec.field(default_factory=set)
    cuts: Cuts | None = None
    hops: bytes = b""

    @property
    def route(self) -> Route:
        return ROUTES[self.path]

    @property
    def again(self) -> bool:
        """Whether it could be sent once more."""
        return isinstance(self.body, bytes) or self.body.kept is not None


class Single:
    """Serves one-leg requests over a fleet.

    Arguments:
        legs: whose connections it uses.
        random: a number in [0, 1), for ties and random policies.
        suspicion: says which requests no other engine is given.
    """

    def __init__(
        self, settings: Settings, fleet: Fleet, legs: Legs, random: Callable[[], float], suspicion: Suspicion
    ) -> None:
        self._attempts = settings.retries.attempts
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
            GatewayError: it has not; when `request.client.started`, it has a part of it.
        """
        tries, failed_leg = 0, ""
        error: BackendError | None = None
        noted: BackendError | None = None
        while True:
            backend = self._place(request, error)
            if error is not None and error is not noted:
                noted = error
                request.record.retries.append((failed_leg, error.reason))
                record = request.record
                log.info(
                    "%s try %d of %d failed: %s", record.request_id, tries, self._attempts, error, extra=record.known_as
                )
            request.record.reach(Stage.PREFILLING if answering_leg(backend) == "prefill" else Stage.DECODING)
            with self._permit(backend, error):
                if backend.url in request.avoid:
                    await asyncio.sleep(min(_FIRST_BACKOFF * 2.0 ** (tries - 1), _LONGEST_BACKOFF))
                try:
                    with Lease(backend, request.tokens if request.route.computes else 0) as lease:
                        if await self._try(request, backend, lease):
                            return
                except BackendError as failure:
                    tries += 1
                    error, failed_leg = failure, answering_leg(backend)
                    self._failed(request, backend, failure)
                    await self._spare_engines(request, failure)
                    if request.client.started or not failure.retryable or tries >= self._attempts or not request.again:
                        raise
            if not request.again:  # it has no such route, and said so late
                raise NoBackend(f"an engine without {request.path} was asked; the next is another", retry_after=1)

    async def _spare_engines(self, request: SingleRequest, error: BackendError) -> None:
        """After a try that failed with `error`.

        Raises:
            BackendsKilled: so many engines have ended while they had the request that no other is given it.
        """
        if request.cuts is None or not (ended := await self._suspicion.deadly(request.cuts)):
            return
        body = request.body
        killed = BackendsKilled(f"{len(ended)} engines ended while they had this request: {', '.join(ended)}")
        request.record.error = str(killed)
        warn(request.record, len(body if isinstance(body, bytes) else body.kept or b""), ended)
        raise killed from error

    def _permit(self, backend: Backend, error: BackendError | None) -> AbstractContextManager[object]:
        """Leave for a try that follows `error`, so that retries never amplify an overload.

        Raises:
            BackendError: `error`, where the pool's budget is used up.
        """
        if error is None or not amplifies(error):
            return nullcontext()
        permit = self._fleet.budgets.take(backend.role)
        if permit is None:
            raise error
        return permit

    def _place(self, request: SingleRequest, error: BackendError | None) -> Backend:
        """Where the next try goes: the best pool's that has not failed the request; else the best that has.

        Raises:
            NoBackend, RouteNotFound: nobody that is up could serve it; nobody that there is has the route.
            BackendError: the last try's, where it says more.
        """
        found = [
            [b for b in self._fleet.candidates(role, request.model, request.tokens) if b.offers(request.path)]
            for role in request.route.roles
        ]
        fresh = [[b for b in pool if b.url not in request.avoid] for pool in found]
        candidates = next(filter(None, fresh), None) or next(filter(None, found), None)
        if candidates is None:
            if error is not None:
                raise error
            raise self._nobody(request)
        self._turn += 1
        role, tokens = candidates[0].role, request.tokens
        ask = Ask(self._random, self._turn, monotonic(), tokens, tokens)
        backend = choose(candidates, role, self._policies[role], ask)
        request.record.placed(backend.role, backend.url)
        return backend

    def _nobody(self, request: SingleRequest) -> NoBackend | RouteNotFound:
        """Why nobody could serve a request."""
        serving = [b for b in self._fleet if b.serves(request.model)]
        if serving and not any(b.offers(request.path) for b in serving):
            whose = "no engine here" if request.model is None else f"no engine that serves {request.model[:256]!r}"
            return RouteNotFound(f"{whose} offers {request.path}")
        return NoBackend(f"no backend that offers {request.path} is up", retry_after=1)

    async def _try(self, request: SingleRequest, backend: Backend, lease: Lease) -> bool:
        """One try on one backend.

        Returns False where it has no such route.

        Raises:
            BackendError: it failed.
        """
        record, body = request.record, request.body

        def begin() -> Headers:
            lease.on_lost = None  # from here on the stream itself knows best whether it is alive
            record.status = 200
            record.reach(Stage.STREAMING)
            return [_request_id(record), *EVENT_STREAM]

        passthrough = Passthrough(
            backend.url,
            request.client,
            begin,
            limit=self._answer_limit,
            first=self._audio_limit if request.route.form else self._whole_limit,
            idle=self._idle_limit,
        )
        origin = self._legs.origin(backend)
        record.leg = leg_id(record.request_id)
        headers = b"x-request-id: %b\r\n%b%b" % (
            record.leg.encode("ascii"),
            self._legs.headers_after(request.hops),
            record.trace,
        )
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
        if passthrough.streamed:
            request.client.end()
        else:
            answer, usage = passthrough.whole()
            if counted := read_usage(usage):
                record.prompt_tokens = counted.prompt_tokens or 0
                record.tokens = counted.completion_tokens or 0
                record.cached_tokens = counted.cached_tokens
            record.status = 200
            request.client.respond(200, [_request_id(record), *passthrough.passed_headers()], answer)
        if request.route.computes:
            self._fleet.succeeded(backend, answering_leg(backend))
        return True

    async def _send_on(
        self, request: SingleRequest, source: Source, backend: Backend, upload: Upload, passthrough: Passthrough
    ) -> None:
        """Send a form as it comes, and wait for the answer, which may come before the form's end."""
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
                pump.exception()  # it has been seen, or the answer matters more

    async def _pump(self, request: SingleRequest, source: Source, backend: Backend, upload: Upload) -> None:
        """Send a form as it comes.

        Raises:
            BackendTimedOut: the engine does not read.
            GatewayError: the client's doing.
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
        """A form's model, known only when a backend had been chosen.

        Raises:
            ModelNotFound, InvalidRequest: that backend does not serve it.
        """
        if backend.serves(model):
            return
        if not self._fleet.knows(model):
            raise ModelNotFound(f"The model `{model[:256]}` does not exist.", param="model")
        raise InvalidRequest("a long form must have its `model` before its file", param="model")

    def _failed(self, request: SingleRequest, backend: Backend, error: BackendError) -> None:
        request.avoid.add(backend.url)
        request.cuts = self._suspicion.noted(request.cuts, answering_leg(backend), backend, error)
        request.record.error = str(error)
        if isinstance(error, BackendLacksModel) and request.model is not None:
            self._fleet.has_lost(backend, request.model)
        if request.route.computes and isinstance(error, BackendRejected):
            self._fleet.succeeded(backend, answering_leg(backend))  # an engine that judges requests is alive
        elif request.route.computes or isinstance(error, BackendUnreachable | BackendLost):
            self._fleet.failed(backend, error, answering_leg(backend))


def _request_id(record: RequestRecord) -> tuple[bytes, bytes]:
    return b"x-request-id", record.request_id.encode("ascii")


def _lacks_route(status: int, body: bytes) -> bool:
    """Whether an engine's refusal is of the route and not of the request. That of a model, which is a 404 too, has a
    message that names it."""
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
