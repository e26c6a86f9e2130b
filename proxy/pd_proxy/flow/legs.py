"""Sends the legs of a try, waits for their answers, and reports their outcomes to the fleet.

Before a function returns, the connection of its leg is closed or back in its pool, and its lease is released, however
the leg has ended: with an answer, with an error, or because the client has left.
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
from pd_proxy.fleet.outcomes import OutcomeSink
from pd_proxy.fleet.outlier.statistics import LegName
from pd_proxy.fleet.zmq.notifications import TransferNotifications
from pd_proxy.flow.attempt import Attempt, answering_leg
from pd_proxy.flow.hops import Hops
from pd_proxy.flow.pending_handoff import PendingHandoff
from pd_proxy.handoff.opening import joined_answer
from pd_proxy.handoff.plan import Leg, Plan
from pd_proxy.http.collected import Collected
from pd_proxy.http.connection import Connection
from pd_proxy.http.deadlines import Deadlines
from pd_proxy.http.origin import Origin
from pd_proxy.http.receiver import Receiver
from pd_proxy.relay.stream import StreamRelay
from pd_proxy.settings.tree import Settings
from pd_proxy.telemetry.records import Telemetry

_ASIDE = 5.0  # seconds for a leg that releases a hand-off, and for detokenizing
_MOST_ASIDE = 4 * 1024 * 1024  # bytes of the answer to either
_NO_LIMIT = Deadlines(None)


def _on_first_token(attempt: Attempt, lease: Lease, relay: StreamRelay) -> None:
    """Decode's first token has arrived, so decode has the KV cache."""
    attempt.kv_cache_arrived(lease)
    lease.on_lost = relay.suspect  # from here on the stream is checked itself


_REASONS = re.compile(rb'"reasoning(?:_content)?":"[^"]')


class _Detokenized(msgspec.Struct):
    prompt: str


_decode_text = json_decoder(_Detokenized)


