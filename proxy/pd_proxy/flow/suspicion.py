"""Requests that end engines: each goes to few of them.

A request that ends its engine, through a defect of the engine or by intent, would end as many as there are tries, and
with them whatever else runs there. Such a request cannot be told from one that was there by chance, so the rule is
about the leg: one whose engine died with it is tried on `retries.after_cut` more engines; when these die as well, the
request ends.

- Legs of one kind are counted together (prefill, decode, encode), since each kind is another part of the engine.
- A leg counts whose connection was cut after the request had been sent, which its health checks gave up, or which its
  engine answered with an error of its own, as vLLM's API server does when its engine core has died; and only if the
  engine is found dead when it matters. A connection may be cut by what lies between, and an error may be all there is.
- `PROGRESS` tokens or more mean that the engine was well with the request, and the count begins anew. A long stream
  outlives a restart of every engine of its pool, one after the other.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable

from pd_proxy.errors import BackendCut, BackendError, BackendFailed, BackendLost
from pd_proxy.fleet.backend import Backend
from pd_proxy.telemetry.records import RequestRecord

log = logging.getLogger("pd_proxy.flow")

PROGRESS = 8
"""Tokens of one leg after which its end is no sign against its request: more than a request that ends its engine at one
place of the answer gets again where it is continued."""

_SECOND_LOOK = 0.1  # seconds in which an engine that has failed ends, if it does

Cuts = dict[str, list[tuple[Backend, "asyncio.Task[bool]"]]]
"""The engines that may have died with a request, by leg, and whether each was found alive right after."""


class Suspicion:
    """Says which requests must not go to another engine.

    Arguments:
        after_cut: engines that a request may be given after one has ended with a leg of it.
        lives: whether an engine answers its health check now.
    """

    def __init__(self, after_cut: int, lives: Callable[[Backend], Awaitable[bool]]) -> None:
        self._after_cut = after_cut
        self._lives = lives
        self._looks: dict[Backend, asyncio.Task[bool]] = {}  # under way; one for all requests that an engine had

    async def close(self) -> None:
        """End what is under way."""
        looks = list(self._looks.values())
        for look in looks:
            look.cancel()
        await asyncio.gather(*looks, return_exceptions=True)

    def noted(self, cuts: Cuts | None, leg: str, backend: Backend, error: BackendError, gained: int = 0) -> Cuts | None:
        """The engines that may have died with a request, with that of a leg that has failed, if it may.

        Arguments:
            gained: tokens that the leg had given.
        """
        if error.unread or error.leaves or not isinstance(error, BackendCut | BackendLost | BackendFailed):
            return cuts
        cuts = {} if cuts is None else cuts
        before = [] if gained >= PROGRESS else cuts.get(leg, [])
        cuts[leg] = [*before, (backend, self._look(backend))]
        return cuts

    async def deadly(self, cuts: Cuts) -> list[str]:
        """The URLs of the engines that a request has ended, where these are so many that it is to be given to no
        other; else none."""
        for leg, suspects in cuts.items():
            if len({backend for backend, _ in suspects}) <= self._after_cut:
                continue
            alive = await asyncio.gather(*(look for _, look in suspects), return_exceptions=True)
            cuts[leg] = dead = [one for one, lives in zip(suspects, alive, strict=True) if lives is False]
            urls = list(dict.fromkeys(backend.url for backend, _ in dead))
            if len(urls) > self._after_cut:
                return urls
        return []

    async def any_dead(self, suspects: Iterable[Backend]) -> bool:
        """Whether one of some engines that may have died with a request is found dead."""
        return not all(await asyncio.gather(*map(self._lives, suspects)))

    def _look(self, backend: Backend) -> asyncio.Task[bool]:
        """Whether an engine lives on, once that is known."""
        if (look := self._looks.get(backend)) is None:
            look = self._looks[backend] = asyncio.create_task(self._is_well(backend), name=f"look at {backend.url}")
            look.add_done_callback(lambda _: self._looks.pop(backend, None))
        return look

    async def _is_well(self, backend: Backend) -> bool:
        """Whether an engine lives on. One that is about to end may still answer its health check."""
        if not await self._lives(backend):
            return False
        await asyncio.sleep(_SECOND_LOOK)
        return await self._lives(backend)


def warn(record: RequestRecord, size: int, ended: list[str]) -> None:
    """Log a request that goes to no other engine; of its content, only its size.

    Arguments:
        size: bytes of its body.
    """
    log.warning(
        "%s ended %d engines (%s) and is given to no other: %s for %s, %d bytes, of client %s",
        record.request_id,
        len(ended),
        ", ".join(ended),
        record.endpoint,
        record.model or "no model",
        size,
        record.client or "without a key",
        extra=record.known_as,
    )
