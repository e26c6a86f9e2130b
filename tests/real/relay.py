"""A TCP relay between the gateway and prefill, by which a test observes and times the traffic of that connection.

It passes bytes on unchanged. It only looks for the start of a POST (a prefill leg), and can hold the answers to those
until a test has done something meanwhile. So "the prefill engine dies between the legs" happens for certain, and is no
race. It runs in a thread of its own; its methods may be called from the test's.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)


@dataclass(slots=True)
class Leg:
    """One POST and its state."""

    answered: bool = False
    abandoned: bool = False
    """Whether the gateway closed the connection before it had the whole answer."""


@dataclass(slots=True)
class Relay:
    """The relay's address and the legs that it has passed on."""

    upstream: str
    url: str = ""
    legs: list[Leg] = field(default_factory=list)
    _server: asyncio.Server | None = None
    _held: int = 0
    _hold: int = 0
    _between: Callable[[], None] = lambda: None
    _released: asyncio.Event = field(default_factory=asyncio.Event)
    _connections: set[asyncio.Task[None]] = field(default_factory=set)

    def die_after(self, answers: int, kill: Callable[[], None]) -> None:
        """Hold the answers to POSTs; once there are this many, `kill` upstream, close the port, and pass them on."""
        self._hold, self._between = answers, kill

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _connection(self, gateway: asyncio.StreamReader, to_gateway: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        address = urlsplit(self.upstream)
        with closing(to_gateway):
            try:
                prefill, to_prefill = await asyncio.open_connection(address.hostname, address.port)
                with closing(to_prefill):
                    await self._pass_both_ways(gateway, to_gateway, prefill, to_prefill)
            except OSError:
                pass  # Either side has ended: the other one learns it by the close.
            finally:
                self._connections.discard(task)

    async def _pass_both_ways(
        self,
        gateway: asyncio.StreamReader,
        to_gateway: asyncio.StreamWriter,
        prefill: asyncio.StreamReader,
        to_prefill: asyncio.StreamWriter,
    ) -> None:
        open_legs: list[Leg] = []
        directions = {
            asyncio.create_task(self._pass_requests(gateway, to_prefill, open_legs)),
            asyncio.create_task(self._pass_answers(prefill, to_gateway, open_legs)),
        }
        try:
            # The first direction that ends also ends the other, as a closed socket does at an engine.
            await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for direction in directions:
                direction.cancel()
            await asyncio.gather(*directions, return_exceptions=True)

    async def _pass_requests(
        self, gateway: asyncio.StreamReader, to_prefill: asyncio.StreamWriter, open_legs: list[Leg]
    ) -> None:
        while data := await gateway.read(1 << 16):
            if data.startswith(b"POST "):
                leg = Leg()
                self.legs.append(leg)
                open_legs.append(leg)
            to_prefill.write(data)
            await to_prefill.drain()
        for leg in open_legs:
            leg.abandoned = True

    async def _pass_answers(
        self, prefill: asyncio.StreamReader, to_gateway: asyncio.StreamWriter, open_legs: list[Leg]
    ) -> None:
        while data := await prefill.read(1 << 16):
            if open_legs:
                data = await whole_answer(data, prefill)
                open_legs.pop().answered = True
                await self._hold_back()
            to_gateway.write(data)
            await to_gateway.drain()

    async def _hold_back(self) -> None:
        if not self._hold:
            return
        self._held += 1
        if self._held == self._hold:
            assert self._server is not None
            await asyncio.to_thread(self._between)
            self._server.close()
            self._released.set()
        await self._released.wait()


async def whole_answer(start: bytes, reader: asyncio.StreamReader) -> bytes:
    """The rest of an HTTP answer with a Content-Length, which is how vLLM answers a request that is not streamed."""
    while b"\r\n\r\n" not in start:
        start += await reader.read(1 << 16) or fail_short()
    head, _, body = start.partition(b"\r\n\r\n")
    length = CONTENT_LENGTH.search(head + b"\r\n")
    assert length is not None, f"prefill answered without Content-Length: {head!r}"
    return start + await reader.readexactly(int(length[1]) - len(body))


def fail_short() -> bytes:
    raise ConnectionResetError("prefill closed the connection inside an answer's head")


@contextmanager
def relaying(upstream: str) -> Iterator[Relay]:
    """A relay in front of the engine at `upstream` (http://host:port)."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="relay", daemon=True)
    thread.start()
    relay = Relay(upstream)
    try:
        asyncio.run_coroutine_threadsafe(relay.open(), loop).result(timeout=10)
        yield relay
        asyncio.run_coroutine_threadsafe(relay.close(), loop).result(timeout=10)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout=10)
        loop.close()
