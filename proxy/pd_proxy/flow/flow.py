"""The order of things: place, lease, prefill, hand over, decode; and again elsewhere when that fails.

Until the client has been given a byte, any failure of a backend leads to another try, on other backends first; after
that, to one that goes on where the answer broke off (`resumption.py`). Each try is whole: its leases and connections
are gone when it ends. Nothing here touches a count by hand.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from math import inf
from time import monotonic
from typing import Any

from pd_proxy.dialects.cache_counts import CacheCounts
from pd_proxy.dialects.prompt_logprobs import STREAM_LIMIT, PromptLogprobs
from pd_proxy.dialects.usage import read_usage
from pd_proxy.errors import (
    BackendBusy,
    BackendError,
    BackendFailed,
    BackendGarbled,
    BackendLacksModel,
    BackendLost,
    BackendsKilled,
    BackendTimedOut,
    HandoffInvalid,
    NoBackend,
)
from pd_proxy.fleet.backend import Backend, Lease, Role
from pd_proxy.fleet.fleet import Fleet
from pd_proxy.fleet.retry_budget import amplifies
from pd_proxy.flow.attempt import Attempt, answering_leg, new_attempt
from pd_proxy.flow.callbacks import Call, Callbacks
from pd_proxy.flow.encoders import Encoders
from pd_proxy.flow.first_token import FirstTokens
from pd_proxy.flow.hops import Hops
from pd_proxy.flow.legs import Legs
from pd_proxy.flow.pending_handoff import HandoffUse, PendingHandoff
from pd_proxy.flow.placing import Placing, continues
from pd_proxy.flow.prompts import Sent
from pd_proxy.flow.request import Request
from pd_proxy.flow.resume import Resumption
from pd_proxy.flow.resume_point import settle
from pd_proxy.flow.suspicion import Suspicion, warn
from pd_proxy.handoff.connector import UNKNOWN, Connector
from pd_proxy.handoff.plan import Leg
from pd_proxy.placement.decide import Decision
from pd_proxy.settings.tree import Settings
from pd_proxy.telemetry.records import Stage, Telemetry

log = logging.getLogger("pd_proxy.flow")

_FIRST_BACKOFF = 0.05  # seconds before a backend that has just failed is tried again
_LONGEST_BACKOFF = 1.0
_RELEASE_TRIES = 5  # within 0.8 s


class Flow:
    """Serves requests over a fleet.

    Arguments:
        connectors: the protocols that engines speak, by name.
        placing: says where tries go.
        first_tokens: whose first tokens clients get.
        random: a number in [0, 1), for ties.
        callbacks: where decode engines call back, for connectors by which they do.
        suspicion: says which requests no other engine is given.
    """

    def __init__(
        self,
        settings: Settings,
        fleet: Fleet,
        legs: Legs,
        connectors: Mapping[str, Connector],
        placing: Placing,
        first_tokens: FirstTokens,
        telemetry: Telemetry,
        random: Callable[[], float],
        callbacks: Callbacks,
        suspicion: Suspicion,
    ) -> None:
        self._attempts = settings.retries.attempts
        self._fleet = fleet
        self._legs = legs
        self._placing = placing
        self._telemetry = telemetry
        self._callbacks = callbacks
        self._call_limit = settings.timeouts.first_token
        self._encoders = Encoders(settings, fleet, legs, random, self._failed)
        self._connectors = {**connectors, UNKNOWN.name: UNKNOWN}
        self._local_prefill = settings.fallback == "local_prefill"
        self._reuse = settings.reuse_tokens
        self._resumption = Resumption(settings)
        self._suspicion = suspicion
        self._first_tokens = first_tokens
        self._background: set[asyncio.Task[None]] = set()
        self._closing = False

    @property
    def hops(self) -> Hops:
        """Says which requests have come back."""
        return self._legs.hops

    async def run(self, request: Request) -> None:
        """Serve a request: the client has its whole answer when this returns.

        Raises:
            GatewayError: it has not; when `request.client.started`, it has a part of it.
        """
        if request.body.stream:
            self._resumption.prepare(request)
        try:
            await self._run(request)
            self._placing.answered(request)
        finally:
            request.give_permit_back()
            self._placing.ended(request)

    async def _run(self, request: Request) -> None:
        tries = 0
        while True:
            tries += 1
            request.live = False
            request.gained = 0
            try:
                if tries == 1 and not request.client.started:
                    decision = self._placing.decide(request)
                else:
                    decision = await self._place(request, tries)
                cards = decision.decode.models
                await self._try(request, decision)
            except BackendError as error:
                request.error = error
                request.give_permit_back()
                if request.live:  # a part of the answer has been given since the last time
                    assert request.transcript is not None
                    request.transcript.verify()
                    request.cards = request.cards or cards
                    if self._resumption.complete(request):
                        return
                    await self._spare_engines(request, error)
                    self._resumption.resume(request, error, await self._settle(request))
                    tries = 0
                    continue
                await self._spare_engines(request, error)
                if not error.retryable or tries == self._attempts:
                    if request.client.started:
                        raise self._resumption.given_up(request, error.reason) from error
                    raise
                record = request.record
                log.info(
                    "%s try %d of %d failed: %s", record.request_id, tries, self._attempts, error, extra=record.known_as
                )
                tries = await self._permitted(request, error, tries)
                request.note_retry()
            else:
                return

    async def _spare_engines(self, request: Request, error: BackendError) -> None:
        """After a try that failed with `error`.

        Raises:
            BackendsKilled: so many engines have ended while they had the request that no other is given it.
        """
        if request.cuts is None or not (ended := await self._suspicion.deadly(request.cuts)):
            return
        record, size = request.record, sum(len(memoryview(member)) for member in request.body.members.values())
        killed = BackendsKilled(f"{len(ended)} engines ended while they had this request: {', '.join(ended)}")
        record.error = str(killed)
        if request.client.started:
            record.not_resumed = killed.reason
        warn(record, size, ended)
        raise killed from error

    async def _permitted(self, request: Request, error: BackendError, tries: int) -> int:
        """Wait for leave to try again, so that retries never amplify an overload. To wait for it counts as a try.

        Returns the number of tries so far.

        Raises:
            BackendError: `error`, when all tries are used up.
        """
        if not amplifies(error):
            return tries
        leg = request.failed[0]
        answers: Role = "mixed" if request.record.decode_pool == "mixed" else "decode"
        role: Role = "prefill" if leg == "prefill" else "encode" if leg == "encode" else answers
        while (permit := self._fleet.budgets.take(role)) is None:
            tries += 1
            if tries >= self._attempts:
                raise error
            await asyncio.sleep(_backoff(tries))
        request.permit = permit
        return tries

    async def _settle(self, request: Request) -> str:
        """Find the place where a broken answer may be continued (`cut.py`), with the help of any engine that is up: all
        of them have the same tokenizer.

        Returns why there is none, or an empty string.
        """
        transcript, model = request.transcript, request.body.model
        if transcript is None or not transcript.continuable:
            return ""
        if transcript.text is None and not transcript.unsure:
            return ""
        roles: tuple[Role, ...] = ("decode", "mixed", "prefill")
        known = [one for role in roles for one in self._fleet.candidates(role, model) if continues(request, one)]
        for backend in sorted(known, key=lambda backend: backend.url in request.avoid):
            try:
                return await settle(transcript, partial(self._legs.detokenize, backend, model))
            except BackendError as error:
                record = request.record
                log.info("%s: %s did not detokenize: %s", record.request_id, backend.url, error, extra=record.known_as)
        return "held_text" if transcript.text is not None else "merged_tokens"

    async def _place(self, request: Request, tries: int) -> Decision[Backend]:
        """Where the next try goes; waits where it can only go to what has just failed.

        Raises:
            NoBackend: nothing is up. A stream that has begun waits for something to come up, some tries long.
        """
        while True:
            try:
                decision = self._placing.decide(request)
            except NoBackend as error:
                if not request.client.started or tries >= self._attempts:
                    raise
                log.info("%s waits for a backend: %s", request.record.request_id, error, extra=request.record.known_as)
            else:
                if tries == 1 or request.avoid.isdisjoint(_urls(decision)):
                    return decision
                if isinstance(request.error, BackendBusy) and not request.client.started:
                    raise request.error  # asking the same busy engine again helps nobody
                await asyncio.sleep(_backoff(tries))
                return decision
            await asyncio.sleep(_LONGEST_BACKOFF)
            tries += 1

    async def _try(self, request: Request, decision: Decision[Backend]) -> None:
        """One try on one pair (or one backend). Decode's place is taken before prefill starts."""
        prefill, decode = decision.prefill, decision.decode
        connector = self._connectors[decode.connector]
        if not connector.traits.resumable:
            self._resumption.forgo(request)
        facts = None
        if prefill is not None and self._first_tokens.on:
            why = self._first_tokens.consider(request, prefill, decode, connector)
            if not why:
                assert prefill.facts is not None and decode.facts is not None
                facts = prefill.facts, decode.facts
        media = self._encoders.media(request) if self._fleet.sizes["encode"] else ()
        computes = prefill or decode
        rank = self._placing.rank(request, computes) if computes.ranks else None
        with (
            Lease(decode, request.decode_tokens, rank if prefill is None else None) as lease,
            _lease(prefill, request, rank) as prefill_lease,
            self._placing.sent(request, lease, prefill_lease) or _NOBODY as sent,
        ):
            attempt = new_attempt(
                request,
                connector,
                prefill_lease,
                decode,
                token_ids=request.token_ids,
                facts=facts,
                callbacks=self._callbacks,
                reuse=self._reuse,
            )
            attempt.sent = sent
            attempt.paced = self._placing.learns
            try:
                if media:
                    await self._encoders.encode(attempt, media, decode.group)
                if prefill_lease is not None and connector.traits.called_back:
                    with self._callbacks.expect(attempt.id, connector, decode.url) as call:
                        await self._together(attempt, prefill_lease, decode, lease, call)
                    return
                if prefill_lease is not None and attempt.plan.together:
                    await self._together(attempt, prefill_lease, decode, lease)
                    return
                if prefill_lease is not None:
                    request.reach(Stage.PREFILLING)
                    await self._prefill(attempt, prefill_lease)
                    if attempt.first is not None and self._first_tokens.give(attempt):
                        return
                    if attempt.pending is not None:
                        request.reach(Stage.HANDED_OVER)
                request.reach(Stage.PREFILLING if answering_leg(decode) == "prefill" else Stage.DECODING)
                await self._decode(attempt, lease)
            finally:
                self._put_away(attempt)

    async def _together(
        self, attempt: Attempt, prefill_lease: Lease, decode: Backend, lease: Lease, call: Call | None = None
    ) -> None:
        """Both legs at once. Decode would wait for the KV cache of a prefill that has failed, so its leg is ended then;
        once it answers, it has the cache, and what becomes of prefill is of no consequence to the client.

        Arguments:
            call: by which decode's engine asks for prefill, where it does. Before that, there is no prefill to run out.
        """
        request, prefill, plan = attempt.request, prefill_lease.backend, attempt.plan
        assert plan.handoff is not None
        pending = attempt.pending = PendingHandoff(self._fleet, prefill, plan.handoff, self._legs.bound(plan))
        request.reach(Stage.PREFILLING)
        if request.body.prompt_logprobs:
            limit = STREAM_LIMIT if request.body.stream else None
            attempt.logprobs = PromptLogprobs(asyncio.get_running_loop(), limit)
        prefilling = asyncio.create_task(
            self._prefill(attempt, prefill_lease)
            if call is None
            else self._prefill_when_called(attempt, prefill_lease, decode, call)
        )
        decoding = asyncio.create_task(self._decode(attempt, lease))
        try:
            await asyncio.wait((prefilling, decoding), return_when=asyncio.FIRST_COMPLETED)
            if not decoding.done() and not request.live:
                prefilling.result()
                request.reach(Stage.HANDED_OVER)
            await decoding
        except BackendError:
            prefill.forget_location()
            raise
        finally:
            await _ended(decoding)
            unsent = call is not None and attempt.callback is None
            cancellable = plan.connector.traits.prefill_cancellable
            if not (prefilling.done() or unsent) and (_went_well(decoding) or not cancellable):
                if attempt.sent is not None:
                    attempt.sent.runs_on()
                attempt.runs_out = self._in_background(self._run_out(prefilling, prefill_lease, attempt.sent))
            else:
                await _ended(prefilling)
                if not _went_well(prefilling):
                    pending.settle()  # it keeps nothing

    async def _prefill_when_called(self, attempt: Attempt, lease: Lease, decode: Backend, call: Call) -> None:
        """The prefill leg, once decode's engine has called back."""
        lease.on_lost = call.fail
        try:
            attempt.callback = await call.wait(self._call_limit)
        except BackendLost as error:
            self._failed(attempt.request, lease.backend, "prefill", error)
            raise
        except BackendError as error:
            self._fleet.failed(decode, error, "decode")
            self._failed(attempt.request, decode, "decode", error)
            raise
        await self._prefill(attempt, lease)

    async def _run_out(self, prefilling: asyncio.Task[None], lease: Lease, sent: Sent | None) -> None:
        """A prefill leg goes on without its request: nobody waits for it, but it is work for its engine."""
        with Lease(lease.backend, lease.tokens, lease.rank):
            await asyncio.wait((prefilling,))
        await _ended(prefilling)
        if sent is not None:
            sent.over()

    def _in_background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    def _put_away(self, attempt: Attempt) -> None:
        """A try has ended: blocks of a hand-off that it did not use are freed, in the background."""
        pending = attempt.pending
        if pending is None or pending.use is HandoffUse.SETTLED:
            return
        leg = attempt.release_leg()
        if leg is None:
            if attempt.plan.connector.traits.lease < inf:
                self._telemetry.handoff_released(False)
            pending.settle()
            return
        self._in_background(self._release(attempt, pending, leg, attempt.request.record.decode))

    async def _release(self, attempt: Attempt, pending: PendingHandoff, leg: Leg, decode: str) -> None:
        """Send `leg` until an engine has read it, some tries long: to `decode`, which was to have the hand-off, else to
        another. A second reader would do harm."""
        released = False
        avoid = set(attempt.request.avoid)
        if attempt.runs_out is not None:
            await asyncio.wait((attempt.runs_out,))
        try:
            cuts = attempt.request.cuts
            if cuts is not None and await self._suspicion.any_dead([backend for backend, _ in cuts.get("decode", ())]):
                return  # the leg has the request's prompt, which no other engine is to meet for this
            for tries in range(1, _RELEASE_TRIES + 1):
                if tries > 1:
                    if self._closing:
                        return
                    await asyncio.sleep(_backoff(tries))
                model = attempt.request.body.model
                candidates = self._may_read(pending, self._fleet.candidates("decode", model), model)
                if not candidates:
                    continue
                backend = min(candidates, key=lambda backend: (backend.url in avoid, backend.url != decode))
                try:
                    with Lease(backend, attempt.request.prefill_tokens) as lease:
                        await self._legs.release(attempt, lease, leg)
                    released = True
                    return
                except BackendError as error:
                    record = attempt.request.record
                    known = record.known_by(attempt.id)
                    log.info("%s: its hand-off was not released: %s", record.request_id, error, extra=known)
                    if not error.unread:
                        return
                    avoid.add(backend.url)
        finally:
            self._telemetry.handoff_released(released)
            pending.settle()

    async def close(self) -> None:
        """Wait for what runs in the background; what fails now is not tried again."""
        self._closing = True
        while self._background:
            await asyncio.wait(self._background)

    async def _prefill(self, attempt: Attempt, lease: Lease) -> None:
        """The prefill leg. Leaves its hand-off in `attempt`, or none when it gave none and decode may do without.

        Arguments:
            lease: on its backend; released when the backend has answered.
        Raises:
            BackendError: it failed; or there is no usable hand-off, and the settings forbid to do without.
        """
        request, record, backend = attempt.request, attempt.request.record, lease.backend
        started = monotonic()
        try:
            with lease:
                answer = await self._legs.prefill(attempt, lease)
        except BackendError as error:
            self._failed(request, backend, "prefill", error)
            if attempt.plan.notices and attempt.decode is not None and not error.unread:
                request.avoid.add(attempt.decode.url)  # it may have set memory aside that nobody will write to
            raise
        answered = monotonic()
        record.prefill_seconds = answered - started
        request.prefill = backend.url
        try:
            attempt.first = attempt.plan.connector.whole(answer)
            handoff, usage = attempt.plan.take(answer)
            self._fleet.succeeded(backend, "prefill")
        except BackendGarbled as error:
            self._fleet.failed(backend, error, "prefill")
            self._failed(request, backend, "prefill", error)
            raise
        except HandoffInvalid as error:
            if attempt.sent is not None:
                attempt.sent.prefilled(None, 0)
            self._do_without(attempt, backend, "handoff_invalid", error)
            return
        counted = read_usage(usage)
        attempt.counts = CacheCounts.of(counted, None if handoff is None else handoff.cached)
        record.cached_tokens = attempt.counts.cached or 0
        if counted is not None:
            record.prompt_tokens = attempt.prompt_tokens(counted)
        if attempt.sent is not None:
            resumes = request.continuation is not None  # what was said is in the prompt then
            attempt.sent.prefilled(None if resumes else attempt.counts.cached, record.prompt_tokens)
        computed = max(1, request.prefill_tokens - record.cached_tokens)
        self._fleet.timed(backend, "prefill", record.prefill_seconds, computed)
        if attempt.pending is not None:  # decode's leg is under way
            attempt.pending.since = answered
            if attempt.logprobs is not None:
                attempt.logprobs.take(answer)
            return
        if handoff is not None:
            attempt.learn_location(lease, handoff)
            attempt.pending = PendingHandoff(self._fleet, backend, handoff, self._legs.bound(attempt.plan))
        if attempt.facts is not None:
            self._first_tokens.take(attempt, backend, answer)
        if handoff is None and not (attempt.first is not None and attempt.first.whole):
            self._do_without(attempt, backend, "no_handoff_params", HandoffInvalid("no kv_transfer_params"))

    def _do_without(self, attempt: Attempt, backend: Backend, reason: str, error: HandoffInvalid) -> None:
        """Let decode compute the prompt for want of a hand-off, or raise `error` where the settings forbid that, or the
        connector."""
        record = attempt.request.record
        log.warning(
            "%s: prefill backend %s gave no usable hand-off: %s",
            record.request_id,
            backend.url,
            error,
            extra=record.known_as,
        )
        if not (self._local_prefill and attempt.plan.connector.traits.plain_decode):
            self._failed(attempt.request, backend, "prefill", error)
            raise error
        attempt.request.record.fallback = reason

    async def _decode(self, attempt: Attempt, lease: Lease) -> None:
        """The decode leg. When the engine surely never read it, the same hand-off goes to another decode backend."""
        request, backend = attempt.request, lease.backend
        try:
            if request.body.stream:
                await self._legs.decode_stream(attempt, lease)
            else:
                await self._legs.decode_whole(attempt, lease)
        except BackendError as error:
            self._failed(request, backend, answering_leg(backend), error)
            blames_prefill = isinstance(error, BackendFailed | BackendTimedOut) and not error.leaves
            if attempt.pending is not None and blames_prefill:
                request.avoid.add(attempt.pending.prefill.url)  # decode lives; perhaps it could not read from there
            other = self._other_decode(attempt) if error.unread else None
            if other is None:
                raise
        else:
            return
        request.note_retry()
        lease.release()
        request.record.decode = other.url
        attempt.goes_to(other)
        if attempt.facts is not None and other.facts is not None:
            attempt.facts, attempt.decode = (attempt.facts[0], other.facts), other
        with Lease(other, request.decode_tokens) as next_lease:
            if attempt.sent is not None:
                attempt.sent.goes_to(other, next_lease.rank)
            await self._decode(attempt, next_lease)

    def _other_decode(self, attempt: Attempt) -> Backend | None:
        """A decode backend that has not failed this request, and that the hand-off surely fits."""
        request, facts = attempt.request, attempt.facts if attempt.first is not None else None
        connector = attempt.plan.connector
        if attempt.pending is None or not connector.traits.transferable:
            return None
        if connector.traits.pairs_by_id and request.stored is not None:
            return None
        model = request.body.model
        candidates = self._may_read(
            attempt.pending, self._fleet.candidates("decode", model, request.decode_tokens), model
        )
        fresh = [backend for backend in candidates if backend.url not in request.avoid]
        if facts is not None:
            fresh = [backend for backend in fresh if backend.facts is not None and backend.facts.fits(facts[1])]
        if not fresh:
            return None
        return self._placing.other_decode(request, fresh)

    def _may_read(self, pending: PendingHandoff, decodes: list[Backend], model: str | None) -> list[Backend]:
        """Those of some decode backends that a hand-off may go to."""
        pairs = self._fleet.pairer(model)
        return decodes if pairs is None else [decode for decode in decodes if pairs(pending.prefill, decode)]

    def _failed(self, request: Request, backend: Backend, leg: str, error: BackendError) -> None:
        """A leg failed: remember whom to avoid, and what to say of it should another try follow."""
        request.avoid.add(backend.url)
        request.cuts = self._suspicion.noted(request.cuts, leg, backend, error, request.gained)
        request.failed = (leg, error.reason)
        request.record.error = str(error)
        if isinstance(error, BackendLacksModel) and request.body.model is not None:
            self._fleet.has_lost(backend, request.body.model)


_NOBODY = nullcontext(None)


def _lease(prefill: Backend | None, request: Request, rank: int | None) -> AbstractContextManager[Lease | None]:
    """The lease for the prefill leg, where there is to be one."""
    return _NOBODY if prefill is None else Lease(prefill, request.prefill_tokens, rank)


async def _ended(task: asyncio.Task[None]) -> None:
    """End a task and see it ended; what it raised is not asked for."""
    if not task.done():
        task.cancel()
        await asyncio.wait((task,))
    if not task.cancelled():
        task.exception()


def _went_well(task: asyncio.Task[None]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is None


def _backoff(tries: int) -> float:
    """Seconds before try number `tries`."""
    return min(_FIRST_BACKOFF * 2.0 ** (tries - 2), _LONGEST_BACKOFF)


def _urls(decision: Decision[Backend]) -> set[str]:
    return {decision.decode.url} | ({decision.prefill.url} if decision.prefill else set())
