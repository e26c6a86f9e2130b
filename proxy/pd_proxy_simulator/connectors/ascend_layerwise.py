"""vllm-ascend's MooncakeLayerwiseConnector: decode reserves blocks and calls a metaserver; prefill pushes KV into the
blocks.

All layers are pushed in one piece here, once the prompt is computed. A real decode engine waits for the push for ever;
here a lease ends the wait. Decode holds the blocks of a request whose client has disconnected for as long, since they
may still be written to.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from pd_proxy_simulator.blocks import Content
from pd_proxy_simulator.connectors.engine import ConnectorEngine
from pd_proxy_simulator.connectors.side import Side, vllm_leg
from pd_proxy_simulator.sequences import Sequence
from pd_proxy_simulator.sidechannel import TransferFailed
from pd_proxy_simulator.transfers import Transfer

logger = logging.getLogger(__name__)

_CALLS = 3
_CALL_SECONDS = 5.0
_RANDOM_END = re.compile(r"-[0-9a-f]{8}$")


def external(request_id: str) -> str:
    """A request's id as its client sent it, by which both engines know it."""
    return _RANDOM_END.sub("", request_id)


class AscendLayerwise(Side):
    """MooncakeLayerwiseConnector.

    `calls`: the statuses that metaservers have answered with. `unclaimed_pushes`: pushes for requests that do not wait.
    """

    kept_after = ("length", "stop")

    def __init__(self, engine: ConnectorEngine) -> None:
        super().__init__(engine)
        self.calls: list[int] = []
        self.unclaimed_pushes = 0
        self._awaited: dict[str, asyncio.Future[list[Content]]] = {}

    def transfer(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> Transfer:
        leg = vllm_leg(body)
        return Transfer(leg, body["kv_transfer_params"] if leg != "local" else None)

    # Prefill

    def submitted(self, sequence: Sequence) -> None:
        if sequence.transfer.keeps and "remote_cached_tokens" not in sequence.transfer.params:
            self.engine.die("KeyError: 'remote_cached_tokens'")

    def kept(self, sequence: Sequence, tokens: int) -> None:
        # Blocks are kept only until they have been written to the decode engine.
        self.engine.spawn(self._push(sequence.request_id, sequence.transfer.params, sequence.kept))

    async def _push(self, request_id: str, params: dict[str, Any], blocks: list[Any]) -> None:
        engine = self.engine
        read = False
        try:
            skip = params["remote_cached_tokens"] // engine.config.block_size
            group = params["remote_block_ids"][0]
            contents = [engine.pool.read(block.index, scrambled_when_free=False) for block in blocks[skip:]]
            if engine.config.transfer_rate:
                await asyncio.sleep(len(contents) * engine.config.block_size / engine.config.transfer_rate)
            message = {"op": "push", "request_id": external(request_id), "contents": contents[: len(group) - skip]}
            await engine.peers.push(params["remote_host"], params["remote_port"], params["remote_engine_id"], message)
            read = True
        except (KeyError, IndexError, TypeError) as error:
            # the real connector's thread goes on; decode is not notified
            logger.error("cannot push %s: %r", request_id, error)
        except TransferFailed as error:
            logger.error("cannot push %s: %s", request_id, error)
            engine.stats.failed_transfers += 1
        finally:
            if engine.dead is None:
                engine.handoffs.done(request_id, read=read)

    # Decode

    def load(self, sequence: Sequence) -> None:
        self.engine.fetch(sequence, self._wait(sequence))

    async def _wait(self, sequence: Sequence) -> list[Content]:
        name = external(sequence.request_id)
        arrival = self._awaited[name] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(self.engine.config.lease_seconds):
                await self._call(sequence)
                contents: list[Content] = await arrival
                return contents
        except TimeoutError:
            raise TransferFailed(f"no engine has pushed {name}") from None
        finally:
            del self._awaited[name]

    def on_message(self, message: Mapping[str, Any]) -> dict[str, Any] | None:
        if message["op"] != "push":
            return None
        arrival = self._awaited.get(message["request_id"])
        if arrival is None or arrival.done():
            self.unclaimed_pushes += 1
        else:
            arrival.set_result([(before, tokens, error) for before, tokens, error in message["contents"]])
        return {"ack": True}

    async def _call(self, sequence: Sequence) -> None:
        """Post this engine's coordinates to the metaserver. The request goes on waiting whatever the metaserver
        answers."""
        config = self.engine.config
        message = {
            "token_ids": [],
            "request_id": external(sequence.request_id),
            "do_remote_prefill": False,
            "do_remote_decode": True,
            "remote_block_ids": [[block.index for block in sequence.blocks]],
            "remote_block_size": [config.block_size],
            "remote_engine_id": self.engine.id,
            "remote_host": config.advertised_host,
            "remote_port": self.engine.side_port,
            "remote_tp_size": 1,
            "remote_pcp_size": 1,
            "remote_dcp_size": 1,
            "remote_cached_tokens": sequence.cached,
        }
        url = sequence.transfer.params.get("metaserver")
        for _ in range(_CALLS):
            try:
                async with asyncio.timeout(_CALL_SECONDS):
                    self.calls.append(await _post(url, message))
                return
            except (OSError, EOFError, TimeoutError, ValueError) as error:
                logger.error("cannot call the metaserver %r: %r", url, error)


async def _post(url: Any, message: dict[str, Any]) -> int:
    """POST `message` as JSON; returns the status."""
    parts = urlsplit(url) if isinstance(url, str) else None
    if parts is None or parts.scheme != "http" or not parts.hostname:
        raise ValueError("no URL")
    body = json.dumps(message).encode()
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port or 80)
    try:
        head = f"POST {parts.path} HTTP/1.1\r\nhost: {parts.netloc}\r\ncontent-type: application/json\r\n"
        writer.write(f"{head}connection: close\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
        line = await reader.readuntil(b"\r\n")
        return int(line.split()[1])
    finally:
        writer.close()
