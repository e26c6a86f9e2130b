"""The side channel between two engines: prefill serves its KV on a port of its own; decode reads it there and notifies
prefill.

Frames are msgpack after a four-byte length. Invariant: a decode engine learns nothing here that a real one would not:
blocks are read by number, and no answer says whether they still belong to the request.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from typing import Any, Protocol, cast

import msgspec
from pd_proxy.decoding import msgpack_decoder

from pd_proxy_simulator.blocks import Block, BlockPool, Content
from pd_proxy_simulator.config import SimulatorConfig
from pd_proxy_simulator.faults import NOTHING, Faults
from pd_proxy_simulator.handoffs import Handoffs
from pd_proxy_simulator.resetting import reset

_encode = msgspec.msgpack.Encoder().encode
_decode: Callable[[bytes], dict[str, Any]] = msgpack_decoder(Any)
_LENGTH = struct.Struct(">I")


class TransferFailed(Exception):
    """The KV could not be fetched. The load failure policy decides what follows."""


class OutOfRange(Exception):
    """A block number that the peer does not have: the real worker does not survive it."""


def frame(message: dict[str, Any]) -> bytes:
    """One message as bytes on the wire."""
    payload = _encode(message)
    return _LENGTH.pack(len(payload)) + payload


class ServedConnector(Protocol):
    """The connector whose engine serves a side channel."""

    def page(self, path: str) -> bytes | None:
        """The side port's JSON for a GET of `path`; None for 404."""

    def on_wait(self, name: str) -> None:
        """Called when decode waits for what is to be kept as `name`."""

    def extra_reply(self, name: str) -> dict[str, Any]:
        """Further values that decode receives with the KV that it has waited for."""


class SideChannelServer(asyncio.Protocol):
    """Prefill's end of one connection."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Not checked: uvloop's transports do not inherit from asyncio's.
        transport = cast(asyncio.Transport, transport)
        self._transport = transport
        if self._serving.closed:
            self.reset()  # accepted while the engine was being killed
            return
        self._serving.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._serving.connections.discard(self)

    def data_received(self, data: bytes) -> None:
        if self._serving.closed:
            return
        self._buffer += data
        if self._buffer.startswith(b"GET "):
            self._show_page()
            return
        while len(self._buffer) >= 4:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if len(self._buffer) < 4 + length:
                return
            message = _decode(bytes(self._buffer[4 : 4 + length]))
            del self._buffer[: 4 + length]
            faults = self._serving.faults
            injected = faults.draw("pull") if message["op"] == "hello" else NOTHING
            if injected.get("reset") is not None:
                self.reset()
                return
            if injected.get("hang") is not None or faults.lasting("hang", "pull"):
                return
            if message["op"] == "wait":
                self._serving.wait(message, self._send)
                continue
            answer = self._serving.answer(message)
            delay = injected.get("delay_first_byte")
            if answer is not None and delay is not None:
                asyncio.get_running_loop().call_later(delay.delay_s, self._send, answer)
            elif answer is not None:
                self._send(answer)

    def _show_page(self) -> None:
        """Answer an HTTP request: the port is the connector's bootstrap server too, where it has one."""
        head, end, _ = self._buffer.partition(b"\r\n\r\n")
        if not end or self._transport is None:
            return
        page = self._serving.side.page(head.split(b" ")[1].decode("latin-1"))
        status, body = ("404 Not Found", b"") if page is None else ("200 OK", page)
        fields = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close"
        self._transport.write(f"HTTP/1.1 {status}\r\n{fields}\r\n\r\n".encode() + body)
        self._transport.close()

    def _send(self, answer: dict[str, Any]) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame(answer))

    def reset(self) -> None:
        """Cut the connection."""
        if self._transport is not None:
            reset(self._transport)


