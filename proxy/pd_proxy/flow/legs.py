"""The legs of one try: send, wait, and tell the fleet how it went.

Whatever ends a leg (an answer, an error, a client that left), its connection is closed or back in its pool, and its
lease released, before the function returns.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable
from functools import partial
from math import inf
from time import monotonic
from typing import Literal

import msgspec

from pd_proxy.decoding import Undecodable, json_decoder
from pd_proxy.dialects.aborts import abort_in, aborted, ends_well
from pd_proxy.dialects.answers import (
    Usage,
    WholeAnswer,
    engine_error,
    engine_error_event,
    read_usage,
    read_whole,
    reason_of,
    strip_handoff,
)
from pd_proxy.dialects.cache_counts import CacheCounts
from pd_proxy.dialects.edit import Edit
from pd_proxy.dialects.prompt_logprobs import PromptLogprobs
from pd_proxy.dialects.registry import DIALECTS
from pd_proxy.errors import (
    BackendAnswered,
    BackendError,
    BackendGarbled,
    BackendPreempted,
    BackendRejected,
    HandoffExpired,
    HandoffUnconfirmed,
)
from pd_proxy.fleet.backend import Backend, Lease
from pd_proxy.fleet.fleet import Fleet
from pd_proxy.fleet.health.identity import EngineIdentity
from pd_proxy.fleet.judge import Judge
from pd_proxy.fleet.outlier.statistics import LegName
from pd_proxy.fleet.zmq.notifications import TransferNotifications
from pd_proxy.flow.callbacks import Callbacks
from pd_proxy.flow.hops import Hops
from pd_proxy.flow.prompts import Sent
from pd_proxy.flow.request import Request, leg_id, new_id
from pd_proxy.handoff.connector import Connector, Handoff
from pd_proxy.handoff.first_token import FirstToken
from pd_proxy.handoff.opening import joined_answer
from pd_proxy.handoff.plan import Leg, Plan
from pd_proxy.handoff.reuse import reusable
from pd_proxy.http.client import Collected, Connection, Origin, Receiver
from pd_proxy.http.deadlines import Deadlines
from pd_proxy.relay.stream import StreamRelay
from pd_proxy.requests.continuation import Continuation
from pd_proxy.requests.endpoints import LAYOUTS, Members
from pd_proxy.settings.tree import Settings
from pd_proxy.telemetry.records import Telemetry

EVENT_STREAM = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx in front would hold tokens back otherwise
)
_ASIDE = 5.0  # seconds for what is not the request itself: claiming a hand-off that nobody wants, or a tokenizer's help
_MOST_ASIDE = 4 * 1024 * 1024  # bytes of an answer to it
_NO_LIMIT = Deadlines(None)
JSON = (b"content-type", b"application/json")


class PendingHandoff:
    """A hand-off that decode has not yet begun to use; counted while it is so.

    Arguments:
        bound: seconds of age at which it is no longer sent.
    Attributes:
        prefill: whose blocks it names.
        since: when prefill answered, as `time.monotonic`; when its leg was made, as long as it has not.
        use: what decode has made of it. While one may be `reading`, nobody else may: prefill frees blocks that were
            read, and what a second reader finds in them is another request's, with nothing to show it. `refused`: it
            was sent, and answered with an error. `freed`: with one by which the engine has had prefill free its blocks.
        open: nobody has said yet that it is settled.
    """

    __slots__ = ("_fleet", "bound", "handoff", "open", "prefill", "since", "use")

    def __init__(self, fleet: Fleet, prefill: Backend, handoff: Handoff, bound: float) -> None:
        self._fleet = fleet
        self.bound = bound
        self.open = True
        self.prefill = prefill
        self.handoff = handoff
        self.since = monotonic()
        self.use: Literal["none", "reading", "refused", "freed"] = "none"
        fleet.handoffs_pending += 1
        prefill.open_handoffs += 1

    def sent(self) -> None:
        """A leg that refers to it has gone out."""
        self.use = "reading"

    def close(self) -> None:
        if self.open:
            self.open = False
            self._fleet.handoffs_pending -= 1
            self.prefill.open_handoffs -= 1
            if self.prefill.removed:
                self.prefill.attention.set()  # its watcher forgets it when this was the last


class Try(msgspec.Struct):
    """One try of one request.

    Attributes:
        id: the X-Request-Id of both its legs.
        alias: what clients are shown instead, where that names engines' addresses; else empty.
        limbo: the hand-off between them; None before prefill's answer, and when decode goes without.
        facts: of the prefill and the decode engine, where prefill's token may become the client's first.
        decode: the backend that the latter are of.
        first: that token, once prefill has given it and it is to be used.
        rest: the plan for what comes behind it.
        counts: of the prompt, as prefill says them; nothing is known before its answer.
        runs_out: its prefill leg, where that goes on without it.
        heard: what decode's engine has called back with, for its prefill leg.
        logprobs: of the prompts, as prefill says them, where the client's answer is to have them and decode's has none.
        sent: its prompt at its engines, where anybody wants to know.
        paced: somebody wants to know how fast its tokens come.
    """

    request: Request
    plan: Plan
    id: str
    limbo: PendingHandoff | None = None
    facts: tuple[EngineIdentity, EngineIdentity] | None = None
    decode: Backend | None = None
    first: FirstToken | None = None
    rest: Plan | None = None
    counts: CacheCounts = CacheCounts()
    runs_out: asyncio.Task[None] | None = None
    alias: str = ""
    heard: Members | None = None
    logprobs: PromptLogprobs | None = None
    sent: Sent | None = None
    paced: bool = False

    @property
    def identity(self) -> dict[str, msgspec.Raw] | None:
        """Members that its answer's events are to have instead of their own, where these are not for clients."""
        if not self.alias:
            return None
        kind = "chatcmpl" if self.request.body.endpoint == "chat" else "cmpl"
        return {"id": msgspec.Raw(f'"{kind}-{self.alias}"'.encode())}

    def decode_leg(self) -> Leg:
        return (self.rest or self.plan).decode_leg(None if self.limbo is None else self.limbo.handoff)

    @property
    def continuation(self) -> Continuation | None:
        """Where its decode leg goes on, when a part of the answer has been given."""
        return (self.rest or self.plan).continuation

    def goes_to(self, decode: Backend) -> None:
        """Its hand-off goes to another decode backend than it was made for."""
        if self.request.stored is not None:
            self.plan.answer_id = _answer_id(self.request, decode)
            self.request.record.answer = LAYOUTS[self.request.body.endpoint].id_prefix + self.plan.answer_id

    def decode_is_as_known(self) -> bool:
        """Whether the decode engine is surely the one that `facts` are of."""
        return self.facts is not None and self.decode is not None and self.decode.facts is self.facts[1]

    def handed_over_counts(self) -> CacheCounts | None:
        """`counts`, where decode was handed anything; else None, and decode's own are right."""
        return None if self.limbo is None else self.counts

    def prompt_tokens(self, usage: Usage) -> int:
        """Tokens of the client's prompt: a leg that goes on with an answer has what was said in its own."""
        continuation, counted = (self.rest or self.plan).continuation, usage.prompt_tokens or 0
        return counted if continuation is None else max(0, counted - continuation.said)

    def note_usage(self, usage: Usage, said: int) -> None:
        """Keep decode's usage in the record.

        Arguments:
            said: tokens of the answer that it takes for prompt.
        """
        record, counted = self.request.record, usage.prompt_tokens or 0
        record.prompt_tokens = prompt = counted - said if counted > said else 0
        cached = usage.cached_tokens if self.limbo is None else self.counts.cached or 0
        record.cached_tokens = cached if cached < prompt else prompt
        if self.sent is not None and self.limbo is None:
            told = usage.prompt_tokens_details
            self.sent.counted(None if said or told is None else told.cached_tokens, counted)

    def check(self) -> None:
        """Called with a connection at hand, just before a leg is written to it.

        Raises:
            HandoffExpired: behind a first token: the engine may be another than the one whose blocks were counted on.
        """
        if not self.decode_is_as_known():
            raise HandoffExpired("the decode engine may not be the one that it was", unread=True, blame=False)


