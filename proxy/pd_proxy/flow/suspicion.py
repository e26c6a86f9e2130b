"""Bounds how many engines one request can end.

A request that ends its engine, through a defect of the engine or by intent, would end one engine for each of its tries,
and with it every other request there. Such a request looks the same as one that ran on the engine by chance. So each
leg whose engine died is tried on `retries.after_cut` more engines. When these die as well, the request ends.

- Legs of one kind (prefill, decode, encode) are counted together, since each kind uses another part of the engine.
- A leg counts in three cases: its connection was cut after the request had been sent; the health checks gave its engine
  up; or the engine answered with an internal error, as vLLM's API server does when its engine core has died. It counts
  only if the engine is then found dead: a proxy in between may have cut the connection, and an engine may survive an
  error.
- A leg that has produced `PROGRESS` tokens or more did not end its engine, so the count starts again. A long stream
  thus survives a restart of every engine of its pool, one after the other.
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
"""Tokens of one leg after which the end of its engine does not count against the request. A request that ends its
engine at one place of the answer, and is continued there, gets fewer."""

_SECOND_CHECK = 0.1  # seconds after which an engine that has failed is checked again: it may be about to end

Cuts = dict[str, list[tuple[Backend, "asyncio.Task[bool]"]]]
"""The engines that may have died with a request, by leg, each with the check whether it was alive right after."""


class Suspicion:
    """Decides which requests must not go to another engine.

    Arguments:
        after_cut: engines that a request may be sent to after one has ended with a leg of it.
        lives: whether an engine answers its health check now.
    """

    def __init__(self, after_cut: int, is_alive: Callable[[Backend], Awaitable[bool]]) -> None:
        self._after_cut = after_cut
        self._is_alive = is_alive
        self._checks: dict[Backend, asyncio.Task[bool]] = {}  # running; one for all requests of an engine

    async def close(self) -> None:
        """Cancel the checks that run."""
        checks = list(self._checks.values())
        for check in checks:
            check.cancel()
        await asyncio.gather(*checks, return_exceptions=True)

    def note(self, cuts: Cuts | None, leg: str, backend: Backend, error: BackendError, gained: int = 0) -> Cuts | None:
        """Note a leg that has failed. Returns the engines that may have died with its request.

        Arguments:
            gained: tokens that the leg had produced.
        """
        if error.unread or error.leaves or not isinstance(error, BackendCut | BackendLost | BackendFailed):
            return cuts
        cuts = {} if cuts is None else cuts
        before = [] if gained >= PROGRESS else cuts.get(leg, [])
        cuts[leg] = [*before, (backend, self._check(backend))]
        return cuts

    async def engines_ended(self, cuts: Cuts) -> list[str]:
        """The URLs of the engines that a request has ended, if they are too many for another try; else an empty
        list."""
        for leg, suspects in cuts.items():
            if len({backend for backend, _ in suspects}) <= self._after_cut:
                continue
            alive = await asyncio.gather(*(check for _, check in suspects), return_exceptions=True)
            cuts[leg] = dead = [one for one, is_alive in zip(suspects, alive, strict=True) if is_alive is False]
            urls = list(dict.fromkeys(backend.url for backend, _ in dead))
            if len(urls) > self._after_cut:
                return urls
        return []

    async def any_dead(self, suspects: Iterable[Backend]) -> bool:
        """Whether at least one of these engines is dead now."""
        return not all(await asyncio.gather(*map(self._is_alive, suspects)))

    def _check(self, backend: Backend) -> asyncio.Task[bool]:
        """The check whether an engine stays alive, shared by all requests that failed there."""
        if (check := self._checks.get(backend)) is None:
            check = self._checks[backend] = asyncio.create_task(
                self._stays_alive(backend), name=f"check of {backend.url}"
            )
            check.add_done_callback(lambda _: self._checks.pop(backend, None))
        return check

    async def _stays_alive(self, backend: Backend) -> bool:
        """Whether an engine stays alive. One that is about to end may still answer a health check, so there are two."""
        if not await self._is_alive(backend):
            return False
        await asyncio.sleep(_SECOND_CHECK)
        return await self._is_alive(backend)


def warn(record: RequestRecord, size: int, ended: list[str]) -> None:
    """Log a request that is sent to no other engine. Of its content only the size is logged.

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
