"""The order of things: place, lease, prefill, hand over, decode; and again elsewhere when that fails.

Until the client has been given a byte, any failure of a backend leads to another try, on other backends first. Each
try is whole: its leases and connections are gone when it ends. Nothing here touches a count by hand.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from time import monotonic

from proxy.errors import BackendBusy, BackendError, BackendGarbled, HandoffInvalid, NoBackend
from proxy.fleet.backend import Backend, Lease
from proxy.fleet.fleet import Fleet
from proxy.flow.legs import Legs, Limbo, Try
from proxy.flow.request import Request, new_id
from proxy.handoff.connector import Connector
from proxy.handoff.plan import SequentialPlan
from proxy.placement.decide import Decision, View, choose, decide
from proxy.relay.answers import read_usage
from proxy.settings import Settings

log = logging.getLogger("pd_proxy.flow")

_FIRST_BACKOFF = 0.05  # seconds before a backend that has just failed is tried again
_LONGEST_BACKOFF = 1.0


class Flow:
    """Serves requests over a fleet.

    Arguments:
        connector: the protocol the engines speak.
        random: a number in [0, 1), for ties and random policies.
    """

    def __init__(
        self, settings: Settings, fleet: Fleet, legs: Legs, connector: Connector, random: Callable[[], float]
    ) -> None:
        self._settings = settings
        self._fleet = fleet
        self._legs = legs
        self._random = random
        self._connector = connector
        self._policies = {role: getattr(settings.policy, role) for role in ("prefill", "decode", "mixed")}
        self._local_prefill = settings.fallback == "local_prefill"
        self._turn = 0

    async def run(self, request: Request) -> None:
        """Serve a request: the client has its whole answer when this returns.

        Raises:
            GatewayError: it has not; when `request.client.started`, it has a part of it.
        """
        attempts = self._settings.retries.attempts
        for attempt in range(1, attempts + 1):
            decision = self._decide(request)
            if request.avoid and not request.avoid.isdisjoint(_urls(decision)):
                if isinstance(request.error, BackendBusy):
                    raise request.error  # asking the same busy engine again helps nobody
                await asyncio.sleep(min(_FIRST_BACKOFF * 2 ** (attempt - 2), _LONGEST_BACKOFF))
            try:
                await self._try(request, decision)
            except BackendError as error:
                request.error = error
                if request.client.started or not error.retryable or attempt == attempts:
                    raise
                log.info("%s try %d of %d failed: %s", request.record.request_id, attempt, attempts, error)
                request.note_retry()
            else:
                return

    def _decide(self, request: Request) -> Decision[Backend]:
        """Place one try, and write down what was decided.

        Raises:
            NoBackend: nothing is up; or, after a failed try, that try's own error where it says more.
        """
        body, fleet, record = request.body, self._fleet, request.record
        view = View(
            prefill=fleet.candidates("prefill", body.model, request.prefill_tokens),
            decode=fleet.candidates("decode", body.model, request.decode_tokens),
            mixed=fleet.candidates("mixed", body.model, request.decode_tokens),
            configured=fleet.sizes,
        )
        self._turn += 1
        try:
            decision = decide(
                view,
                alone=body.alone or self._given_up_handoff(request),
                policies=self._policies,
                avoid=request.avoid,
                random=self._random,
                turn=self._turn,
                allow_local_prefill=self._local_prefill,
            )
        except NoBackend as error:
            if isinstance(request.error, BackendBusy):
                raise request.error from None
            error.__cause__ = request.error
            raise
        record.decode = decision.decode.url
        record.decode_pool = decision.pool
        record.prefill = decision.prefill.url if decision.prefill else ""
        record.fallback = decision.fallback
        return decision

    def _given_up_handoff(self, request: Request) -> str:
        """Why this request should no longer be split: two tries of it under a hand-off have failed, so the prefill
        pool or the link between the pools is the likely culprit. A prefill pool that is merely busy is none."""
        failed = [leg for leg, reason in request.record.retries if reason != BackendBusy.reason]
        if len(failed) < 2 or not (request.record.prefill and self._local_prefill):
            return ""
        return "prefill_failed" if failed[-1] == "prefill" else "handoff_failed"

    async def _try(self, request: Request, decision: Decision[Backend]) -> None:
        """One try on one pair (or one backend). Decode's place is taken before prefill starts."""
        attempt = Try(request, SequentialPlan(request.body, self._connector), new_id())
        with Lease(decision.decode, request.decode_tokens) as lease:
            try:
                if decision.prefill is not None:
                    await self._prefill(attempt, decision.prefill)
                await self._decode(attempt, decision.decode, lease)
            finally:
                if attempt.limbo is not None:
                    attempt.limbo.close()

    async def _prefill(self, attempt: Try, backend: Backend) -> None:
        """The prefill leg. Leaves its hand-off in `attempt`, or none when it gave none and decode may do without.

        Raises:
            BackendError: it failed; or there is no usable hand-off, and the settings forbid to do without.
        """
        request, record = attempt.request, attempt.request.record
        record.stage = "prefill"
        started = monotonic()
        try:
            with Lease(backend, request.prefill_tokens) as lease:
                answer = await self._legs.prefill(attempt, backend, lease)
        except BackendError as error:
            self._failed(request, backend, "prefill", error)
            raise
        record.prefill_seconds = monotonic() - started
        try:
            handoff, usage = attempt.plan.take(answer)
            self._fleet.succeeded(backend)
        except BackendGarbled as error:
            self._fleet.failed(backend, error)
            self._failed(request, backend, "prefill", error)
            raise
        except HandoffInvalid as error:
            self._do_without(request, backend, "handoff_invalid", error)
            return
        if counted := read_usage(usage):
            record.cached_tokens = counted.cached_tokens
        if handoff is None:
            self._do_without(request, backend, "no_handoff_params", HandoffInvalid("no kv_transfer_params"))
        else:
            attempt.limbo = Limbo(self._fleet, handoff)

    def _do_without(self, request: Request, backend: Backend, reason: str, error: HandoffInvalid) -> None:
        """Let decode compute the prompt for want of a hand-off, or raise `error` where the settings forbid that."""
        log.warning("prefill backend %s gave no usable hand-off: %s", backend.url, error)
        if not self._local_prefill:
            self._failed(request, backend, "prefill", error)
            raise error
        request.record.fallback = reason

    async def _decode(self, attempt: Try, backend: Backend, lease: Lease) -> None:
        """The decode leg. When the engine surely never read it, the same hand-off goes to another decode backend."""
        request = attempt.request
        request.record.stage = "decode"
        try:
            if request.body.stream:
                await self._legs.decode_stream(attempt, backend, lease)
            else:
                await self._legs.decode_whole(attempt, backend, lease)
        except BackendError as error:
            self._failed(request, backend, "decode", error)
            other = self._other_decode(request) if attempt.limbo is not None and error.unread else None
            if other is None:
                raise
        else:
            return
        request.note_retry()
        lease.release()
        request.record.decode = other.url
        with Lease(other, request.decode_tokens) as lease:
            await self._decode(attempt, other, lease)

    def _other_decode(self, request: Request) -> Backend | None:
        """A decode backend that has not failed this request."""
        candidates = self._fleet.candidates("decode", request.body.model, request.decode_tokens)
        fresh = [backend for backend in candidates if backend.url not in request.avoid]
        if not fresh:
            return None
        policy = self._policies["decode"]
        return choose(fresh, policy, avoid=frozenset(), random=self._random, turn=self._turn)

    def _failed(self, request: Request, backend: Backend, leg: str, error: BackendError) -> None:
        """A leg failed: remember whom to avoid, and what to say of it should another try follow."""
        request.avoid.add(backend.url)
        request.failed = (leg, error.reason)
        request.record.error = str(error)


def _urls(decision: Decision[Backend]) -> set[str]:
    return {decision.decode.url} | ({decision.prefill.url} if decision.prefill else set())