def new_try(
    request: Request,
    connector: Connector,
    prefill: Lease | None,
    decode: Backend,
    *,
    token_ids: bool = False,
    facts: tuple[EngineIdentity, EngineIdentity] | None = None,
    callbacks: Callbacks | None = None,
    reuse: bool = False,
) -> Try:
    """A try on a pair, or on one backend.

    Arguments:
        prefill: the lease for the prefill leg, where there is one.
        token_ids: ask decode for the ids of the tokens.
        callbacks: where engines call back, for connectors by which they do.
        reuse: decode may take the prompt's ids from prefill.
    """
    record, rendezvous = request.record, None
    name = new_id() if connector.traits.own_request_ids else leg_id(record.request_id)
    if prefill is not None and connector.traits.called_back:
        assert callbacks is not None
        name, rendezvous = callbacks.name(), connector.callback_params(callbacks.url)
    elif prefill is not None and connector.traits.negotiates:
        rendezvous = connector.negotiate(prefill.backend.coordinates, decode.coordinates, name, prefill.rank)
        own, name = name, rendezvous.id or name
        if request.body.prompts:
            rendezvous = connector.per_prompt(rendezvous, request.body.prompts, prefill.backend.coordinates.dp)
    plan = Plan(
        request.body,
        connector,
        request.continuation,
        rendezvous=rendezvous,
        token_ids=token_ids,
        first_token=facts is not None,
        answer_id=_answer_id(request, decode) if LAYOUTS[request.body.endpoint].id_member else "",
        reuse=reuse and prefill is not None and connector.traits.reuses_prompt_ids and reusable(request.body),
    )
    alias = own if rendezvous is not None and rendezvous.id else ""
    record.leg = name
    record.answer = LAYOUTS[request.body.endpoint].id_prefix + plan.answer_id if plan.answer_id else ""
    return Try(request, plan, name, facts=facts, decode=decode, alias=alias)


