"""The connectors by which decode pulls: vLLM's NixlConnector, and vllm-ascend's MooncakeConnectorV1.

Prefill answers with the numbers of its blocks. Decode reads them at the side port, and notifies prefill when it has.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pd_proxy_simulator.connectors.engine import ConnectorEngine
from pd_proxy_simulator.connectors.side import Side, vllm_leg
from pd_proxy_simulator.sequences import Sequence
from pd_proxy_simulator.transfers import Transfer

logger = logging.getLogger(__name__)

_ADDRESS = ("remote_engine_id", "remote_request_id", "remote_host", "remote_port")


@dataclass(frozen=True, slots=True)
class RemotePrefill:
    """The parameters with which a decode leg asks for KV, as they came; their types are not checked."""

    params: dict[str, Any]

    @property
    def missing(self) -> list[str]:
        """The names of the parts of the address that are missing."""
        return [name for name in _ADDRESS if name not in self.params]

    @property
    def block_ids(self) -> Any:
        """`remote_block_ids` as sent."""
        return self.params.get("remote_block_ids")

    @property
    def host(self) -> str:
        """The host of the side channel."""
        return str(self.params.get("remote_host"))

    @property
    def port(self) -> int:
        """The side channel's port; 0, where nothing listens, if it is not a number."""
        try:
            port = int(self.params.get("remote_port") or 0)
        except (TypeError, ValueError):
            return 0
        return port if 0 < port < 65536 else 0

    @property
    def engine_id(self) -> str:
        """The id of the engine that has the KV."""
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
        """How many prompt tokens prefill had in its prefix cache, if it said so."""
        cached = self.params.get("remote_prefill_cached_tokens")
        return cached if isinstance(cached, int) else None


class Pull(Side):
    """What the two connectors have in common."""

    def transfer(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> Transfer:
        leg = vllm_leg(body)
        return Transfer(leg, RemotePrefill(body["kv_transfer_params"]) if leg == "decode" else None)

    def load(self, sequence: Sequence) -> None:
        remote: RemotePrefill = sequence.transfer.params
        if not remote.block_ids:
            self.no_blocks()
            return
        if remote.missing:
            logger.warning("hand-off without %s: its KV is not loaded", ", ".join(remote.missing))
            return
        too_few = "num_decode_blocks <= len(prefill_group) (base_worker.py:3453)"
        blocks = self.blocks_to_read(sequence, remote.block_ids, too_few)
        if blocks is None:
            return
        fetch = self.engine.peers.fetch(
            remote.host,
            remote.port,
            remote.engine_id,
            remote.request_id,
            blocks,
            sequence.prompt_length - sequence.cached,
        )
        self.engine.fetch(sequence, fetch)

    def no_blocks(self) -> None:
        """Handle a decode leg without block ids that is to be loaded."""

    def loaded(self, sequence: Sequence) -> None:
        sequence.remote_cached = sequence.transfer.params.cached_tokens

    def stuck(self, sequence: Sequence) -> bool:
        return bool(sequence.transfer.params.missing)

    def release_unread(self, transfer: Transfer) -> None:
        remote: RemotePrefill = transfer.params
        if remote.missing or not remote.block_ids:
            if remote.missing and remote.block_ids:
                self.incomplete(remote.missing[0])
            return
        self.engine.spawn(self.notify(remote.host, remote.port, remote.request_id))

    def incomplete(self, missing: str) -> None:
        """Handle a hand-off that has blocks but lacks a part of its address, and is to be released unread."""


class Nixl(Pull):
    """NixlConnector: its scheduler asserts that parameters are complete, and renews the leases of requests that
    wait."""

    kept_after = ("length", "stop")

    def __init__(self, engine: ConnectorEngine) -> None:
        super().__init__(engine)
        self._beating: dict[Sequence, RemotePrefill] = {}
        self._heart: asyncio.Task[None] | None = None

    def kept(self, sequence: Sequence, tokens: int) -> dict[str, Any]:
        engine = self.engine
        return {
            **self.kept_address(sequence),
            "remote_request_id": sequence.request_id,
            "remote_port": engine.side_port,
            "tp_size": 1,
            "dcp_size": 1,
            "pp_size": 1,
            "remote_num_tokens": tokens,
            "remote_blocks_expiry_time": None,
            "transfer_mode": "pull",
            **({"remote_prefill_cached_tokens": sequence.cached} if engine.config.handoff_cached else {}),
        }

    def no_blocks(self) -> None:
        self.engine.die("AssertionError: num_external_tokens == 0 (pull_scheduler.py:186)")

    def incomplete(self, missing: str) -> None:
        self.engine.die(f"KeyError: {missing!r}")

    def submitted(self, sequence: Sequence) -> None:
        remote: RemotePrefill | None = sequence.transfer.params
        if remote is not None and remote.has_heartbeats:
            self._beating[sequence] = remote
            if self._heart is None or self._heart.done():
                self._heart = self.engine.spawn(self._beat())

    def ended(self, sequence: Sequence) -> None:
        self._beating.pop(sequence, None)

    def loaded(self, sequence: Sequence) -> None:
        super().loaded(sequence)
        self._beating.pop(sequence, None)

    async def _beat(self) -> None:
        while self._beating:
            await asyncio.sleep(self.engine.config.lease_seconds / 6)
            peers: dict[tuple[str, int], list[str]] = {}
            for remote in self._beating.values():
                peers.setdefault((remote.host, remote.port), []).append(remote.request_id)
            for (host, port), request_ids in peers.items():
                await self.engine.peers.notify(host, port, {"op": "beat", "request_ids": request_ids})


class MooncakeAscend(Pull):
    """MooncakeConnectorV1: keeps the blocks of requests that ended because of their length, and of no others."""

    kept_after = ("length",)

    def kept(self, sequence: Sequence, tokens: int) -> dict[str, Any]:
        engine = self.engine
        return {
            **self.kept_address(sequence),
            "remote_request_id": sequence.request_id,
            "remote_port": engine.side_port,
            "remote_pcp_size": 1,
            "remote_dcp_size": 1,
            "remote_ptp_size": 1,
            "last_token_id": sequence.tokens[-1],
            "remote_multi_nodes_meta_mapping": {},
            "num_prompt_blocks": len(sequence.kept),
            "remote_block_size": engine.config.block_size,
        }
