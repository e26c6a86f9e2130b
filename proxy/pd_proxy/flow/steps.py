"""The steps of a request's try: what is done before and after each leg, and how prefill's answer is used."""

from __future__ import annotations

import asyncio
import logging
from time import monotonic

import msgspec

from pd_proxy.dialects.cache_counts import CacheCounts
from pd_proxy.dialects.prompt_logprobs import STREAM_LIMIT, PromptLogprobs
from pd_proxy.dialects.usage import read_usage
from pd_proxy.errors import (
    BackendError,
    BackendFailed,
    BackendGarbled,
    BackendLacksModel,
    BackendLost,
    BackendTimedOut,
    HandoffInvalid,
)
from pd_proxy.fleet.backend import Backend, Lease
from pd_proxy.fleet.fleet import Fleet
from pd_proxy.flow.attempt import Attempt, answering_leg
from pd_proxy.flow.callbacks import Call
from pd_proxy.flow.first_token import FirstTokens
from pd_proxy.flow.legs import Legs
from pd_proxy.flow.orders import end, went_well
from pd_proxy.flow.pending_handoff import PendingHandoff
from pd_proxy.flow.placing import Placing
from pd_proxy.flow.prompts import Sent
from pd_proxy.flow.release import Releases, readers
from pd_proxy.flow.request import Request
from pd_proxy.flow.suspicion import Suspicion
from pd_proxy.settings.tree import Settings

log = logging.getLogger("pd_proxy.flow")


