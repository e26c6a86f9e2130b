"""Frees prefill's blocks of hand-offs that decode has not read, in the background."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from math import inf
from typing import Any

from pd_proxy.errors import BackendError
from pd_proxy.fleet.backend import Backend, Lease
from pd_proxy.fleet.fleet import Fleet
from pd_proxy.flow.attempt import Attempt
from pd_proxy.flow.legs import Legs
from pd_proxy.flow.pending_handoff import HandoffUse, PendingHandoff
from pd_proxy.flow.retry import backoff
from pd_proxy.flow.suspicion import Suspicion
from pd_proxy.handoff.plan import Leg
from pd_proxy.telemetry.records import Telemetry

log = logging.getLogger("pd_proxy.flow")

_TRIES = 5  # within 0.8 s


class Releases:
    """Releases the hand-offs that tries have not used.

    Arguments:
        suspicion: knows which engines may have died with a request.
    """

    def __init__(self, fleet: Fleet, legs: Legs, telemetry: Telemetry, suspicion: Suspicion) -> None:
        self._fleet = fleet
        self._legs = legs
        self._telemetry = telemetry
        self._suspicion = suspicion
        self._background: set[asyncio.Task[None]] = set()
        self._closing = False

    def in_background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run work that may last longer than its request. `close` waits for it."""
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    def put_away(self, attempt: Attempt) -> None:
        """Free the blocks of a hand-off that a try has not used, in the background. Called when the try has ended."""
        pending = attempt.pending
        if pending is None or pending.use is HandoffUse.SETTLED:
            return
        leg = attempt.release_leg()
        if leg is None:
            if attempt.plan.connector.traits.lease < inf:
                self._telemetry.handoff_released(False)
            pending.settle()
            return
        self.in_background(self._release(attempt, pending, leg, attempt.request.record.decode))

    async def _release(self, attempt: Attempt, pending: PendingHandoff, leg: Leg, decode: str) -> None:
        """Send a leg until an engine has read it, at most `_TRIES` times. It must not be read twice.

        Arguments:
            decode: URL of the backend that the hand-off was made for. It is tried before others.
        """
        released = False
        avoid = set(attempt.request.avoid)
        if attempt.runs_out is not None:
            await asyncio.wait((attempt.runs_out,))
        try:
            cuts = attempt.request.cuts
            if cuts is not None and await self._suspicion.any_dead([backend for backend, _ in cuts.get("decode", ())]):
                return  # the leg has the prompt of the request, which may end another engine
            for tries in range(1, _TRIES + 1):
                if tries > 1:
                    if self._closing:
                        return
                    await asyncio.sleep(backoff(tries))
                model = attempt.request.body.model
                candidates = readers(self._fleet, pending, self._fleet.candidates("decode", model), model)
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
        """Wait for what runs in the background. What fails from now on is not retried."""
        self._closing = True
        while self._background:
            await asyncio.wait(self._background)


def readers(fleet: Fleet, pending: PendingHandoff, decodes: list[Backend], model: str | None) -> list[Backend]:
    """Those of these decode backends that may read a hand-off."""
    pairs = fleet.pairer(model)
    return decodes if pairs is None else [decode for decode in decodes if pairs(pending.prefill, decode)]