def _answer_id(request: Request, decode: Backend) -> str:
    """What an answer of `decode`'s is to be called. It goes to the client, so it is not the legs' own id."""
    if request.stored is None:
        return leg_id(request.record.request_id)
    return request.stored.name(new_id(), decode.url, request.record.client)


def remember(attempt: Try, prefill: Lease, handoff: Handoff | None) -> None:
    """Prefill has answered: keep what it says of its engine's coordinates, where the legs had need of it."""
    plan = attempt.plan
    if handoff is None or not plan.connector.traits.negotiates or plan.handoff is not None:
        return
    backend = prefill.backend
    located = plan.connector.remember(backend.coordinates, handoff, prefill.rank)
    if located != backend.coordinates:
        backend.remember(located)


def leg_of(backend: Backend) -> LegName:
    """What a leg that answers the client is to a backend: a prefill backend answers those who want one token."""
    return "prefill" if backend.role == "prefill" else "decode"


def _heard(attempt: Try, lease: Lease, relay: StreamRelay) -> None:
    """Decode's first token is here: it has what it was handed."""
    sent = attempt.sent
    if (limbo := attempt.limbo) is not None:
        now = monotonic()
        attempt.request.record.handoff_seconds = seconds = now - limbo.since
        if sent is not None:
            lease.backend.speeds.handed_over(seconds, attempt.request.prefill_tokens, now)
        limbo.close()
    if sent is not None:
        sent.heard()
    lease.on_lost = relay.doubt  # from here on the stream itself knows best whether it is alive


def _begin(attempt: Try, relay: StreamRelay) -> None:
    """The first of decode's tokens with something to read is here, and about to go out."""
    now = monotonic()
    request, record = attempt.request, attempt.request.record
    request.began()
    if record.first_token is not None:
        before = record.last_token or now
        if request.continuation is not None:
            record.resume_gaps.append(now - before)
        else:
            record.handoff_gap = now - before
        if record.first_token_from == "prefill":
            record.second_token = record.second_token or now
    if not request.client.started:
        record.status = 200
        record.stage = "stream"
        record.first_token = now
        request.client.start(200, request.headers(*EVENT_STREAM))


