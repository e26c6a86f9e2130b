"""Serves requests with two legs: places them, takes leases, runs the legs, and tries other backends after a failure.

Until the client has been sent a byte, a failure of a backend leads to another try, on other backends first. After that
it leads to a try that continues the answer where it broke off (`resume.py`). When a try ends, its leases are released
and its connections closed or back in their pool.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import ClassVar

import msgspec

from pd_proxy.errors import (
    BackendBusy,
    BackendError,
    BackendsKilled,
    NoBackend,
)
from pd_proxy.fleet.backend import Backend, Lease, Role
from pd_proxy.fleet.fleet import Fleet
from pd_proxy.fleet.retry_budget import Permit
from pd_proxy.flow.attempt import new_attempt
from pd_proxy.flow.callbacks import Callbacks
from pd_proxy.flow.encoders import Encoders
from pd_proxy.flow.first_token import FirstTokens
from pd_proxy.flow.hops import Hops
from pd_proxy.flow.legs import Legs
from pd_proxy.flow.orders import Orders
from pd_proxy.flow.placing import Placing, continues
from pd_proxy.flow.release import Releases
from pd_proxy.flow.request import Request
from pd_proxy.flow.resume import Resumption
from pd_proxy.flow.resume_point import find_resume_point
from pd_proxy.flow.retry import LONGEST_BACKOFF, Retries, backoff
from pd_proxy.flow.steps import RequestSteps
from pd_proxy.flow.suspicion import Cuts, Suspicion
from pd_proxy.handoff.connector import UNKNOWN, Connector
from pd_proxy.placement.decide import Decision
from pd_proxy.settings.tree import Settings
from pd_proxy.telemetry.records import RequestRecord, Telemetry

log = logging.getLogger("pd_proxy.flow")


class Flow:
    """Serves requests over a fleet.

    Arguments:
        connectors: the protocols that engines speak, by name.
        placing: chooses the backends of each try.
        first_tokens: decides which engine's first token a client gets.
        random: returns a number in [0, 1), for ties.
        callbacks: receives the calls of decode engines, for the connectors whose engines call back.
        suspicion: decides which requests must not go to another engine.
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
        self._retries = Retries(settings.retries.attempts, fleet, suspicion)
        self._fleet = fleet
        self._legs = legs
        self._placing = placing
        self._callbacks = callbacks
        self._releases = Releases(fleet, legs, telemetry, suspicion)
        steps = RequestSteps(settings, fleet, legs, placing, first_tokens, self._releases, suspicion)
        self._orders = Orders(steps, callbacks)
        self._encoders = Encoders(settings, fleet, legs, random, steps.failed)
        self._connectors = {**connectors, UNKNOWN.name: UNKNOWN}
        self._reuse = settings.reuse_tokens
        self.resumption = Resumption(settings)
        self._first_tokens = first_tokens

    @property
    def hops(self) -> Hops:
        """Recognises requests that have come back to this gateway."""
        return self._legs.hops

    async def run(self, request: Request) -> None:
        """Serve a request: the client has its whole answer when this returns.

        Raises:
            GatewayError: the client has no answer; or a part of it, where `request.client.started`.
        """
        if request.body.stream:
            self.resumption.prepare(request)
        try:
            await self._retries.run(_Tries(self, request))
            self._placing.answered(request)
        finally:
            request.give_permit_back()
            self._placing.ended(request)

    def attempt(self, request: Request, tries: int) -> Awaitable[bool]:
        """Place and run one try of a request. Returns True.

        Raises:
            BackendError: it failed.
        """
        request.live = False
        request.gained = 0
        if tries == 1 and not request.client.started:  # one coroutine fewer, as most requests need no second try
            return self._try(request, self._placing.decide(request))
        return self._try_again(request, tries)

    async def _try_again(self, request: Request, tries: int) -> bool:
        return await self._try(request, await self._place(request, tries))

    async def resume(self, request: Request, error: BackendError) -> bool:
        """A try failed after the client was sent a part of the answer. Returns True if the answer is whole all the
        same, and False if the next try is to continue it.

        Raises:
            GatewayError: the answer cannot be continued.
        """
        assert request.transcript is not None
        request.transcript.verify()
        request.cards = request.cards or request.cards_of_try
        if self.resumption.complete(request):
            return True
        await self._retries.spare_engines(_Tries(self, request), error)
        self.resumption.resume(request, error, await self._find_resume_point(request))
        return False

    async def _find_resume_point(self, request: Request) -> str:
        """Find where a broken answer may be continued (`resume_point.py`). Any engine that is up may be asked, since
        all engines with the same weights have the same tokenizer.

        Returns why there is no such place, or an empty string.
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
                return await find_resume_point(transcript, partial(self._legs.detokenize, backend, model))
            except BackendError as error:
                record = request.record
                log.info("%s: %s did not detokenize: %s", record.request_id, backend.url, error, extra=record.known_as)
        return "held_text" if transcript.text is not None else "merged_tokens"

    async def _place(self, request: Request, tries: int) -> Decision[Backend]:
        """Choose the backends of the next try. Waits first if only a backend that has just failed is left.

        Raises:
            NoBackend: no backend is up. A stream that has begun waits for one, until its tries are used up.
        """
        while True:
            try:
                decision = self._placing.decide(request)
            except NoBackend as error:
                if not request.client.started or tries >= self._retries.attempts:
                    raise
                log.info("%s waits for a backend: %s", request.record.request_id, error, extra=request.record.known_as)
            else:
                if tries == 1 or request.avoid.isdisjoint(_urls(decision)):
                    return decision
                if isinstance(request.error, BackendBusy) and not request.client.started:
                    raise request.error  # the same engine would still be busy
                await asyncio.sleep(backoff(tries))
                return decision
            await asyncio.sleep(LONGEST_BACKOFF)
            tries += 1

    async def _try(self, request: Request, decision: Decision[Backend]) -> bool:
        """Run one try on a pair, or on one backend. The lease on decode is taken before prefill starts."""
        prefill, decode = decision.prefill, decision.decode
        request.cards_of_try = decode.models
        connector = self._connectors[decode.connector]
        if not connector.traits.resumable:
            self.resumption.disable(request)
        identities = None
        if prefill is not None and self._first_tokens.on:
            why = self._first_tokens.consider(request, prefill, decode, connector)
            if not why:
                assert prefill.identity is not None and decode.identity is not None
                identities = prefill.identity, decode.identity
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
                lease,
                token_ids=request.token_ids,
                identities=identities,
                callbacks=self._callbacks,
                reuse=self._reuse,
            )
            attempt.sent = sent
            attempt.paced = self._placing.learns
            try:
                if media:
                    await self._encoders.encode(attempt, media, decode.group)
                await self._orders.of(attempt).run(attempt)
            finally:
                self._releases.put_away(attempt)
        return True

    async def close(self) -> None:
        """Wait for what runs in the background. What fails from now on is not retried."""
        await self._releases.close()


class _Tries(msgspec.Struct, eq=False):
    """A request with two legs, as a `retry.Job`."""

    waits_for_permit: ClassVar[bool] = True
    repeatable: ClassVar[bool] = True

    _flow: Flow
    _request: Request

    @property
    def record(self) -> RequestRecord:
        return self._request.record

    @property
    def cuts(self) -> Cuts | None:
        return self._request.cuts

    @property
    def size(self) -> int:
        return sum(len(memoryview(member)) for member in self._request.body.members.values())

    @property
    def answering(self) -> bool:
        return self._request.live

    def attempt(self, tries: int) -> Awaitable[bool]:
        return self._flow.attempt(self._request, tries)

    def failed(self, error: BackendError) -> None:
        self._request.error = error
        self._request.give_permit_back()

    async def resume(self, error: BackendError) -> bool:
        return await self._flow.resume(self._request, error)

    @property
    def failed_pool(self) -> Role:
        return self._request.failed_pool

    def hold(self, permit: Permit) -> None:
        self._request.permit = permit

    def note_retry(self, error: BackendError) -> None:
        self._request.note_retry()

    def given_up(self, error: BackendError) -> Exception:
        if self._request.client.started:
            return self._flow.resumption.given_up(self._request, error.reason)
        return error

    def killed(self, error: BackendsKilled) -> None:
        if self._request.client.started:
            self._request.record.not_resumed = error.reason


_NOBODY = nullcontext(None)


def _lease(prefill: Backend | None, request: Request, rank: int | None) -> AbstractContextManager[Lease | None]:
    """The lease for the prefill leg; nothing where there is none."""
    return _NOBODY if prefill is None else Lease(prefill, request.prefill_tokens, rank)


def _urls(decision: Decision[Backend]) -> set[str]:
    return {decision.decode.url} | ({decision.prefill.url} if decision.prefill else set())