class Serving:
    """Prefill's side channel: its answers, and its open connections."""

    def __init__(
        self,
        config: SimulatorConfig,
        engine_id: str,
        pool: BlockPool,
        handoffs: Handoffs,
        faults: Faults,
        side: ServedConnector,
        on_message: Callable[[dict[str, Any]], dict[str, Any] | None],
    ) -> None:
        self.faults = faults
        self.side = side
        self._on_message = on_message
        self._config = config
        self._engine_id = engine_id
        self._pool = pool
        self._handoffs = handoffs
        self.connections: set[SideChannelServer] = set()
        self.closed = False

    def close(self) -> None:
        """Cut every connection, and answer nothing more: a process that has ended serves no blocks."""
        self.closed = True
        for peer in list(self.connections):
            peer.reset()

    def wait(self, message: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> None:
        """Answer with the blocks of a hand-off by its name, without those that decode has, once the hand-off is
        pinned."""

        def take(blocks: list[Block]) -> None:
            wanted = blocks[message["skip"] :]
            contents = [self._pool.read(block.index, scrambled_when_free=False) for block in wanted]
            send({"contents": contents, **self.side.extra_reply(name)})

        name = message["request_id"]
        self._handoffs.when_pinned(name, take)
        self.side.on_wait(name)

    def answer(self, message: dict[str, Any]) -> dict[str, Any] | None:
        """The answer to one message; None for no answer."""
        match message["op"]:
            case "hello":
                config = self._config
                return {
                    "engine_id": self._engine_id,
                    "blocks": config.blocks,
                    "compatibility": compatibility(config),
                }
            case "read":
                scrambled = self._config.stale_reads == "wrong"
                read = self._pool.read
                return {"contents": [read(index, scrambled_when_free=scrambled) for index in message["block_ids"]]}
            case "beat":
                self._handoffs.renew(message["request_ids"])
            case "done":
                self._handoffs.done(message["request_id"], read=message["read"])
            case _:
                return self._on_message(message)
        return None


def compatibility(config: SimulatorConfig) -> str:
    """The values that must be equal on both sides for KV to be usable."""
    model = config.root or config.model
    return f"{config.version}/{model}/{config.weights}/{config.block_size}/{config.connector}"


class Peers:
    """Decode's side: fetches KV from any prefill engine, and remembers the engines with which a handshake succeeded."""

    def __init__(self, config: SimulatorConfig) -> None:
        self._config = config
        self._known: set[str] = set()
        # A peer that is up has at least one second to answer, however short a test sets the handshake timeout for
        # failures.
        self._answer_timeout = max(config.handshake_timeout, 1.0)

    async def fetch(
        self, host: str, port: int, engine_id: str, name: str, block_ids: list[int], tokens: int
    ) -> list[Content]:
        """Read blocks by number, and notify their owner that the hand-off `name` is no longer needed.

        Raises:
            TransferFailed: the engine is not reachable or is another one. It is raised at once if a handshake succeeded
                before, else after the handshake timeout, as with a real engine's sockets.
            OutOfRange: the peer has no such block.
        """
        read = {"op": "read", "block_ids": block_ids}
        return await self._fetch_or_wait_out(host, port, engine_id, name, read, block_ids, tokens)

    async def wait(
        self,
        host: str,
        port: int,
        engine_id: str,
        name: str,
        skip: int,
        tokens: int,
        *,
        on_answer: Callable[[dict[str, Any]], None] = lambda answer: None,
        acknowledge: bool = True,
    ) -> list[Content]:
        """Wait until the engine keeps a hand-off as `name`, at most for the length of a lease; read its blocks without
        the first `skip`.

        Arguments:
            engine_id: whose KV is read; empty for any engine's.
            on_answer: is called with the engine's answer.
            acknowledge: whether the engine is notified that the hand-off has been read.

        Raises:
            TransferFailed: as `fetch`.
        """
        question = {"op": "wait", "request_id": name, "skip": skip}
        return await self._fetch_or_wait_out(host, port, engine_id, name, question, [], tokens, on_answer, acknowledge)

    async def _fetch_or_wait_out(
        self,
        host: str,
        port: int,
        engine_id: str,
        name: str,
        question: dict[str, Any],
        block_ids: list[int],
        tokens: int,
        on_answer: Callable[[dict[str, Any]], None] = lambda answer: None,
        acknowledge: bool = True,
    ) -> list[Content]:
        began = asyncio.get_running_loop().time()
        try:
            return await self._fetch(host, port, engine_id, name, question, block_ids, tokens, on_answer, acknowledge)
        except (OSError, EOFError, TimeoutError) as error:
            if (engine_id or f"{host}:{port}") not in self._known:
                left = self._config.handshake_timeout - (asyncio.get_running_loop().time() - began)
                await asyncio.sleep(max(left, 0))
            raise TransferFailed(f"{host}:{port}: {error!r}") from error

    async def _fetch(
        self,
        host: str,
        port: int,
        engine_id: str,
        name: str,
        question: dict[str, Any],
        block_ids: list[int],
        tokens: int,
        on_answer: Callable[[dict[str, Any]], None],
        acknowledge: bool,
    ) -> list[Content]:
        if not port:
            raise ConnectionRefusedError("no such port")
        async with asyncio.timeout(self._answer_timeout):
            reader, writer = await asyncio.open_connection(host, port)
        try:
            async with asyncio.timeout(self._answer_timeout):
                hello = await _ask(reader, writer, {"op": "hello"})
            if engine_id and hello["engine_id"] != engine_id:
                raise ConnectionError("engine ID mismatch")
            if hello["compatibility"] != compatibility(self._config):
                raise TransferFailed("compatibility hash mismatch")
            self._known.add(engine_id or f"{host}:{port}")
            if any(not 0 <= index < hello["blocks"] for index in block_ids):
                raise OutOfRange(f"block ids {block_ids} out of range of {hello['blocks']} blocks")
            async with asyncio.timeout(self._config.lease_seconds if question["op"] == "wait" else None):
                answer = await _ask(reader, writer, question)
            if self._config.transfer_rate:
                await asyncio.sleep(tokens / self._config.transfer_rate)
            on_answer(answer)
            if acknowledge:
                writer.write(frame({"op": "done", "request_id": name, "read": True}))
            contents: list[Content] = [(before, tokens, error) for before, tokens, error in answer["contents"]]
            return contents
        finally:
            writer.close()

    async def embedding(self, host: str, port: int, key: str) -> list[int] | None:
        """The embedding that the encoder at `host` keeps as `key`; None where the encoder is not reachable or keeps
        none."""
        try:
            async with asyncio.timeout(self._answer_timeout):
                reader, writer = await asyncio.open_connection(host, port)
                try:
                    found: list[int] | None = (await _ask(reader, writer, {"op": "embedding", "key": key}))["found"]
                    return found
                finally:
                    writer.close()
        except (OSError, EOFError, TimeoutError):
            return None

    async def push(self, host: str, port: int, engine_id: str, message: dict[str, Any]) -> None:
        """Write KV into the engine at `host`; when this returns, the engine has accepted it.

        Raises:
            TransferFailed: the engine is not reachable, is another one, or did not accept it.
        """
        try:
            async with asyncio.timeout(self._answer_timeout):
                reader, writer = await asyncio.open_connection(host, port)
                try:
                    hello = await _ask(reader, writer, {"op": "hello"})
                    if hello["engine_id"] != engine_id or hello["compatibility"] != compatibility(self._config):
                        raise TransferFailed("another engine, or one of another kind")
                    await _ask(reader, writer, message)
                finally:
                    writer.close()
        except (OSError, EOFError, TimeoutError) as error:
            raise TransferFailed(f"{host}:{port}: {error!r}") from error

    async def ask(self, host: str, port: int, message: dict[str, Any], after: float = 0.0) -> dict[str, Any]:
        """The answer of an engine to one message that is not a fetch. The message is sent after `after` seconds.

        Raises:
            TransferFailed: nothing listens there, nothing answers, or the engine's KV is not compatible.
        """
        if not 0 < port < 65536:
            raise TransferFailed(f"{host}:{port}: no such port")
        try:
            async with asyncio.timeout(self._answer_timeout):
                reader, writer = await asyncio.open_connection(host, port)
            try:
                async with asyncio.timeout(self._answer_timeout):
                    hello = await _ask(reader, writer, {"op": "hello"})
                if hello["compatibility"] != compatibility(self._config):
                    raise TransferFailed("compatibility hash mismatch")
                await asyncio.sleep(after)
                async with asyncio.timeout(self._answer_timeout):
                    return await _ask(reader, writer, message)
            finally:
                writer.close()
        except (OSError, EOFError, TimeoutError) as error:
            raise TransferFailed(f"{host}:{port}: {error!r}") from error

    async def notify(self, host: str, port: int, message: dict[str, Any]) -> bool:
        """Send a notification; returns whether it could be sent."""
        try:
            async with asyncio.timeout(self._answer_timeout):
                _, writer = await asyncio.open_connection(host, port)
                writer.write(frame(message))
                await writer.drain()
                writer.close()
        except (OSError, TimeoutError):
            return False
        return True


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, message: dict[str, Any]) -> dict[str, Any]:
    writer.write(frame(message))
    (length,) = _LENGTH.unpack(await reader.readexactly(4))
    answer: dict[str, Any] = _decode(await reader.readexactly(length))
    return answer