_PREEMPTED = b'"stop_reason":"recomputed"'
_REASONS = re.compile(rb'"reasoning(?:_content)?":"[^"]')


def _is_failure(answer: WholeAnswer) -> bool:
    """Whether an answer without choices is an error, and not one of another endpoint."""
    error = bytes(memoryview(answer.error)[:4]) not in (b"", b"null")
    return error and not memoryview(answer.content) and not memoryview(answer.output)


class _Detokenized(msgspec.Struct):
    prompt: str


_decode_text = json_decoder(_Detokenized)


class Legs:
    """Sends legs to backends over their pooled connections.

    Arguments:
        fleet: is told how legs went.
        notices: by which prefill engines say that a KV cache has arrived.
    Attributes:
        authorization: the line that shows engines their key, or nothing.
        headers: what every leg of a client's request carries, as whole lines.
        hops: by which requests that have come back are known.
    """

    def __init__(
        self,
        settings: Settings,
        fleet: Judge,
        telemetry: Telemetry,
        notices: TransferNotifications,
        hops: Hops | None = None,
    ) -> None:
        self._settings = settings
        self._notices = notices
        self._timeouts = settings.timeouts
        self._prefill_limit = Deadlines(settings.timeouts.prefill)
        self._first_token_limit = Deadlines(settings.timeouts.first_token)
        self._aside_limit = Deadlines(_ASIDE)
        self._running_loop: asyncio.AbstractEventLoop | None = None
        self._fleet = fleet
        self._telemetry = telemetry
        self._origins: dict[str, Origin] = {}
        key = settings.backend_api_key
        self.authorization = b"" if key is None else b"authorization: Bearer %b\r\n" % key.get_secret_value().encode()
        self.hops = hops or Hops()
        self._identity = b"accept-encoding: identity\r\n" + self.authorization
        self.headers = self._identity + self.hops.line

    def headers_after(self, hops: bytes) -> bytes:
        """What a leg carries, as whole lines.

        Arguments:
            hops: the gateways that its request has come through.
        """
        return self._identity + self.hops.onward(hops) if hops else self.headers

    def close(self) -> None:
        """Close idle connections."""
        for origin in self._origins.values():
            origin.close()

    def forget(self, backend: Backend) -> None:
        """A backend has left the fleet."""
        if origin := self._origins.pop(backend.url, None):
            origin.close()

    def origin(self, backend: Backend) -> Origin:
        """The connections to a backend."""
        origin = self._origins.get(backend.url)
        if origin is None:
            origin = self._origins[backend.url] = Origin(backend.url, connect_timeout=self._timeouts.connect)
        return origin

    async def prefill(self, attempt: Try, backend: Backend, lease: Lease) -> bytes:
        """The prefill leg; returns the engine's answer, once its KV cache has arrived where it sends notices of that.

        Raises:
            BackendError: it did not end in a 200 within `timeouts.prefill`.
            HandoffUnconfirmed: its notices did not come within `timeouts.notice`.
        """
        leg, count = attempt.plan.prefill_leg(attempt.heard), attempt.plan.notices
        if not count:
            return self._unless_aborted(
                attempt, backend, await self._collect(backend, lease, "prefill", leg, attempt, self._prefill_limit)
            )
        with self._notices.expect(attempt.id, count) as expected:  # they may come before the answer
            answer = self._unless_aborted(
                attempt, backend, await self._collect(backend, lease, "prefill", leg, attempt, self._prefill_limit)
            )
            lease.on_lost = expected.lost
            seconds = self._timeouts.notice
            if not await expected.all(seconds):
                unconfirmed = HandoffUnconfirmed(
                    f"{backend.url} did not say within {seconds:g} s that its KV cache has arrived "
                    f"({expected.missing} of {count} notices are missing)"
                )
                self._note(backend, unconfirmed, "prefill", attempt)
                raise unconfirmed
        return answer

    def _unless_aborted(self, attempt: Try, backend: Backend, answer: bytes) -> bytes:
        """Prefill's answer.

        Raises:
            BackendError: its engine ended the request before its time, and keeps nothing.
        """
        dialect = DIALECTS.get(attempt.request.body.endpoint)
        if dialect is None and ends_well(answer):
            return answer
        try:
            parsed = read_whole(answer) if dialect is None else dialect.whole(answer)
        except Undecodable:
            return answer  # the plan says what is wrong with it
        reason = abort_in(parsed.choices) if dialect is None else dialect.aborted_whole(parsed)
        if reason is None or _is_failure(parsed):
            return answer
        ended = aborted(backend.url, reason)
        self._note(backend, ended, "prefill", attempt)
        raise ended

    async def encode(self, attempt: Try, backend: Backend, lease: Lease, leg: Leg, number: int) -> bytes:
        """One of a try's legs to encoders; returns the engine's answer.

        Arguments:
            number: of the leg, which has an id of its own.
        Raises:
            BackendError: it did not end in a 200 within `timeouts.prefill`.
        """
        child = msgspec.structs.replace(attempt, id=f"{attempt.id}:{number}")
        return await self._collect(backend, lease, "encode", leg, child, self._prefill_limit)

    async def decode_whole(self, attempt: Try, backend: Backend, lease: Lease) -> None:
        """The decode leg of a request that wants its answer in one piece."""
        request, record = attempt.request, attempt.request.record
        leg = leg_of(backend)
        answer = await self._collect(backend, lease, leg, attempt.decode_leg(), attempt, _NO_LIMIT)
        dialect = DIALECTS.get(request.body.endpoint)
        try:
            parsed = read_whole(answer) if dialect is None else dialect.whole(answer)
        except Undecodable as error:
            garbled = BackendGarbled(f"{backend.url} answered 200 with what is no answer: {error}")
            self._note(backend, garbled, leg, attempt)
            raise garbled from None
        mark = _PREEMPTED if dialect is None else dialect.preempted
        if mark and mark in answer:
            preempted = BackendPreempted(f"{backend.url} gave the request up for want of memory")
            self._note(backend, preempted, leg, attempt)
            raise preempted
        flaw = reason_of(parsed, LAYOUTS[request.body.endpoint].answer)
        reason = abort_in(parsed.choices) if dialect is None else dialect.aborted_whole(parsed)
        if reason is not None and not flaw and not _is_failure(parsed):
            ended = aborted(backend.url, reason)
            self._note(backend, ended, leg, attempt)
            raise ended
        if (flaw or not memoryview(parsed.choices)) and _is_failure(parsed):
            said = answer if dialect is None else b'{"error":%b}' % bytes(parsed.error)
            failed = engine_error_event(backend.url, said)
            self._note(backend, failed, leg, attempt)
            raise failed
        if flaw:
            garbled = BackendGarbled(f"{backend.url} answered 200 with what is no answer: {flaw}")
            self._note(backend, garbled, leg, attempt)
            raise garbled
        if dialect is not None and attempt.logprobs is not None:
            await attempt.logprobs.here
            try:
                answer = attempt.logprobs.whole(answer)
            except BackendGarbled as error:
                garbled = BackendGarbled(f"{backend.url}: {error}")
                self._note(backend, garbled, leg, attempt)
                raise garbled from None
        if attempt.first is not None:
            try:
                answer = joined_answer(attempt.first, answer, request.body, Edit(said=1).merge)
                parsed = read_whole(answer)
            except ValueError as error:
                garbled = BackendGarbled(f"{backend.url} answered 200 with what is no answer: {error}")
                self._note(backend, garbled, leg, attempt)
                raise garbled from None
        if attempt.alias:
            answer = answer.replace(attempt.id.encode(), attempt.alias.encode())
        if (counts := attempt.handed_over_counts()) is not None:
            answer = counts.into(answer)
        try:
            shown = strip_handoff(answer)
        except Undecodable as error:
            garbled = BackendGarbled(f"{backend.url} answered 200 with what cannot be given on: {error}")
            self._note(backend, garbled, leg, attempt)
            raise garbled from None
        self._fleet.succeeded(backend, leg)
        if not backend.reasons and request.body.endpoint == "chat" and _REASONS.search(answer):
            backend.reasons = True
        if usage := read_usage(parsed.usage):
            attempt.note_usage(usage, said=0)
            record.tokens = usage.completion_tokens or 0
        if attempt.sent is not None:
            attempt.sent.ended()
        if attempt.limbo is not None:
            attempt.limbo.close()
        record.status = 200
        request.client.respond(200, request.headers(JSON), shown)

    async def decode_stream(self, attempt: Try, backend: Backend, lease: Lease) -> None:
        """The decode leg of a request that wants events. Returns when the client has been given all of them."""
        request, record = attempt.request, attempt.request.record
        assert request.transcript is not None
        leg, continuation = leg_of(backend), attempt.continuation
        edit = Edit(
            hide_ids=request.token_ids and not request.body.wants_token_ids,
            identity=request.transcript.identity if continuation is not None else attempt.identity,
            said=continuation.said if continuation is not None else 0,
            opens=continuation is None,
            counts=attempt.handed_over_counts,
        )

        dialect = DIALECTS.get(request.body.endpoint)
        if dialect is not None:
            dialect = dialect.of(request.body.prompts, attempt.logprobs)
        relay = StreamRelay(
            backend.url,
            request.client,
            partial(_begin, attempt),
            self._telemetry.gaps(record.decode_pool, backend.url),
            request.transcript,
            edit,
            drop_usage=not request.body.wants_usage,
            idle=self._timeouts.idle,
            loop=self._loop,
            dialect=dialect,
            heard=partial(_heard, attempt, lease),
            pace=partial(self._fleet.paced, backend) if attempt.paced else None,
        )
        if dialect is not None and attempt.logprobs is not None:
            attempt.logprobs.here.add_done_callback(relay.go_on)
        try:
            connection = await self._send(backend, attempt.decode_leg(), attempt, relay, rank=lease.rank)
            lease.on_lost = relay.fail
            await relay.run(connection, self._first_token_limit)
        except BackendError as error:
            self._note(backend, error, leg, attempt)
            raise
        finally:
            request.gained, last_token = relay.given()
            record.last_token = last_token or record.last_token
            record.sequence = relay.sequence
            record.tokens = edit.said + request.gained
            if usage := relay.usage:
                record.tokens = edit.said + (usage.completion_tokens or request.gained)
                attempt.note_usage(usage, edit.said)
        self._fleet.succeeded(backend, leg)
        if request.transcript.flaw == "reasoning":
            backend.reasons = True
        undisturbed = leg == "decode" and request.continuation is None and not relay.throttled
        if undisturbed and (tpot := record.tpot) is not None:
            self._fleet.timed(backend, "decode", tpot, record.tokens - edit.said)

    async def release(self, attempt: Try, backend: Backend, leg: Leg) -> None:
        """Send a leg by which prefill's blocks are freed. Whether it is answered or refused, it has done its work.

        Raises:
            BackendError: it did not; the blocks stay pinned until the engines' lease on them ends.
        """
        receiver = Collected(backend.url, limit=_MOST_ASIDE, loop=self._loop)
        with Lease(backend, attempt.request.prefill_tokens):
            receiver.connection = await self._send(backend, leg, attempt, receiver, reads=False)
            answer = await receiver.wait(self._aside_limit)
        if receiver.status != 200 and receiver.status != 400:
            raise engine_error(backend.url, receiver.status, receiver.headers, answer)

    async def detokenize(self, backend: Backend, model: str | None, ids: bytes) -> str:
        """The text of some tokens, as `backend` writes them.

        Raises:
            BackendError: it did not say.
        """
        named = {} if model is None else {"model": model}
        body = msgspec.json.encode({**named, "tokens": msgspec.Raw(b"[%b]" % ids)})
        receiver = Collected(backend.url, limit=_MOST_ASIDE, loop=self._loop)
        receiver.connection = await self.origin(backend).send("/detokenize", self.headers, (body,), receiver)
        answer = await receiver.wait(self._aside_limit)
        if receiver.status != 200:
            raise engine_error(backend.url, receiver.status, receiver.headers, answer)
        try:
            return _decode_text(answer).prompt
        except Undecodable as error:
            raise BackendGarbled(f"{backend.url} did not detokenize: {error}") from None

    async def _collect(
        self, backend: Backend, lease: Lease, name: LegName, leg: Leg, attempt: Try, limit: Deadlines
    ) -> bytes:
        """Run a leg whose answer is one JSON body."""
        receiver = self._collected(backend)
        try:
            receiver.connection = await self._send(backend, leg, attempt, receiver, rank=lease.rank)
            lease.on_lost = receiver.fail
            answer = await receiver.wait(limit)
            if receiver.status != 200:
                raise engine_error(backend.url, receiver.status, receiver.headers, answer)
        except BackendError as error:
            self._note(backend, error, name, attempt)
            raise
        return answer

    def _collected(self, backend: Backend) -> Collected:
        return Collected(backend.url, limit=self._settings.limits.answer, loop=self._loop)

    @property
    def _loop(self) -> asyncio.AbstractEventLoop:
        """The running loop. It is asked for once, since Python makes a system call of it."""
        if self._running_loop is None:
            self._running_loop = asyncio.get_running_loop()
        return self._running_loop

    def _send(
        self,
        backend: Backend,
        leg: Leg,
        attempt: Try,
        receiver: Receiver,
        *,
        reads: bool = True,
        rank: int | None = None,
    ) -> Awaitable[Connection]:
        """Send a leg.

        Arguments:
            reads: its engine is to read what was handed over.
            rank: the engine's data-parallel rank that it is for, where it has several.
        """
        request, limbo = attempt.request, attempt.limbo
        headers = b"".join(
            (
                b"x-request-id: ",
                attempt.id.encode("ascii"),
                b"\r\n",
                self.headers_after(request.hops) if request.hops else self.headers,
                request.record.trace,
                leg.headers,
            )
        )
        if rank is not None:
            headers += b"x-data-parallel-rank: %d\r\n" % rank
        origin = self._origins.get(backend.url) or self.origin(backend)
        if limbo is None:
            return origin.send(leg.path, headers, leg.body, receiver)
        return origin.send(
            leg.path,
            headers,
            leg.body,
            receiver,
            within=self._time_left(limbo),
            check=attempt.check if reads and attempt.first is not None else None,
            sent=limbo.sent,
        )

    def bound(self, plan: Plan) -> float:
        """Seconds of age at which a hand-off is no longer sent."""
        connector = plan.connector
        if plan.together or connector.traits.lease == inf:
            return inf  # it is known before prefill's answer; it refers to nothing that prefill keeps
        return min(
            self._timeouts.handoff, connector.traits.lease / 2
        )  # whatever was set: not in the lease's second half

    @staticmethod
    def _time_left(limbo: PendingHandoff) -> float | None:
        """Seconds in which a hand-off may still be sent.

        Raises:
            HandoffExpired: none are left.
        """
        if limbo.bound == inf:
            return None
        left = limbo.bound - (monotonic() - limbo.since)
        if left <= 0:
            raise HandoffExpired(f"the hand-off was not sent within {limbo.bound:g} s")
        return left

    def _note(self, backend: Backend, error: BackendError, leg: LegName, attempt: Try) -> None:
        if attempt.limbo is not None and leg == "decode":
            if isinstance(error, BackendAnswered):
                frees = isinstance(error, BackendRejected) and error.handled and attempt.plan.refusal_frees
                attempt.limbo.use = "freed" if frees else "refused"
            elif error.unread:
                attempt.limbo.use = "none"
        if isinstance(error, BackendRejected):
            self._fleet.succeeded(backend, leg)  # an engine that judges requests is alive
        elif not isinstance(error, HandoffExpired):
            self._fleet.failed(backend, error, leg, attempt.limbo.prefill if attempt.limbo is not None else None)
