"""TCP relays between the gateway and decode that sever a stream at an exact token, as the death of its engine does.

They pass bytes on unchanged, and count the tokens of each stream. Which streams are severed, and where, is a plan that
all relays of one test share: the first stream takes the first cut, whichever engine it goes to; the leg that continues
it elsewhere takes the second, if there is one. Legs after the end of the plan pass whole. The engine itself lives on,
so a cut costs little; `test_decode_death.py` kills one.
"""

from __future__ import annotations

import asyncio
import re
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

TOKENS = re.compile(rb'"token_ids":\[([\d,]+)\]')
"""In every event with tokens, since the gateway asks for their ids; a prompt's ids have another name."""
END_OF_EVENT = b"\n\n\r\n"
"""Each event is a chunk of its own."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Where a stream ends: after the event with this token of the leg, and this many bytes into what follows."""

    token: int
    into: int = 0


@dataclass(slots=True)
class Leg:
    """One POST: the engine it went to, its request as sent, and the part of its answer that was passed on."""

    engine: str
    request: bytearray
    cut: Cut | None
    answer: bytearray = field(default_factory=bytearray)
    severed: bool = False

    @property
    def tokens(self) -> int:
        """Tokens that were passed on."""
        return sum(ids.count(b",") + 1 for ids in TOKENS.findall(self.answer))

    def take(self, data: bytes) -> bytes:
        """The part of `data` that may be passed on; sets `severed` where that is the end."""
        before = len(self.answer)
        self.answer += data
        if self.cut is not None and (end := self._end(self.cut)) is not None:
            self.severed = True
            del self.answer[end:]
        return bytes(self.answer[before:])

    def _end(self, cut: Cut) -> int | None:
        """The position of the cut, once that much of the answer is here."""
        tokens = 0
        for found in TOKENS.finditer(self.answer):
            tokens += found[1].count(b",") + 1
            if tokens >= cut.token:
                event = self.answer.find(END_OF_EVENT, found.end())
                end = event + len(END_OF_EVENT) + cut.into
                return end if event >= 0 and end <= len(self.answer) else None
        return None


@dataclass(slots=True)
class Severing:
    """The relays.

    Attributes:
        urls: where they listen, in the order of the engines.
        legs: the POSTs that have crossed them since the last `plan`.
        before: called, with the number of its predecessors since `plan`, before a leg is passed on.
    """

    upstreams: tuple[str, ...]
    urls: list[str] = field(default_factory=list)
    legs: list[Leg] = field(default_factory=list)
    before: Callable[[int], None] | None = None
    _plan: list[Cut] = field(default_factory=list)
    _servers: list[asyncio.Server] = field(default_factory=list)
    _connections: set[asyncio.Task[None]] = field(default_factory=set)
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)

    def plan(self, *cuts: Cut, before: Callable[[int], None] | None = None) -> None:
        """Sever the next streams, one cut for each; drop the legs from before."""
        self.legs = []
        self.before = before
        self._plan = list(cuts)

    def run(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine on the relays' thread, from another thread."""
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout=10)

    @contextmanager
    def unreachable(self) -> Iterator[None]:
        """Let connects go unanswered, as when a network drops packets: they are not refused either.

        A listening socket whose queue is full does that: the kernel drops what arrives, and the other side tries again
        after 1, 3, 7 s.
        """
        self.run(self._close())
        with ExitStack() as stack:
            for url in self.urls:
                address = ("127.0.0.1", urlsplit(url).port)
                listener = stack.enter_context(socket.socket())
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(address)
                listener.listen(0)
                for _ in range(8):
                    filler = stack.enter_context(socket.socket())
                    filler.settimeout(0.2)
                    try:
                        filler.connect(address)
                    except TimeoutError:
                        break
                else:
                    raise RuntimeError("connects are answered although nobody accepts them")
            yield
        self.run(self.open())

    async def open(self) -> None:
        ports = [urlsplit(url).port for url in self.urls] or [0] * len(self.upstreams)
        for upstream, port in zip(self.upstreams, ports, strict=True):
            relay = _Relay(self, upstream)
            self._servers.append(await asyncio.start_server(relay.connection, "127.0.0.1", port))
        self.urls = [f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}" for server in self._servers]

    async def _close(self) -> None:
        for server in self._servers:
            server.close()
        self._servers.clear()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def begin(self, engine: str, start: bytes) -> Leg:
        leg = Leg(engine, bytearray(start), None)
        self.legs.append(leg)
        return leg

    def take_cut(self, leg: Leg) -> None:
        """Only streams are severed; whether a leg is one is known with its body."""
        if leg.cut is None and not leg.answer and self._plan and b'"stream":true' in leg.request:
            leg.cut = self._plan.pop(0)

    async def wait_before(self, leg: Leg) -> None:
        if self.before is not None:
            await asyncio.to_thread(self.before, self.legs.index(leg))


@dataclass(slots=True)
class _Relay:
    """The relay of one engine."""

    all: Severing
    upstream: str

    async def connection(self, gateway: asyncio.StreamReader, to_gateway: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.all._connections.add(task)
        address = urlsplit(self.upstream)
        legs: list[Leg | None] = []
        with closing(to_gateway):
            try:
                engine, to_engine = await asyncio.open_connection(address.hostname, address.port)
                with closing(to_engine):
                    # The first direction that ends also ends the other, as a closed socket does at an engine.
                    directions = {
                        asyncio.create_task(self._pass_requests(gateway, to_engine, legs)),
                        asyncio.create_task(self._pass_answers(engine, to_gateway, legs)),
                    }
                    try:
                        await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
                    finally:
                        for direction in directions:
                            direction.cancel()
                        await asyncio.gather(*directions, return_exceptions=True)
            except OSError:
                pass  # Either side has ended: the other one learns it by the close.
            finally:
                self.all._connections.discard(task)

    async def _pass_requests(
        self, gateway: asyncio.StreamReader, to_engine: asyncio.StreamWriter, legs: list[Leg | None]
    ) -> None:
        while data := await gateway.read(1 << 16):
            if data.startswith(b"POST /v1/"):
                leg = self.all.begin(self.upstream, data)
                legs.append(leg)
                await self.all.wait_before(leg)
            elif data.startswith((b"GET ", b"POST ")):
                legs.append(None)  # a probe, or a request of the tokenizer's help
            elif legs and (current := legs[-1]):
                current.request += data
            if legs and (current := legs[-1]):
                self.all.take_cut(current)
            to_engine.write(data)
            await to_engine.drain()

    async def _pass_answers(
        self, engine: asyncio.StreamReader, to_gateway: asyncio.StreamWriter, legs: list[Leg | None]
    ) -> None:
        while data := await engine.read(1 << 16):
            leg = legs[-1] if legs else None
            to_gateway.write(leg.take(data) if leg else data)
            await to_gateway.drain()
            if leg is not None and leg.severed:
                return


@contextmanager
def severing(*upstreams: str) -> Iterator[Severing]:
    """Relays in front of the decode engines at `upstreams` (http://host:port)."""
    relays = Severing(upstreams)
    thread = threading.Thread(target=relays._loop.run_forever, name="severing", daemon=True)
    thread.start()
    try:
        relays.run(relays.open())
        yield relays
        relays.run(relays._close())
    finally:
        relays._loop.call_soon_threadsafe(relays._loop.stop)
        thread.join(timeout=10)
        relays._loop.close()
