"""The orders in which the legs of one try are run: one leg alone, one after the other, or both at once.

An order decides when each leg begins, and what the failure of one leg does to the other. The `Steps` do the work of
each leg: requests (`steps.py`) and trials (`trial_steps.py`) have their own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Protocol

from pd_proxy.errors import BackendError
from pd_proxy.flow.attempt import Attempt, answering_leg
from pd_proxy.flow.callbacks import Call, Callbacks
from pd_proxy.telemetry.records import Stage


class Steps(Protocol):
    """What is done for each leg of a try."""

    async def prefill(self, attempt: Attempt) -> None:
        """Run the prefill leg."""

    def hand_over(self, attempt: Attempt) -> bool:
        """Prefill has answered, and decode's leg has not been sent. Returns whether it is to be."""

    async def decode(self, attempt: Attempt) -> None:
        """Run the decode leg."""

    def begin_both(self, attempt: Attempt) -> None:
        """Both legs are about to be sent: count the hand-off, which is known already."""

    async def wait_for_call(self, attempt: Attempt, call: Call) -> None:
        """Wait until decode's engine has called back, and keep the members of its call."""

    def both_failed(self, attempt: Attempt) -> None:
        """A try whose legs were sent at once has failed."""

    async def finish_prefill(self, attempt: Attempt, prefilling: asyncio.Task[None], *, decoded: bool) -> None:
        """Decode's leg has ended: end the prefill leg, or let it run to its end.

        Arguments:
            decoded: decode's leg ended well.
        """


class LegOrder(Protocol):
    """An order of legs."""

    async def run(self, attempt: Attempt) -> None:
        """Run the legs of a try.

        Raises:
            BackendError: a leg failed, and the client does not have its whole answer.
        """


class Alone:
    """One backend computes the prompt and the answer."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps

    async def run(self, attempt: Attempt) -> None:
        prefills = answering_leg(attempt.lease.backend) == "prefill"
        attempt.request.reach(Stage.PREFILLING if prefills else Stage.DECODING)
        await self._steps.decode(attempt)


class Sequential:
    """Decode's leg follows prefill's answer. This is also the order of `Order.NOTIFIED`, whose prefill leg ends with
    the notifications that the KV cache has arrived (`Legs.prefill`)."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps

    async def run(self, attempt: Attempt) -> None:
        request = attempt.request
        request.reach(Stage.PREFILLING)
        await self._steps.prefill(attempt)
        if not self._steps.hand_over(attempt):
            return
        request.reach(Stage.DECODING if attempt.pending is None else Stage.HANDED_OVER)
        await self._steps.decode(attempt)


class Concurrent:
    """Both legs are sent at once. If prefill fails, decode's leg is ended, since it would wait for the KV cache. Once
    decode answers it has the cache, and a later failure of prefill does not matter."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps

    async def run(self, attempt: Attempt) -> None:
        await self.run_with(attempt, self._steps.prefill(attempt))

    async def run_with(self, attempt: Attempt, prefill: Coroutine[Any, Any, None]) -> None:
        """Run the legs of a try, with a prefill leg that may wait before it is sent.

        Arguments:
            prefill: runs the prefill leg.
        """
        request, steps = attempt.request, self._steps
        steps.begin_both(attempt)
        request.reach(Stage.PREFILLING)
        prefilling = asyncio.create_task(prefill)
        decoding = asyncio.create_task(steps.decode(attempt))
        try:
            await asyncio.wait((prefilling, decoding), return_when=asyncio.FIRST_COMPLETED)
            if not decoding.done() and not request.live:
                prefilling.result()
                request.reach(Stage.HANDED_OVER)
            await decoding
        except BackendError:
            steps.both_failed(attempt)
            raise
        finally:
            await end(decoding)
            await steps.finish_prefill(attempt, prefilling, decoded=went_well(decoding))


class CalledBack:
    """Decode's leg is sent first. Prefill's waits until decode's engine has called the gateway back."""

    def __init__(self, steps: Steps, callbacks: Callbacks) -> None:
        self._steps = steps
        self._both = Concurrent(steps)
        self._callbacks = callbacks

    async def run(self, attempt: Attempt) -> None:
        connector, decode = attempt.plan.connector, attempt.lease.backend
        with self._callbacks.expect(attempt.id, connector, decode.url) as call:
            await self._both.run_with(attempt, self._prefill(attempt, call))

    async def _prefill(self, attempt: Attempt, call: Call) -> None:
        await self._steps.wait_for_call(attempt, call)
        await self._steps.prefill(attempt)


class Orders:
    """One of each order.

    Arguments:
        steps: do the work of each leg.
        callbacks: receives the calls of decode engines.
    """

    def __init__(self, steps: Steps, callbacks: Callbacks) -> None:
        self._alone = Alone(steps)
        self._sequential = Sequential(steps)
        self._concurrent = Concurrent(steps)
        self._called_back = CalledBack(steps, callbacks)

    def of(self, attempt: Attempt) -> LegOrder:
        """The order of a try's legs. If the hand-off is not known beforehand, it is sequential, whatever order the
        connector has."""
        if attempt.prefill is None:
            return self._alone
        if not attempt.plan.together:
            return self._sequential
        return self._called_back if attempt.plan.connector.traits.called_back else self._concurrent


async def end(task: asyncio.Task[None]) -> None:
    """Cancel a task unless it is done, and wait until it is. What it raised is dropped."""
    if not task.done():
        task.cancel()
        await asyncio.wait((task,))
    if not task.cancelled():
        task.exception()


def went_well(task: asyncio.Task[None]) -> bool:
    """Whether a task has ended without an error."""
    return task.done() and not task.cancelled() and task.exception() is None
