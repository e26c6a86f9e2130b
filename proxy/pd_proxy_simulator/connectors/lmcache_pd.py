"""LMCache's prefill-decode mode: prefill writes the KV that it has computed to the receiver that its request names.

The receiver's handshake port and memory port are both the side port here. A receiver finds a prompt from the moment it
has allocated memory for it: a request that reads the memory before it is written reads wrong KV. KV is deleted when it
is read.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from pd_proxy_simulator.blocks import Content
from pd_proxy_simulator.connectors.engine import ConnectorEngine
from pd_proxy_simulator.connectors.messages import send, sender
from pd_proxy_simulator.connectors.side import Side
from pd_proxy_simulator.sequences import Sequence
from pd_proxy_simulator.sidechannel import TransferFailed
from pd_proxy_simulator.tokens import boundary_states
from pd_proxy_simulator.transfers import Transfer

logger = logging.getLogger(__name__)

_NEEDED = ("req_id", "receiver_host", "receiver_init_port", "receiver_alloc_port")
_MOST = 256  # prompts that a receiver holds memory for; the oldest is evicted first


class LMCachePD(Side):
    """LMCacheConnectorV1 with `enable_pd`: a sender in the role prefill, a receiver in the role decode."""

    kept_after = ("length", "stop")  # while they are being written

    def __init__(self, engine: ConnectorEngine) -> None:
        super().__init__(engine)
        self._proxy: Any = None
        self._ready = asyncio.Event()
        self._received: dict[int, list[Content]] = {}

    def start(self) -> None:
        if self.engine.config.role != "decode" and self.engine.config.proxy:
            self.engine.spawn(self._hold_proxy())

    async def _hold_proxy(self) -> None:
        with sender("PUSH", self.engine.config.proxy) as self._proxy:
            await asyncio.Event().wait()

    def transfer(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> Transfer:
        params = body.get("kv_transfer_params")
        if self.engine.config.role == "decode":
            return Transfer("decode")  # every prompt is looked up
        if isinstance(params, dict) and "disagg_spec" in params:
            return Transfer("prefill", params)
        return Transfer()

    # The sender

    def submitted(self, sequence: Sequence) -> None:
        if sequence.transfer.fetches:
            if self._name(sequence) not in self._received:
                sequence.transfer = Transfer()
            return
        spec = sequence.transfer.params["disagg_spec"]
        if not isinstance(spec, dict):
            self.engine.die(f"TypeError: disagg_spec {spec!r}")
            return
        if missing := [name for name in _NEEDED if name not in spec]:
            self.engine.die(f"KeyError: {missing[0]!r}")

    def key(self, sequence: Sequence) -> str:
        return str(sequence.transfer.params["disagg_spec"]["req_id"])

    def kept(self, sequence: Sequence, tokens: int) -> dict[str, Any] | None:
        size = self.engine.config.block_size
        boundaries = boundary_states(self.engine.origin, sequence.tokens[:tokens], size)[0]
        contents = [
            (boundaries[index], sequence.tokens[index * size : min(index * size + size, tokens)], sequence.error)
            for index in range(len(sequence.kept))
        ]
        name = self._name(sequence)
        self.engine.spawn(self._write(sequence.transfer.params["disagg_spec"], name, contents, tokens))
        return {"first_tok": sequence.tokens[-1]} if sequence.transfer.params.get("ret_first_tok") else None

    async def _write(self, spec: Mapping[str, Any], name: int, contents: list[Content], tokens: int) -> None:
        """Write a prompt's KV to its receiver, rank by rank, and notify the gateway."""
        engine, config = self.engine, self.engine.config
        host, init, alloc = spec["receiver_host"], spec["receiver_init_port"], spec["receiver_alloc_port"]
        pause = tokens / config.transfer_rate if config.transfer_rate else 0.0
        written = False
        try:
            for rank in range(config.tp):
                try:
                    ports = int(init[rank]), int(alloc[rank])
                except (IndexError, TypeError, ValueError) as error:
                    engine.die(f"{error!r}: no receiver for rank {rank} in {spec}")
                    return
                await engine.peers.ask(host, ports[0], {"op": "hello"})
                await engine.peers.ask(host, ports[1], {"op": "alloc", "name": name, "blocks": len(contents)})
                await engine.peers.ask(host, ports[1], {"op": "write", "name": name, "contents": contents}, pause)
            written = True
        except TransferFailed as error:
            logger.warning("cannot write: %s", error)
            engine.stats.failed_transfers += 1
            return
        finally:
            engine.handoffs.done(str(spec["req_id"]), read=written)
        for _ in range(config.tp):
            if self._proxy is None or not send(self._proxy, {"type": "ProxyNotif", "req_id": str(spec["req_id"])}):
                engine.stats.failed_notifications += 1

    # The receiver

    def on_message(self, message: Mapping[str, Any]) -> dict[str, Any] | None:
        match message["op"]:
            case "alloc":
                while len(self._received) >= _MOST:
                    del self._received[next(iter(self._received))]
                if message["name"] not in self._received:
                    self._received[message["name"]] = [(0, [0], 1)] * message["blocks"]  # the memory's previous content
            case "write":
                if message["name"] in self._received:
                    self._received[message["name"]] = [
                        (before, tokens, error) for before, tokens, error in message["contents"]
                    ]
        return {}

    def load(self, sequence: Sequence) -> None:
        contents = self._received.pop(self._name(sequence), None)
        if contents is None:  # another request with the same prompt has read it
            self.engine.compute(sequence)
            return
        wanted = contents[sequence.cached // self.engine.config.block_size :]

        async def found() -> list[Content]:
            return wanted

        self.engine.fetch(sequence, found())

    def release_unread(self, transfer: Transfer) -> None:
        """Prefill is not notified: the KV stays here until its memory is needed."""

    def _name(self, sequence: Sequence) -> int:
        """The name by which a prompt's KV is found."""
        prompt = sequence.tokens[: sequence.prompt_length]
        return boundary_states(self.engine.origin, prompt, self.engine.config.block_size)[1] ^ sequence.cache_key
