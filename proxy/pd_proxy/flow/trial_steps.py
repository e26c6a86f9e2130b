"""What a trial does for each of its legs, and how far it has come."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from typing import TypeVar

from pd_proxy.errors import BackendError, GatewayError
from pd_proxy.fleet.backend import Lease
from pd_proxy.fleet.fleet import Fleet
from pd_proxy.flow.attempt import Attempt
from pd_proxy.flow.callbacks import Call
from pd_proxy.flow.legs import Legs
from pd_proxy.flow.orders import end
from pd_proxy.flow.pending_handoff import HandoffUse, PendingHandoff
from pd_proxy.handoff.connector import Handoff
from pd_proxy.handoff.side import side_of

log = logging.getLogger("pd_proxy.flow")

TIMEOUT = 45.0  # seconds for one pair: vLLM takes 5 for a handshake that fails, and has taken 30 on a busy machine

T = TypeVar("T")


class Progress:
    """How far a trial has come.

    Attributes:
        failed: the leg that failed first, or empty.
        answered: the legs that got an answer.
        problem: what is wrong though no leg failed: a code and a text.
    """

    __slots__ = ("answered", "failed", "problem", "side")

    def __init__(self) -> None:
        self.failed = ""
        self.answered: set[str] = set()
        self.side: tuple[str, int] | None = None
        self.problem: tuple[str, str] | None = None

    async def leg(self, name: str, work: Awaitable[T]) -> T:
        """Run a leg, and note its outcome."""
        try:
            result = await work
        except GatewayError:
            self.failed = self.failed or name
            raise
        self.answered.add(name)
        return result


class TrialSteps:
    """The steps of a trial (`orders.Steps`)."""

    def __init__(self, fleet: Fleet, legs: Legs, progress: Progress) -> None:
        self._fleet = fleet
        self._legs = legs
        self._progress = progress
        self._answer = b""

    async def prefill(self, attempt: Attempt) -> None:
        """Run the prefill leg, and keep its answer."""
        assert attempt.prefill is not None
        self._answer = await self._progress.leg("prefill", self._legs.prefill(attempt, attempt.prefill))

    def hand_over(self, attempt: Attempt) -> bool:
        """Read prefill's answer. Returns whether there is a hand-off to try.

        Raises:
            BackendError: the answer is none, or its hand-off cannot be used.
        """
        progress, lease = self._progress, attempt.prefill
        assert lease is not None
        try:
            handoff, read = attempt.plan.take(self._answer)
            if attempt.plan.connector.whole(read) is not None:
                progress.problem = "inconclusive", "prefill's answer is the whole one"
                return False
        except BackendError:
            progress.failed = "prefill"
            raise
        lease.release()
        if handoff is None:
            progress.problem = "no_params", "its answer has no hand-off parameters"
            return False
        attempt.learn_location(lease, handoff)
        self._pend(attempt, lease, handoff)
        return True

    async def decode(self, attempt: Attempt) -> None:
        """Run the decode leg."""
        await self._progress.leg("decode", self._legs.decode_whole(attempt, attempt.lease))

    def begin_both(self, attempt: Attempt) -> None:
        """Both legs are about to be sent: count the hand-off."""
        assert attempt.plan.handoff is not None and attempt.prefill is not None
        self._pend(attempt, attempt.prefill, attempt.plan.handoff)

    async def wait_for_call(self, attempt: Attempt, call: Call) -> None:
        """Wait until decode's engine has called back, and keep the members of its call."""
        attempt.callback = await self._progress.leg("decode", call.wait(TIMEOUT))

    def both_failed(self, attempt: Attempt) -> None:
        """A trial does not change what is known of a backend."""

    async def finish_prefill(self, attempt: Attempt, prefilling: asyncio.Task[None], *, decoded: bool) -> None:
        """Decode's leg has ended. Where that went well, prefill's must end well too."""
        if decoded:
            await prefilling
        else:
            await end(prefilling)

    async def put_away(self, attempt: Attempt) -> None:
        """Free prefill's blocks of a hand-off that decode has not read."""
        pending, decode = attempt.pending, attempt.lease.backend
        if pending is None or pending.use is HandoffUse.SETTLED:
            return
        try:
            if not attempt.plan.together and (leg := attempt.release_leg()):
                with Lease(decode, attempt.request.prefill_tokens) as lease:
                    await self._legs.release(attempt, lease, leg)
        except BackendError as error:
            log.debug("%s: a trial's hand-off was not released: %s", decode.url, error)
        finally:
            pending.settle()

    def _pend(self, attempt: Attempt, prefill: Lease, handoff: Handoff) -> None:
        self._progress.side = side_of(handoff)
        attempt.pending = PendingHandoff(self._fleet, prefill.backend, handoff, self._legs.bound(attempt.plan))
