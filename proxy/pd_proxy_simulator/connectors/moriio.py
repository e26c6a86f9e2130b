"""vLLM's MoRIIOConnector in its two modes: decode reads from prefill, or prefill writes to blocks that decode names.

The handshake port and the notification port are both the side port here, and the data-parallel rank is always 0.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any, ClassVar

from pd_proxy_simulator.blocks import Content
from pd_proxy_simulator.connectors.engine import ConnectorEngine
from pd_proxy_simulator.connectors.registering import Registering
from pd_proxy_simulator.connectors.side import vllm_transfer
from pd_proxy_simulator.sequences import Sequence
from pd_proxy_simulator.sidechannel import TransferFailed
from pd_proxy_simulator.transfers import Transfer

logger = logging.getLogger(__name__)

_NEEDED = ("transfer_id", "remote_block_ids", "remote_engine_id")
_ADDRESS = ("remote_host", "remote_handshake_port", "remote_notify_port")


class MoRIIO(Registering):
    """What the two modes have in common."""

    mode: ClassVar[str]
    kept_after = ("length",)

    def registration(self) -> dict[str, Any]:
        host, port = self.engine.config.advertised_host, self.engine.side_port
        return {
            **super().registration(),
            "zmq_address": f"host:{host},handshake:{port},notify:{port}",
            "dp_size": 1,
            "tp_size": self.engine.config.tp,
            "transfer_mode": self.mode,
        }

    def transfer(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> Transfer:
        return vllm_transfer(body)

    def submitted(self, sequence: Sequence) -> None:
        params = sequence.transfer.params
        if params is None:
            return
        role, leg = self.engine.config.role, sequence.transfer.leg
        if role not in ("mixed", leg):
            self.engine.die(f"AssertionError: a {leg} request at a {role} engine")
        elif missing := [name for name in _NEEDED if name not in params]:
            self.engine.die(f"KeyError: {missing[0]!r}")
        elif any(params.get(name) is None for name in _ADDRESS):
            self.engine.die("ValueError: cannot parse peer zmq_address from request_id")
        elif not all(str(params[name]).isdigit() for name in _ADDRESS[1:]):
            self.engine.die("ValueError: invalid literal for int()")

    def key(self, sequence: Sequence) -> str:
        return str(sequence.transfer.params["transfer_id"])

    def kept(self, sequence: Sequence, tokens: int) -> dict[str, Any] | None:
        engine = self.engine
        return {
            **self.kept_address(sequence),
            "remote_handshake_port": engine.side_port,
            "remote_notify_port": engine.side_port,
            "remote_dp_rank": 0,
            "remote_dp_rank_override": True,
            "remote_dp_size": 1,
            "remote_dp_size_local": 1,
            "tp_size": engine.config.tp,
            "transfer_id": sequence.transfer.params["transfer_id"],
        }

    def release_unread(self, transfer: Transfer) -> None:
        params = transfer.params
        if params is None or any(params.get(name) is None for name in (*_ADDRESS, "transfer_id")):
            return
        self.engine.spawn(
            self.notify(str(params["remote_host"]), int(params["remote_notify_port"]), str(params["transfer_id"]))
        )


class MoRIIORead(MoRIIO):
    """The mode `read_mode: true`. A decode engine takes every request as one whose KV has been handed over."""

    mode = "READ"

    def transfer(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> Transfer:
        transfer = super().transfer(body, headers)
        return Transfer("decode") if transfer.leg == "local" and self.engine.config.role == "decode" else transfer

    def load(self, sequence: Sequence) -> None:
        params, size = sequence.transfer.params, self.engine.config.block_size
        if params is None or not params["remote_block_ids"]:
            self.engine.fetch(sequence, _nothing(len(sequence.blocks) - sequence.cached // size))
            return
        too_few = "len(local_block_ids) <= len(remote_block_ids)"
        blocks = self.blocks_to_read(sequence, params["remote_block_ids"], too_few)
        if blocks is None:
            return
        fetch = self.engine.peers.fetch(
            str(params["remote_host"]),
            int(params["remote_handshake_port"]),
            str(params["remote_engine_id"]),
            str(params["transfer_id"]),
            blocks,
            sequence.prompt_length - sequence.cached,
        )
        self.engine.fetch(sequence, fetch)


async def _nothing(blocks: int) -> list[Content]:
    """The content of blocks that were never written to."""
    return [(0, [0], 1)] * blocks


class MoRIIOWrite(MoRIIO):
    """The default mode: decode names its blocks to prefill, and prefill writes to them."""

    mode = "WRITE"

    def __init__(self, engine: ConnectorEngine) -> None:
        super().__init__(engine)
        self._named: dict[str, int] = {}  # by transfer: how many blocks decode has cached
        self._computed: dict[str, Sequence] = {}
        self._waiting: dict[str, asyncio.Future[list[Content]]] = {}

    # Prefill

    def kept(self, sequence: Sequence, tokens: int) -> dict[str, Any] | None:
        self._computed[self.key(sequence)] = sequence
        self._write_if_both(self.key(sequence))
        return super().kept(sequence, tokens)

    def dropped(self, sequence: Sequence) -> None:
        self._named.pop(self.key(sequence), None)

    def _write_if_both(self, name: str) -> None:
        """Write the KV once it has been computed and decode has named its blocks."""
        if name in self._computed and name in self._named:
            sequence, skip = self._computed.pop(name), self._named.pop(name)
            read = self.engine.pool.read
            contents = [read(block.index, scrambled_when_free=True) for block in sequence.kept[skip:]]
            self.engine.spawn(self._write(name, sequence.transfer.params, contents, sequence.prompt_length))

    async def _write(self, name: str, params: Mapping[str, Any], contents: list[Content], tokens: int) -> None:
        engine, rate = self.engine, self.engine.config.transfer_rate
        message = {"op": "write", "transfer_id": name, "contents": contents}
        host, port = str(params["remote_host"]), int(params["remote_notify_port"])
        try:
            await engine.peers.ask(host, port, message, tokens / rate if rate else 0.0)
        except TransferFailed as error:
            logger.warning("cannot write: %s", error)  # the blocks stay until their lease ends
            engine.stats.failed_transfers += 1
        else:
            engine.handoffs.done(name, read=True)

    # Decode

    def load(self, sequence: Sequence) -> None:
        skip = sequence.cached // self.engine.config.block_size
        self.engine.fetch(sequence, self._written(sequence.transfer.params, skip))

    async def _written(self, params: Mapping[str, Any], skip: int) -> list[Content]:
        """Name the blocks, and wait until they have been written.

        Raises:
            TransferFailed: they were not written before the lease ended.
        """
        name, host, port = str(params["transfer_id"]), str(params["remote_host"]), int(params["remote_notify_port"])
        rank = params.get("remote_dp_rank", 0)
        done: asyncio.Future[list[Content]] = asyncio.get_running_loop().create_future()
        self._waiting[name] = done
        try:
            async with asyncio.timeout(self.engine.config.lease_seconds):
                await self.engine.peers.ask(
                    host, port, {"op": "blocks", "transfer_id": name, "skip": skip, "rank": rank}
                )
                await done
                return done.result()
        except TimeoutError:
            raise TransferFailed(f"no engine has written {name}") from None
        finally:
            del self._waiting[name]

    def on_message(self, message: Mapping[str, Any]) -> dict[str, Any] | None:
        name = message["transfer_id"]
        match message["op"]:
            case "blocks" if message["rank"] == 0:  # a message for another rank reaches no rank that has the request
                self._named[name] = message["skip"]
                self._write_if_both(name)
            case "write" if name in self._waiting and not self._waiting[name].done():
                contents = [(before, tokens, error) for before, tokens, error in message["contents"]]
                self._waiting[name].set_result(contents)
        return {}