class RequestSteps:
    """The steps of requests (`orders.Steps`).

    Arguments:
        first_tokens: decides which engine's first token the client gets.
        suspicion: decides which engines may have died with a request.
    """

    def __init__(
        self,
        settings: Settings,
        fleet: Fleet,
        legs: Legs,
        placing: Placing,
        first_tokens: FirstTokens,
        releases: Releases,
        suspicion: Suspicion,
    ) -> None:
        self._fleet = fleet
        self._legs = legs
        self._placing = placing
        self._first_tokens = first_tokens
        self._releases = releases
        self._suspicion = suspicion
        self._call_limit = settings.timeouts.first_token
        self._local_prefill = settings.fallback == "local_prefill"

    def begin_both(self, attempt: Attempt) -> None:
        """Both legs are about to be sent: count the hand-off."""
        plan, request, lease = attempt.plan, attempt.request, attempt.prefill
        assert plan.handoff is not None and lease is not None
        attempt.pending = PendingHandoff(self._fleet, lease.backend, plan.handoff, self._legs.bound(plan))
        if request.body.prompt_logprobs:
            limit = STREAM_LIMIT if request.body.stream else None
            attempt.logprobs = PromptLogprobs(asyncio.get_running_loop(), limit)

    async def wait_for_call(self, attempt: Attempt, call: Call) -> None:
        """Wait until decode's engine has called back, and keep the members of its call.

        Raises:
            BackendError: it did not call, or prefill's engine was lost meanwhile.
        """
        lease, decode = attempt.prefill, attempt.lease.backend
        assert lease is not None
        lease.on_lost = call.fail
        try:
            attempt.callback = await call.wait(self._call_limit)
        except BackendLost as error:
            self.failed(attempt.request, lease.backend, "prefill", error)
            raise
        except BackendError as error:
            self._fleet.failed(decode, error, "decode")
            self.failed(attempt.request, decode, "decode", error)
            raise

    def both_failed(self, attempt: Attempt) -> None:
        """Legs that were sent at once have failed. Prefill's coordinates are read again, since its engine may be
        another one by now."""

        assert attempt.prefill is not None
        attempt.prefill.backend.forget_location()

    async def finish_prefill(self, attempt: Attempt, prefilling: asyncio.Task[None], *, decoded: bool) -> None:
        """Decode's leg has ended. A prefill leg that still runs is ended too, unless decode has answered or the
        connector forbids to cancel it; then it runs to its end in the background."""
        lease, traits = attempt.prefill, attempt.plan.connector.traits
        assert lease is not None
        unsent = traits.called_back and attempt.callback is None
        if not (prefilling.done() or unsent) and (decoded or not traits.prefill_cancellable):
            if attempt.sent is not None:
                attempt.sent.runs_on()
            attempt.runs_out = self._releases.in_background(_run_out(prefilling, lease, attempt.sent))
            return
        await end(prefilling)
        if not went_well(prefilling) and attempt.pending is not None:
            attempt.pending.settle()  # prefill keeps no blocks

    def hand_over(self, attempt: Attempt) -> bool:
        """Send the client prefill's first token, if it is used. Returns whether decode's leg is to be sent."""
        return attempt.first is None or not self._first_tokens.give(attempt)

    async def prefill(self, attempt: Attempt) -> None:
        """Run the prefill leg, and keep its hand-off in `attempt`. There is none where prefill has sent none and decode
        may compute the prompt. The lease on prefill's backend is released when it has answered.

        Raises:
            BackendError: the leg failed; or there is no usable hand-off, and the settings do not allow to do without.
        """
        request, lease = attempt.request, attempt.prefill
        assert lease is not None
        backend, started = lease.backend, monotonic()
        try:
            with lease:
                answer = await self._legs.prefill(attempt, lease)
        except BackendError as error:
            self.failed(request, backend, "prefill", error)
            if attempt.plan.notices and not error.unread:
                # Decode's engine may have reserved memory that no prefill will write to.
                request.avoid.add(attempt.lease.backend.url)
            raise
        self._take_answer(attempt, lease, answer, started)

    def _take_answer(self, attempt: Attempt, lease: Lease, answer: bytes, started: float) -> None:
        """Read prefill's answer, whose leg began at `started`."""
        request, record, backend = attempt.request, attempt.request.record, lease.backend
        answered = monotonic()
        record.prefill_seconds = answered - started
        request.prefill = backend.url
        try:
            handoff, read = attempt.plan.take(answer)
            attempt.first = attempt.plan.connector.whole(read)
            self._fleet.succeeded(backend, "prefill")
        except BackendGarbled as error:
            self._fleet.failed(backend, error, "prefill")
            self.failed(request, backend, "prefill", error)
            raise
        except HandoffInvalid as error:
            if attempt.sent is not None:
                attempt.sent.prefilled(None, 0)
            self._do_without(attempt, backend, "handoff_invalid", error)
            return
        self._note_usage(attempt, backend, read.usage, None if handoff is None else handoff.cached)
        if attempt.pending is not None:  # decode's leg is under way
            attempt.pending.since = answered
            if attempt.logprobs is not None:
                attempt.logprobs.take(answer)
            return
        if handoff is not None:
            attempt.learn_location(lease, handoff)
            attempt.pending = PendingHandoff(self._fleet, backend, handoff, self._legs.bound(attempt.plan))
        if attempt.identities is not None:
            self._first_tokens.take(attempt, backend, read)
        if handoff is None and not (attempt.first is not None and attempt.first.whole):
            self._do_without(attempt, backend, "no_handoff_params", HandoffInvalid("no kv_transfer_params"))

    def _note_usage(self, attempt: Attempt, backend: Backend, usage: msgspec.Raw, cached: int | None) -> None:
        """Keep the token counts of prefill's answer.

        Arguments:
            cached: the number of cached tokens in its hand-off; None where it has none.
        """
        request, record = attempt.request, attempt.request.record
        counted = read_usage(usage)
        attempt.counts = CacheCounts.of(counted, cached)
        record.cached_tokens = attempt.counts.cached or 0
        if counted is not None:
            record.prompt_tokens = attempt.prompt_tokens(counted)
        if attempt.sent is not None:
            resumes = request.continuation is not None  # the prompt then has a part of the answer
            attempt.sent.prefilled(None if resumes else attempt.counts.cached, record.prompt_tokens)
        computed = max(1, request.prefill_tokens - record.cached_tokens)
        self._fleet.timed(backend, "prefill", record.prefill_seconds or 0.0, computed)

    def _do_without(self, attempt: Attempt, backend: Backend, reason: str, error: HandoffInvalid) -> None:
        """Let decode compute the prompt without a hand-off, or raise `error` if the settings or the connector do not
        allow that."""
        record = attempt.request.record
        log.warning(
            "%s: prefill backend %s gave no usable hand-off: %s",
            record.request_id,
            backend.url,
            error,
            extra=record.known_as,
        )
        if not (self._local_prefill and attempt.plan.connector.traits.plain_decode):
            self.failed(attempt.request, backend, "prefill", error)
            raise error
        attempt.request.record.fallback = reason

    async def decode(self, attempt: Attempt) -> None:
        """Run the decode leg. If the engine surely never read it, the same hand-off is sent to another decode
        backend."""
        request, lease, backend = attempt.request, attempt.lease, attempt.lease.backend
        try:
            if request.body.stream:
                await self._legs.decode_stream(attempt, lease)
            else:
                await self._legs.decode_whole(attempt, lease)
        except BackendError as error:
            self.failed(request, backend, answering_leg(backend), error)
            blames_prefill = isinstance(error, BackendFailed | BackendTimedOut) and not error.leaves
            if attempt.pending is not None and blames_prefill:
                request.avoid.add(
                    attempt.pending.prefill.url
                )  # decode is alive, so it may have failed to read from prefill
            other = self._other_decode(attempt) if error.unread else None
            if other is None:
                raise
        else:
            return
        request.note_retry()
        lease.release()
        request.record.decode = other.url
        attempt.goes_to(other)
        if attempt.identities is not None and other.identity is not None:
            attempt.identities = attempt.identities[0], other.identity
        with Lease(other, request.decode_tokens) as attempt.lease:
            if attempt.sent is not None:
                attempt.sent.goes_to(other, attempt.lease.rank)
            await self.decode(attempt)

    def _other_decode(self, attempt: Attempt) -> Backend | None:
        """Another decode backend for the hand-off: one that has not failed this request, and whose engine surely
        fits."""
        request, identities = attempt.request, attempt.identities if attempt.first is not None else None
        connector = attempt.plan.connector
        if attempt.pending is None or not connector.traits.transferable:
            return None
        if connector.traits.pairs_by_id and request.stored is not None:
            return None
        model = request.body.model
        candidates = readers(
            self._fleet, attempt.pending, self._fleet.candidates("decode", model, request.decode_tokens), model
        )
        fresh = [backend for backend in candidates if backend.url not in request.avoid]
        if identities is not None:
            fresh = [
                backend for backend in fresh if backend.identity is not None and backend.identity.fits(identities[1])
            ]
        if not fresh:
            return None
        return self._placing.other_decode(request, fresh)

    def failed(self, request: Request, backend: Backend, leg: str, error: BackendError) -> None:
        """A leg failed: note the backend to avoid, and the reason for the log and the record."""
        request.avoid.add(backend.url)
        request.cuts = self._suspicion.note(request.cuts, leg, backend, error, request.gained)
        request.failed = (leg, error.reason)
        request.failed_pool = backend.role
        request.record.error = str(error)
        if isinstance(error, BackendLacksModel) and request.body.model is not None:
            self._fleet.lost_model(backend, request.body.model)


async def _run_out(prefilling: asyncio.Task[None], lease: Lease, sent: Sent | None) -> None:
    """Let a prefill leg run to its end without its request. It holds a lease, since it is work for its engine."""
    with Lease(lease.backend, lease.tokens, lease.rank):
        await asyncio.wait((prefilling,))
    await end(prefilling)
    if sent is not None:
        sent.over()
