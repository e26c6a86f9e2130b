"""KV events: an engine publishes changes of its prefix cache over ZeroMQ, as vLLM with `--kv-events-config` and SGLang
do.

A batch is published for each step that changed the cache, as three parts: the topic, a sequence number (8 bytes,
big-endian, from 0 at each start of the engine), and msgpack `[time, events, data-parallel rank]`. A subscriber that has
missed some asks a second socket for the batches from a number on. The reply is all of these that are still kept and,
last, the number -1.

Both encodings of events that are in use are supported: a map with `type` (vLLM since 2026), and an array whose first
item is the type (vLLM before that, SGLang). The source is vLLM 0.32's `distributed/kv_events.py`.
"""

from __future__ import annotations

import asyncio
import importlib
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import msgspec

Encoding = Literal["map", "array"]
Hashes = Literal["int", "bytes"]

END = (-1).to_bytes(8, "big", signed=True)
"""The number that ends a replay."""


class CacheListener(Protocol):
    """The interface that is called when the prefix cache changes."""

    def stored(self, key: int, parent: int | None, tokens: Sequence[int], salt: str) -> None:
        """A block can be found from now on.

        Arguments:
            key, parent: its own hash, and that of the block before it; None for a prompt's first.
            salt: the request's `cache_salt`, or empty.
        """

    def removed(self, key: int) -> None:
        """A block cannot be found any more: its memory was given to another request."""

    def cleared(self) -> None:
        """No block can be found any more."""


class NullListener:
    """A listener that does nothing."""

    def stored(self, key: int, parent: int | None, tokens: Sequence[int], salt: str) -> None:
        pass

    def removed(self, key: int) -> None:
        pass

    def cleared(self) -> None:
        pass


class Publisher:
    """Publishes the changes of one engine's prefix cache. A new publisher is that of a restarted engine: it counts from
    0 again.

    Arguments:
        port, replay_port: where batches are published, and where missed ones are asked for; 0 takes any free port.
        buffer: how many batches are kept for replay.
    Attributes:
        sequence: the number of the next batch.
        lose: how many of the next batches are kept but not sent, as if lost on the way.
        subscriptions: how many subscriptions came; a subscriber receives what is published after its subscription.
    """

    def __init__(
        self,
        host: str,
        port: int,
        replay_port: int,
        *,
        topic: str = "",
        encoding: Encoding = "map",
        hashes: Hashes = "int",
        block_size: int = 16,
        buffer: int = 10_000,
        rank: int = 0,
    ) -> None:
        self._zmq = zmq = importlib.import_module("zmq")
        self._loop = asyncio.get_running_loop()
        self._topic = topic.encode()
        self._encoding = encoding
        self._hashes = hashes
        self._block_size = block_size
        self._rank = rank
        self._events: list[object] = []
        self._buffer: deque[tuple[bytes, bytes]] = deque(maxlen=buffer)
        self._flushing: asyncio.Handle | None = None
        self.sequence = 0
        self.lose = 0
        self.subscriptions = 0
        self._context = zmq.Context(io_threads=1)
        try:
            # Like a PUB socket, but it reports subscribers: a connected peer may not have subscribed yet.
            self._pub, self.port = self._bind(zmq.XPUB, host, port)
            self._router, self.replay_port = self._bind(zmq.ROUTER, host, replay_port)
        except BaseException:
            self._context.destroy(linger=0)
            raise
        self._files = {self._router.getsockopt(zmq.FD): self._answer, self._pub.getsockopt(zmq.FD): self._listen}
        for file, read in self._files.items():
            self._loop.add_reader(file, read)
            read()  # the socket's descriptor signals changes only, not states

    def _bind(self, kind: int, host: str, port: int) -> tuple[Any, int]:
        zmq = self._zmq
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.IPV6, int(":" in host))
        shown = f"[{host}]" if ":" in host else host
        try:
            socket.bind(f"tcp://{shown}:{port or '*'}")
        except zmq.ZMQError as error:
            raise OSError(error.errno, f"KV events at {shown}:{port}: {error}") from None
        return socket, int(socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])

    def close(self) -> None:
        """Close the sockets; batches that were not published yet are lost."""
        for file in self._files:
            self._loop.remove_reader(file)
        if self._flushing is not None:
            self._flushing.cancel()
        self._context.destroy(linger=0)

    def stored(self, key: int, parent: int | None, tokens: Sequence[int], salt: str) -> None:
        first = parent is None
        self._record(
            {
                "type": "BlockStored",
                "block_hashes": [self._hash(key)],
                "parent_block_hash": None if parent is None else self._hash(parent),
                "token_ids": list(tokens),
                "block_size": self._block_size,
                "lora_id": None,
                "medium": "GPU",
                "lora_name": None,
                "extra_keys": [[salt] if salt and first else None],
                "group_idx": 0,
                "kv_cache_spec_kind": "full_attention",
            }
        )

    def removed(self, key: int) -> None:
        self._record({"type": "BlockRemoved", "block_hashes": [self._hash(key)], "medium": "GPU", "group_idx": 0})

    def cleared(self) -> None:
        self._record({"type": "AllBlocksCleared"})

    def _hash(self, key: int) -> int | bytes:
        return key if self._hashes == "int" else key.to_bytes(32, "big")

    def _record(self, event: dict[str, object]) -> None:
        self._events.append(event if self._encoding == "map" else list(event.values()))
        if self._flushing is None:  # one batch for all events of one turn of the event loop
            self._flushing = self._loop.call_soon(self.flush)

    def flush(self) -> None:
        """Publish the collected events as one batch."""
        if self._flushing is not None:
            self._flushing.cancel()
            self._flushing = None
        if self._events:
            events, self._events = self._events, []
            self.publish(msgspec.msgpack.encode([time.time(), events, self._rank]))

    def publish(self, payload: bytes) -> None:
        """Publish an encoded batch, or any other payload."""
        number = self.sequence.to_bytes(8, "big")
        self.sequence += 1
        self._buffer.append((number, payload))
        if self.lose:
            self.lose -= 1
            return
        self.send(self._topic, number, payload)

    def send(self, *parts: bytes) -> None:
        """Send a message of any parts."""
        self._pub.send_multipart(parts, self._zmq.NOBLOCK)
        self._listen()

    def _listen(self) -> None:
        """Count subscriptions."""
        while True:
            try:
                self.subscriptions += self._pub.recv(self._zmq.NOBLOCK)[:1] == b"\1"
            except self._zmq.Again:
                return

    def _answer(self) -> None:
        """Answer requests for a replay."""
        zmq = self._zmq
        while True:
            try:
                parts = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if len(parts) != 3:
                continue
            who, _, start = parts
            for number, payload in self._buffer:
                if number >= start:
                    self._router.send_multipart((who, b"", self._topic, number, payload), zmq.NOBLOCK)
            self._router.send_multipart((who, b"", b"", END, b""), zmq.NOBLOCK)
