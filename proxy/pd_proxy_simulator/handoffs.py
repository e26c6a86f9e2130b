"""Hand-offs: which blocks prefill pins for a decode engine, and for how long.

Invariant: a hand-off is pinned once and released once: pulled, released unread, or expired. A renewal only lengthens a
lease.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pd_proxy_simulator.blocks import Block, BlockPool
from pd_proxy_simulator.config import SimulatorConfig


@dataclass(slots=True)
class _Pinned:
    blocks: list[Block]
    expires: float
    timer: asyncio.TimerHandle | None = None


class Handoffs:
    """Prefill's side: the hand-offs that have not been pulled yet."""

    def __init__(self, pool: BlockPool, config: SimulatorConfig, changed: Callable[[], None]) -> None:
        self._pool = pool
        self._config = config
        self._changed = changed
        self._live: dict[str, _Pinned] = {}
        self._wanted: dict[str, list[Callable[[list[Block]], None]]] = {}
        self.pinned_total = 0
        self.pulled = 0
        self.released_unread = 0
        self.expired = 0
        self.renewals = 0
        self.late_notifications = 0

    def __len__(self) -> int:
        return len(self._live)

    def pin(self, request_id: str, blocks: list[Block]) -> None:
        """Keep `blocks` until the hand-off is done or expires. Their references pass over to the hand-off.

        `request_id` is the name by which the two legs know the hand-off.
        """
        loop = asyncio.get_running_loop()
        lease = self._config.lease_seconds
        pinned = _Pinned(blocks, loop.time() + lease)
        pinned.timer = loop.call_at(pinned.expires, self._look, request_id)
        self._live[request_id] = pinned
        self.pinned_total += 1
        self._pool.pin(blocks)
        for take in self._wanted.pop(request_id, ()):
            take(blocks)

    def when_pinned(self, request_id: str, take: Callable[[list[Block]], None]) -> None:
        """Call `take` with the blocks of a hand-off: now, or when it is pinned."""
        if (pinned := self._live.get(request_id)) is not None:
            take(pinned.blocks)
        else:
            self._wanted.setdefault(request_id, []).append(take)

    def _look(self, request_id: str) -> None:
        pinned = self._live.get(request_id)
        if pinned is None:
            return
        loop = asyncio.get_running_loop()
        if loop.time() < pinned.expires:
            pinned.timer = loop.call_at(pinned.expires, self._look, request_id)
            return
        self._release(request_id)
        self.expired += 1
        self._changed()

    def renew(self, request_ids: Iterable[str]) -> None:
        """Renew leases after a heartbeat: each lasts another two thirds of its length from now."""
        expires = asyncio.get_running_loop().time() + self._config.lease_seconds * 2 / 3
        for request_id in request_ids:
            pinned = self._live.get(request_id)
            if pinned is not None:
                self.renewals += 1
                pinned.expires = max(pinned.expires, expires)
        self._changed()

    def done(self, request_id: str, *, read: bool) -> None:
        """Release a hand-off that decode no longer needs."""
        if request_id not in self._live:
            self.late_notifications += 1
            return
        self._release(request_id)
        if read:
            self.pulled += 1
        else:
            self.released_unread += 1
        self._changed()

    def expire_all(self) -> None:
        """Expire every lease now."""
        for request_id in list(self._live):
            self._release(request_id)
            self.expired += 1
        self._changed()

    def close(self) -> None:
        """Drop all hand-offs without counting them: the process has ended."""
        for request_id in list(self._live):
            self._release(request_id)

    def _release(self, request_id: str) -> None:
        pinned = self._live.pop(request_id)
        if pinned.timer is not None:
            pinned.timer.cancel()
        self._pool.unpin(pinned.blocks)
        self._pool.release(pinned.blocks)