class Legs:
    """Sends legs to backends over their pooled connections.

    Arguments:
        fleet: gets the outcome of each leg.
        notices: the notifications of prefill engines that a KV cache has arrived.
    Attributes:
        authorization: the header line with the engines' key; or empty.
        headers: the header lines of every leg of a client's request.
        hops: recognises requests that have come back to this gateway.
    """

    def __init__(
        self,
        settings: Settings,
        fleet: OutcomeSink,
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
        self._idle_limit = Deadlines(settings.timeouts.idle)
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
        """The header lines of a leg.

        Arguments:
            hops: the gateways that its request has passed through.
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

    async def prefill(self, attempt: Attempt, lease: Lease) -> bytes:
        """Run the prefill leg. Returns the engine's answer, after the notifications of its connector, if it sends any.

        Raises:
            BackendError: it did not end in a 200 within `timeouts.prefill`.
            HandoffUnconfirmed: the notifications did not come within `timeouts.notice`.
        """
        leg, count = attempt.plan.prefill_leg(attempt.callback), attempt.plan.notices
        if not count:
            answer = await self._collect(attempt, lease, "prefill", leg, self._prefill_limit)
            self._check_abort(attempt, lease, answer)
            return answer
        with self._notices.expect(attempt.id, count) as expected:  # they may arrive before the answer
            answer = await self._collect(attempt, lease, "prefill", leg, self._prefill_limit)
            self._check_abort(attempt, lease, answer)
            lease.on_lost = expected.lost
            seconds = self._timeouts.notice
            if not await expected.all(seconds):
                unconfirmed = HandoffUnconfirmed(
                    f"{lease.backend.url} did not say within {seconds:g} s that its KV cache has arrived "
                    f"({expected.missing} of {count} notices are missing)"
                )
                self._report(attempt, lease, "prefill", unconfirmed)
                raise unconfirmed
        return answer

    def _check_abort(self, attempt: Attempt, lease: Lease, answer: bytes) -> None:
        """Check that prefill's answer is not that of an aborted request.

        Raises:
            BackendError: the engine ended the request early, and keeps no KV cache of it.
        """
        reason = DIALECTS[attempt.request.body.endpoint].abort_reason(answer)
        if reason is not None:
            ended = aborted(lease.backend.url, reason)
            self._report(attempt, lease, "prefill", ended)
            raise ended

    async def encode(self, attempt: Attempt, lease: Lease, leg: Leg, number: int) -> bytes:
        """Run one leg to an encoder. Returns the engine's answer.

        Arguments:
            number: the number of the leg, which is a part of its id.
        Raises:
            BackendError: it did not end in a 200 within `timeouts.prefill`.
        """
        child = msgspec.structs.replace(attempt, id=f"{attempt.id}:{number}")
        return await self._collect(child, lease, "encode", leg, self._prefill_limit)

    async def decode_whole(self, attempt: Attempt, lease: Lease) -> None:
        """Run the decode leg of a request whose answer is not streamed, and answer the client."""
        request, record, backend = attempt.request, attempt.request.record, lease.backend
        leg = answering_leg(backend)
        answer = await self._collect(attempt, lease, leg, attempt.decode_leg(), _NO_LIMIT)
        try:
            answer, shown, usage_given = await self._whole_answer(attempt, backend.url, answer)
        except BackendError as error:
            self._report(attempt, lease, leg, error)
            raise
        self._fleet.succeeded(backend, leg)
        if not backend.has_reasoning and request.body.endpoint == "chat" and _REASONS.search(answer):
            backend.has_reasoning = True
        if usage := read_usage(usage_given):
            attempt.note_usage(usage, said=0)
            record.tokens = usage.completion_tokens or 0
        if attempt.sent is not None:
            attempt.sent.ended()
        if attempt.pending is not None:
            attempt.pending.settle()
        request.respond(shown)

    async def _whole_answer(self, attempt: Attempt, url: str, answer: bytes) -> tuple[bytes, bytes, msgspec.Raw]:
        """Read decode's answer in one piece.

        Returns the whole answer, the answer as the client gets it, and its usage.

        Raises:
            BackendError: it is an error under status 200, or not an answer.
        """
        request = attempt.request
        usage = DIALECTS[request.body.endpoint].whole(url, answer).usage
        if attempt.logprobs is not None:
            await attempt.logprobs.here
            try:
                answer = attempt.logprobs.whole(answer)
            except BackendGarbled as error:
                raise BackendGarbled(f"{url}: {error}") from None
        if attempt.first is not None:
            try:
                answer = joined_answer(attempt.first, answer, request.body, Edit(earlier_tokens=1).merge)
                usage = decode_whole(answer).usage
            except ValueError as error:
                raise BackendGarbled(f"{url} answered 200 with what is no answer: {error}") from None
        if attempt.alias:
            answer = answer.replace(attempt.id.encode(), attempt.alias.encode())
        if (counts := attempt.handed_over_counts()) is not None:
            answer = counts.into(answer)
        try:
            return answer, strip_handoff(answer), usage
        except Undecodable as error:
            raise BackendGarbled(f"{url} answered 200 with what cannot be given on: {error}") from None

    async def decode_stream(self, attempt: Attempt, lease: Lease) -> None:
        """Run the decode leg of a request whose answer is streamed. Returns when the client has all events."""
        request, backend = attempt.request, lease.backend
        assert request.transcript is not None
        leg, continuation = answering_leg(backend), attempt.continuation
        edit = Edit(
            hide_ids=request.token_ids and not request.body.wants_token_ids,
            identity=request.transcript.identity if continuation is not None else attempt.identity,
            earlier_tokens=continuation.said if continuation is not None else 0,
            opens=continuation is None,
            counts=attempt.handed_over_counts,
        )
        relay = self._relay(attempt, lease, edit)
        try:
            connection = await self._send(attempt, lease, attempt.decode_leg(), relay)
            lease.on_lost = relay.fail
            await relay.run(connection, self._first_token_limit)
        except BackendError as error:
            self._report(attempt, lease, leg, error)
            raise
        finally:
            attempt.note_stream(relay, edit.earlier_tokens)
        self._fleet.succeeded(backend, leg)
        if request.transcript.inexact == "reasoning":
            backend.has_reasoning = True
        record = request.record
        undisturbed = leg == "decode" and request.continuation is None and not relay.throttled
        if undisturbed and (tpot := record.tpot) is not None:
            self._fleet.timed(backend, "decode", tpot, record.tokens - edit.earlier_tokens)

    def _relay(self, attempt: Attempt, lease: Lease, edit: Edit) -> StreamRelay:
        """The relay of one decode leg's events to the client."""
        request, backend = attempt.request, lease.backend
        assert request.transcript is not None
        reader = DIALECTS[request.body.endpoint].reader(
            backend.url,
            edit,
            request.transcript,
            drop_usage=not request.body.wants_usage,
            prompts=request.body.prompts,
            logprobs=attempt.logprobs,
        )
        return StreamRelay(
            backend.url,
            request.client,
            reader,
            request.transcript,
            self._telemetry.gaps(request.record.decode_pool, backend.url),
            attempt.begin_stream,
            on_first_token=partial(_on_first_token, attempt, lease),
            pace=partial(self._fleet.paced, backend) if attempt.paced else None,
            idle=self._idle_limit,
            loop=self._loop,
        )

    async def release(self, attempt: Attempt, lease: Lease, leg: Leg) -> None:
        """Send a leg that makes prefill free its blocks. They are free once the engine has served or refused it.

        Raises:
            BackendError: it did neither; the blocks stay reserved until the engines' lease on them ends.
        """
        url = lease.backend.url
        receiver = Collected(url, limit=_MOST_ASIDE, loop=self._loop)
        receiver.connection = await self._send(attempt, lease, leg, receiver, reads=False)
        answer = await receiver.wait(self._aside_limit)
        if receiver.status != 200 and receiver.status != 400:
            raise engine_error(url, receiver.status, receiver.headers, answer)

    async def detokenize(self, backend: Backend, model: str | None, ids: bytes) -> str:
        """The text of some tokens, from the tokenizer of `backend`.

        Raises:
            BackendError: the engine did not answer with a text.
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

    async def _collect(self, attempt: Attempt, lease: Lease, name: LegName, leg: Leg, limit: Deadlines) -> bytes:
        """Run a leg whose answer is one JSON body. Returns that body."""
        url = lease.backend.url
        receiver = Collected(url, limit=self._settings.limits.answer, loop=self._loop)
        try:
            receiver.connection = await self._send(attempt, lease, leg, receiver)
            lease.on_lost = receiver.fail
            answer = await receiver.wait(limit)
            if receiver.status != 200:
                raise engine_error(url, receiver.status, receiver.headers, answer)
        except BackendError as error:
            self._report(attempt, lease, name, error)
            raise
        return answer

    @property
    def _loop(self) -> asyncio.AbstractEventLoop:
        """The running loop. It is looked up once, since Python makes a system call for it."""
        if self._running_loop is None:
            self._running_loop = asyncio.get_running_loop()
        return self._running_loop

    def _send(
        self, attempt: Attempt, lease: Lease, leg: Leg, receiver: Receiver, *, reads: bool = True
    ) -> Awaitable[Connection]:
        """Send a leg.

        Arguments:
            reads: the engine is to read the blocks of the hand-off.
        """
        request, pending = attempt.request, attempt.pending
        headers = b"".join(
            (
                b"x-request-id: ",
                attempt.id.encode(),
                b"\r\n",
                self.headers_after(request.hops) if request.hops else self.headers,
                request.record.trace,
                leg.headers,
            )
        )
        if reads and lease.rank is not None:
            headers += b"x-data-parallel-rank: %d\r\n" % lease.rank
        backend = lease.backend
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
            return inf  # known before prefill's answer, so it refers to no blocks that prefill keeps
        # Never in the second half of the lease, whatever was set.
        return min(self._timeouts.handoff, connector.traits.lease / 2)

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

    def _report(self, attempt: Attempt, lease: Lease, leg: LegName, error: BackendError) -> None:
        """Report the failure of a leg to its pending hand-off and to the fleet."""
        backend = lease.backend
        if attempt.pending is not None and leg == "decode":
            attempt.pending.leg_failed(error, refusal_frees=attempt.plan.refusal_frees)
        if isinstance(error, BackendRejected):
            self._fleet.succeeded(backend, leg)  # an engine that refuses a request is alive
        elif not isinstance(error, HandoffExpired):
            self._fleet.failed(backend, error, leg, attempt.pending.prefill if attempt.pending is not None else None)
