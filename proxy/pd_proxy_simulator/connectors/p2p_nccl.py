"""P2pNcclConnector of older vLLM: a request's id holds the addresses of its two engines, and prefill sends the KV to
decode.

Prefill starts sending when it has its token, and does not wait for the end (`PUT_ASYNC`). Decode waits for the KV of a
request with exactly that id; it takes every request as one with a hand-off.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Mapping
from typing import Any

from pd_proxy_simulator.blocks import Content
from pd_proxy_simulator.connectors.engine import ConnectorEngine
from pd_proxy_simulator.connectors.registering import Registering
from pd_proxy_simulator.sequences import Sequence
from pd_proxy_simulator.sidechannel import TransferFailed
from pd_proxy_simulator.transfers import Transfer

logger = logging.getLogger(__name__)

_DECODE = re.compile(r"___decode_addr_(.*):(\d+)")
_PREFILL = re.compile(r"___prefill_addr_(.*):(\d+)___")
_MOST = 256  # requests whose KV decode holds unread; the oldest is evicted first


class P2pNccl(Registering):
    """P2pNcclConnector: a transfer's `params` are the request's id."""

    kept_after = ("length", "stop")  # while they are being sent

    def __init__(self, engine: ConnectorEngine) -> None:
        super().__init__(engine)
        self._unread: dict[str, list[Content]] = {}
        self._waiting: dict[str, asyncio.Future[list[Content]]] = {}

    def transfer(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> Transfer:
        role = self.engine.config.role
        return Transfer("decode" if role == "decode" else "prefill", headers.get("x-request-id", ""))

    def submitted(self, sequence: Sequence) -> None:
        address = _PREFILL if sequence.transfer.fetches else _DECODE
        if address.search(sequence.transfer.params) is None:
            self.engine.die(f"ValueError: request id {sequence.transfer.params!r} does not contain hostname and port")

    # Prefill

    def kept(self, sequence: Sequence, tokens: int) -> dict[str, Any] | None:
        found = _DECODE.search(sequence.transfer.params)
        assert found is not None
        read = self.engine.pool.read
        contents = [read(block.index, scrambled_when_free=False) for block in sequence.kept]
        self.engine.spawn(
            self._send(found[1], int(found[2]), sequence.request_id, sequence.transfer.params, contents, tokens)
        )
        return None

    async def _send(self, host: str, port: int, key: str, name: str, contents: list[Content], tokens: int) -> None:
        engine, rate = self.engine, self.engine.config.transfer_rate
        sent = False
        try:
            message = {"op": "put", "name": name, "contents": contents}
            await engine.peers.ask(host.strip("[]"), port, message, tokens / rate if rate else 0.0)
            sent = True
        except TransferFailed as error:
            logger.warning("cannot send: %s", error)
            engine.stats.failed_transfers += 1
        finally:
            engine.handoffs.done(key, read=sent)

    # Decode

    def on_message(self, message: Mapping[str, Any]) -> dict[str, Any] | None:
        name = message["name"]
        contents = [(before, tokens, error) for before, tokens, error in message["contents"]]
        if (waiting := self._waiting.get(name)) is not None and not waiting.done():
            waiting.set_result(contents)
        else:
            while len(self._unread) >= _MOST:
                del self._unread[next(iter(self._unread))]
            self._unread[name] = contents
        return {}

    def load(self, sequence: Sequence) -> None:
        hits = sequence.cached // self.engine.config.block_size
        self.engine.fetch(sequence, self._received(sequence.transfer.params, hits))

    async def _received(self, name: str, hits: int) -> list[Content]:
        """Wait for the KV of a request.

        Raises:
            TransferFailed: it has not come before the lease ended; the real connector waits for ever.
        """
        if (contents := self._unread.pop(name, None)) is not None:
            return contents[hits:]
        done: asyncio.Future[list[Content]] = asyncio.get_running_loop().create_future()
        self._waiting[name] = done
        try:
            async with asyncio.timeout(self.engine.config.lease_seconds):
                return (await done)[hits:]
        except TimeoutError:
            raise TransferFailed(f"no engine has sent {name}") from None
        finally:
            del self._waiting[name]

    def release_unread(self, transfer: Transfer) -> None:
        """Prefill is not notified: the received KV stays until its memory is needed."""
