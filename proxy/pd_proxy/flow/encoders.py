"""The encoder stage of a try: its media are spread over the encoders that are up, before its other legs are sent.

The legs to encoders run at once, and each holds a lease while it runs. The first one that fails ends the others and the
try.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

import msgspec

from pd_proxy.errors import BackendError, BackendGarbled, NoBackend
from pd_proxy.fleet.backend import Backend, Lease
from pd_proxy.fleet.fleet import Fleet
from pd_proxy.flow.attempt import Attempt
from pd_proxy.flow.legs import Legs
from pd_proxy.flow.request import Request, new_id
from pd_proxy.handoff.encoder import TOKENS, Medium, encode_leg, encoded, read_encoded, read_media
from pd_proxy.placement.spread import spread
from pd_proxy.settings.tree import Settings
from pd_proxy.telemetry.records import Stage

log = logging.getLogger("pd_proxy.flow")

_ENOUGH = 2  # failed tries after which the engine that computes the prompt may encode

Handles = dict[str, msgspec.Raw]


class Encoders:
    """Sends media to encoders.

    Arguments:
        random: returns a number in [0, 1), for ties.
        failed: called for each leg that has failed.
    """

    def __init__(
        self,
        settings: Settings,
        fleet: Fleet,
        legs: Legs,
        random: Callable[[], float],
        failed: Callable[[Request, Backend, str, BackendError], None],
    ) -> None:
        self._fleet = fleet
        self._legs = legs
        self._random = random
        self._failed = failed
        self._may_go_without = settings.fallback == "local_prefill"

    def media(self, request: Request) -> tuple[Medium, ...]:
        """The media of a request. They get keys by which all legs of the request name them."""
        if request.media is None:
            request.media = ()
            if request.body.endpoint == "chat" and request.body.media:
                request.body, request.media = read_media(request.body, new_id())
        return request.media

    async def encode(self, attempt: Attempt, media: Sequence[Medium], group: str) -> None:
        """Encode `media` on the encoders of `group`, and note in the plan of the try where the results are. If no
        encoder works, and the settings allow it, the engine that computes the prompt encodes them itself.

        Raises:
            BackendError: a leg failed.
            NoBackend: no encoder is up.
        """
        request = attempt.request
        record = request.record
        if not any(backend.group == group for backend in self._fleet.pool("encode")):
            return
        request.reach(Stage.ENCODING)
        found = [b for b in self._fleet.candidates("encode", request.body.model) if b.group == group]
        failures = sum(leg == "encode" for leg, _ in record.retries)
        if not found or (failures >= _ENOUGH and self._may_go_without):
            if not self._may_go_without:
                raise NoBackend("no encode backend is up, and others may not encode (fallback: reject)", retry_after=1)
            record.fallback = record.fallback or ("encode_failed" if found else "no_encode_backend")
            return
        fresh = [backend for backend in found if backend.url not in request.avoid] or found
        legs = spread([medium.image for medium in media], fresh, TOKENS, self._random)
        running = [
            asyncio.create_task(self._leg(attempt, backend, [media[place] for place in places], number))
            for number, (backend, places) in enumerate(legs)
        ]
        try:
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_EXCEPTION)
            handles: Handles = {}
            for task in sorted(done, key=running.index):
                handles.update(task.result())
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        attempt.plan.encoded = encoded(handles)

    async def _leg(self, attempt: Attempt, backend: Backend, media: Sequence[Medium], number: int) -> Handles:
        """Run one leg. Returns where its encoder has stored the results."""
        try:
            with Lease(backend, TOKENS * len(media)) as lease:
                leg = encode_leg(attempt.request.body, media)
                answer = await self._legs.encode(attempt, lease, leg, number)
        except BackendError as error:
            self._failed(attempt.request, backend, "encode", error)
            raise
        try:
            handles = read_encoded(answer, len(media))
        except BackendGarbled as error:
            self._fleet.failed(backend, error, "encode")
            self._failed(attempt.request, backend, "encode", error)
            raise
        self._fleet.succeeded(backend, "encode")
        return handles
