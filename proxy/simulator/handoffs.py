"""Hand-offs: what prefill pins for a decode engine and for how long, and what decode is told to fetch.

Invariant: a hand-off is pinned once and released once: pulled, let go unread, or expired. Renewing only ever lengthens.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from proxy.simulator.blocks import Block, BlockPool
from proxy.simulator.config import SimulatorConfig

_ADDRESS = ("remote_engine_id", "remote_request_id", "remote_host", "remote_port")


@dataclass(frozen=True, slots=True)
class RemotePrefill:
    """The parameters with which a decode leg asks for KV, as they came; they may be anything."""

    params: dict[str, Any]

    @property
    def missing(self) -> list[str]:
        """The parts of the address that are not there at all."""
        return [name for name in _ADDRESS if name not in self.params]

    @property
    def block_ids(self) -> Any:
        """``remote_block_ids`` as given."""
        return self.params.get("remote_block_ids")

    @property
    def host(self) -> str:
        """Where the side channel is."""
        return str(self.params.get("remote_host"))

    @property
    def port(self) -> int:
        """The side channel's port; 0, which nobody listens on, if it is no number."""
        try:
            port = int(self.params.get("remote_port") or 0)
        except (TypeError, ValueError):
            return 0
        return port if 0 < port < 65536 else 0

    @property
    def engine_id(self) -> str:
        """Whose KV it is."""
        return str(self.params.get("remote_engine_id"))

    @property
    def request_id(self) -> str:
        """Prefill's name for the hand-off."""
        return str(self.params.get("remote_request_id"))

    @property
    def has_heartbeats(self) -> bool:
        """Whether decode renews the lease while the request waits."""
        return not self.missing and "tp_size" in self.params and self.port > 0

    @property
    def cached_tokens(self) -> int | None:
        """How many prompt tokens prefill had in its prefix cache, if it said."""
        cached = self.params.get("remote_prefill_cached_tokens")
        return cached if isinstance(cached, int) else None


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
        self.pinned_total = 0
        self.pulled = 0
        self.released_unread = 0
        self.expired = 0
        self.renewals = 0
        self.late_notifications = 0

    def __len__(self) -> int:
        return len(self._live)

    def pin(self, request_id: str, blocks: list[Block]) -> None:
        """Keep ``blocks`` (whose references pass over to the hand-off) until someone is done with them."""
        loop = asyncio.get_running_loop()
        lease = self._config.lease_seconds
        pinned = _Pinned(blocks, loop.time() + lease)
        pinned.timer = loop.call_at(pinned.expires, self._look, request_id)
        self._live[request_id] = pinned
        self.pinned_total += 1
        self._pool.pin(blocks)

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
        """A heartbeat: each lease lasts another two thirds from now."""
        expires = asyncio.get_running_loop().time() + self._config.lease_seconds * 2 / 3
        for request_id in request_ids:
            pinned = self._live.get(request_id)
            if pinned is not None:
                self.renewals += 1
                pinned.expires = max(pinned.expires, expires)
        self._changed()

    def done(self, request_id: str, *, read: bool) -> None:
        """Decode needs the hand-off no more."""
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
        """Let every lease run out now."""
        for request_id in list(self._live):
            self._release(request_id)
            self.expired += 1
        self._changed()

    def close(self) -> None:
        """Forget everything, uncounted: the process is gone."""
        for request_id in list(self._live):
            self._release(request_id)

    def _release(self, request_id: str) -> None:
        pinned = self._live.pop(request_id)
        if pinned.timer is not None:
            pinned.timer.cancel()
        self._pool.unpin(pinned.blocks)
        self._pool.release(pinned.blocks)


def nixl_params(
    *, engine_id: str, request_id: str, host: str, port: int, blocks: list[Block], tokens: int, cached: int | None
) -> dict[str, Any]:
    """What NixlConnector's prefill answers with, field for field."""
    return {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_block_ids": [[block.index for block in blocks]],
        "remote_engine_id": engine_id,
        "remote_request_id": request_id,
        "remote_host": host,
        "remote_port": port,
        "tp_size": 1,
        "dcp_size": 1,
        "pp_size": 1,
        "remote_num_tokens": tokens,
        "remote_blocks_expiry_time": None,
        "transfer_mode": "pull",
        "remote_prefill_cached_tokens": cached,
    }


def mooncake_ascend_params(
    *,
    engine_id: str,
    request_id: str,
    host: str,
    port: int,
    blocks: list[Block],
    last_token: int,
    block_size: int,
) -> dict[str, Any]:
    """What vllm-ascend's MooncakeConnectorV1 answers with."""
    return {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_block_ids": [[block.index for block in blocks]],
        "remote_engine_id": engine_id,
        "remote_request_id": request_id,
        "remote_host": host,
        "remote_port": port,
        "remote_pcp_size": 1,
        "remote_dcp_size": 1,
        "remote_ptp_size": 1,
        "last_token_id": last_token,
        "remote_multi_nodes_meta_mapping": {},
        "num_prompt_blocks": len(blocks),
        "remote_block_size": block_size,
    }
