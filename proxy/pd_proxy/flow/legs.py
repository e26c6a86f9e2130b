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

import msgspec

from pd_proxy.decoding import Undecodable, json_decoder
from pd_proxy.dialects.aborts import aborted
from pd_proxy.dialects.edit import Edit
from pd_proxy.dialects.engine_errors import engine_error
from pd_proxy.dialects.registry import DIALECTS
from pd_proxy.dialects.strip import strip_handoff
from pd_proxy.dialects.usage import read_usage
from pd_proxy.dialects.whole import decode_whole
from pd_proxy.errors import (
    BackendError,
    BackendGarbled,
    BackendRejected,
    HandoffExpired,
    HandoffUnconfirmed,
)
from pd_proxy.fleet.backend import Backend, Lease
from pd_proxy.fleet.judge import Judge
from pd_proxy.fleet.outlier.statistics import LegName
from pd_proxy.fleet.zmq.notifications import TransferNotifications
from pd_proxy.flow.attempt import Attempt, leg_of
from pd_proxy.flow.hops import Hops
from pd_proxy.flow.pending_handoff import PendingHandoff
from pd_proxy.handoff.opening import joined_answer
from pd_proxy.handoff.plan import Leg, Plan
from pd_proxy.http.client import Collected, Connection, Origin, Receiver
from pd_proxy.http.deadlines import Deadlines
from pd_proxy.relay.stream import StreamRelay
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


def _heard(attempt: Attempt, lease: Lease, relay: StreamRelay) -> None:
    """Decode's first token is here: it has what it was handed."""
    sent = attempt.sent
    if (pending := attempt.pending) is not None:
        now = monotonic()
        attempt.request.record.handoff_seconds = seconds = now - pending.since
        if sent is not None:
            lease.backend.speeds.handed_over(seconds, attempt.request.prefill_tokens, now)
        pending.settle()
    if sent is not None:
        sent.heard()
    lease.on_lost = relay.suspect  # from here on the stream itself knows best whether it is alive


def _begin(attempt: Attempt, relay: StreamRelay) -> None:
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


_REASONS = re.compile(rb'"reasoning(?:_content)?":"[^"]')


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

    async def prefill(self, attempt: Attempt, backend: Backend, lease: Lease) -> bytes:
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

    def _unless_aborted(self, attempt: Attempt, backend: Backend, answer: bytes) -> bytes:
        """Prefill's answer.

        Raises:
            BackendError: its engine ended the request before its time, and keeps nothing.
        """
        reason = DIALECTS[attempt.request.body.endpoint].abort_reason(answer)
        if reason is None:
            return answer
        ended = aborted(backend.url, reason)
        self._note(backend, ended, "prefill", attempt)
        raise ended

    async def encode(self, attempt: Attempt, backend: Backend, lease: Lease, leg: Leg, number: int) -> bytes:
        """One of a try's legs to encoders; returns the engine's answer.

        Arguments:
            number: of the leg, which has an id of its own.
        Raises:
            BackendError: it did not end in a 200 within `timeouts.prefill`.
        """
        child = msgspec.structs.replace(attempt, id=f"{attempt.id}:{number}")
        return await self._collect(backend, lease, "encode", leg, child, self._prefill_limit)

    async def decode_whole(self, attempt: Attempt, backend: Backend, lease: Lease) -> None:
        """The decode leg of a request that wants its answer in one piece."""
        request, record = attempt.request, attempt.request.record
        leg = leg_of(backend)
        answer = await self._collect(backend, lease, leg, attempt.decode_leg(), attempt, _NO_LIMIT)
        try:
            usage_given = DIALECTS[request.body.endpoint].whole(backend.url, answer).usage
        except BackendError as error:
            self._note(backend, error, leg, attempt)
            raise
        if attempt.logprobs is not None:
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
                usage_given = decode_whole(answer).usage
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
        if usage := read_usage(usage_given):
            attempt.note_usage(usage, said=0)
            record.tokens = usage.completion_tokens or 0
        if attempt.sent is not None:
            attempt.sent.ended()
        if attempt.pending is not None:
            attempt.pending.settle()
        record.status = 200
        request.client.respond(200, request.headers(JSON), shown)

    async def decode_stream(self, attempt: Attempt, backend: Backend, lease: Lease) -> None:
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

        reader = DIALECTS[request.body.endpoint].reader(
            backend.url,
            edit,
            request.transcript,
            drop_usage=not request.body.wants_usage,
            prompts=request.body.prompts,
            logprobs=attempt.logprobs,
        )
        relay = StreamRelay(
            backend.url,
            request.client,
            reader,
            request.transcript,
            self._telemetry.gaps(record.decode_pool, backend.url),
            partial(_begin, attempt),
            on_first_token=partial(_heard, attempt, lease),
            pace=partial(self._fleet.paced, backend) if attempt.paced else None,
            idle=self._timeouts.idle,
            loop=self._loop,
        )
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

    async def release(self, attempt: Attempt, backend: Backend, leg: Leg) -> None:
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
        self, backend: Backend, lease: Lease, name: LegName, leg: Leg, attempt: Attempt, limit: Deadlines
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
        attempt: Attempt,
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
        request, pending = attempt.request, attempt.pending
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
        if pending is None:
            return origin.send(leg.path, headers, leg.body, receiver)
        return origin.send(
            leg.path,
            headers,
            leg.body,
            receiver,
            within=self._time_left(pending),
            check=attempt.check if reads and attempt.first is not None else None,
            sent=pending.sent if reads else None,
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
    def _time_left(pending: PendingHandoff) -> float | None:
        """Seconds in which a hand-off may still be sent.

        Raises:
            HandoffExpired: none are left.
        """
        if pending.bound == inf:
            return None
        left = pending.bound - (monotonic() - pending.since)
        if left <= 0:
            raise HandoffExpired(f"the hand-off was not sent within {pending.bound:g} s")
        return left

    def _note(self, backend: Backend, error: BackendError, leg: LegName, attempt: Attempt) -> None:
        if attempt.pending is not None and leg == "decode":
            attempt.pending.leg_failed(error, refusal_frees=attempt.plan.refusal_frees)
        if isinstance(error, BackendRejected):
            self._fleet.succeeded(backend, leg)  # an engine that judges requests is alive
        elif not isinstance(error, HandoffExpired):
            self._fleet.failed(backend, error, leg, attempt.pending.prefill if attempt.pending is not None else None)
