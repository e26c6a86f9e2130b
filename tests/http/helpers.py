"""An engine on real sockets whose bytes a test writes; and transports, receivers and clients that only record."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType

from pd_proxy.errors import BackendError
from pd_proxy.http.response import FlowControl, Headers

TIMEOUT = 5.0
"""Seconds after which a test that waits fails; a test that passes never waits so long."""


class Peer:
    """One connection that a scripted engine has accepted."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def request(self) -> bytes:
        """Read one request; returns head and body as they came."""
        async with asyncio.timeout(TIMEOUT):
            head = await self.reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
            return head + await self.reader.readexactly(length)

    def say(self, data: bytes) -> None:
        self.writer.write(data)

    def close(self) -> None:
        self.writer.close()

    async def left(self) -> bool:
        """Wait until the gateway has closed this connection."""
        async with asyncio.timeout(TIMEOUT):
            with suppress(ConnectionError):
                while await self.reader.read(65536):
                    pass
        return True


class Engine:
    """A listening socket; `accept` returns its connections in turn."""

    def __init__(self) -> None:
        self._accepted: asyncio.Queue[Peer] = asyncio.Queue()
        self._server: asyncio.Server | None = None
        self.peers: list[Peer] = []

    async def __aenter__(self) -> Engine:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for peer in self.peers:
            peer.writer.transport.abort()

    @property
    def url(self) -> str:
        assert self._server is not None
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def accept(self) -> Peer:
        async with asyncio.timeout(TIMEOUT):
            return await self._accepted.get()

    @property
    def waiting(self) -> int:
        """The number of connections that the test has not taken yet."""
        return self._accepted.qsize()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = Peer(reader, writer)
        self.peers.append(peer)
        self._accepted.put_nowait(peer)


class FakeTransport(asyncio.Transport):
    """A transport without a socket."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.reading = True
        self.closed = False
        self.aborted = False
        self.protocol: asyncio.BaseProtocol | None = None

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self.protocol = protocol

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += bytes(data)

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview]) -> None:
        for data in list_of_data:
            self.write(data)

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = self.aborted = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True


class Recorder:
    """A receiver that records its calls.

    Attributes:
        carried: the body bytes of each call.
        endings: `end`, `lost` or nothing yet.
    """

    def __init__(self) -> None:
        self.status = 0
        self.heads = 0
        self.headers: dict[bytes, bytes] = {}
        self.body = b""
        self.carried: list[bytes] = []
        self.last = False
        self.endings: list[str] = []
        self.error: BackendError | None = None
        self._ended = asyncio.Event()

    def head(self, status: int, headers: dict[bytes, bytes]) -> None:
        assert not self.body
        self.heads += 1
        self.status = status
        self.headers = headers

    def data(self, data: bytes, last: bool) -> None:
        self._carry(data)
        self.last = last

    def end(self) -> None:
        self.endings.append("end")
        self._ended.set()

    def lost(self, error: BackendError) -> None:
        self.endings.append("lost")
        self.error = error
        self._ended.set()

    def _carry(self, data: bytes) -> None:
        assert self.heads, "body before head"
        assert data, "empty data"
        assert not self.last, "data after the last"
        assert not self.endings, "data after the end"
        self.carried.append(data)
        self.body += data

    async def ended(self) -> str:
        """Wait for the end of the exchange; returns `end` or `lost`."""
        async with asyncio.timeout(TIMEOUT):
            await self._ended.wait()
        return self.endings[0]


class RecordingClient:
    """A client that records what it gets; if `speaks_chunks`, it takes data that is framed as chunks already."""

    def __init__(self, speaks_chunks: bool = True) -> None:
        self.speaks_chunks = speaks_chunks
        self.started = False
        self.gone = False
        self.flow: FlowControl | None = None
        self.on_gone: Callable[[], object] | None = None
        self.status = 0
        self.body = b""
        self.writes: list[bytes] = []
        self.ended = False
        self.was_cut = False

    def respond(self, status: int, headers: Headers, body: bytes) -> None:
        self.start(status, headers)
        self.end(body)

    def start(self, status: int, headers: Headers) -> None:
        assert not self.started
        self.started = True
        self.status = status

    def write(self, data: bytes) -> None:
        assert self.started, "body before head"
        assert not self.ended, "body after the end"
        assert data, "an empty write"
        self.writes.append(data)
        self.body += data

    def chunks(self) -> Callable[[bytes], object] | None:
        return self._chunk if self.speaks_chunks else None

    def _chunk(self, chunk: bytes) -> None:
        size, _, rest = chunk.partition(b"\r\n")
        assert size == b"%x" % (len(rest) - 2)
        assert rest.endswith(b"\r\n")
        self.write(rest[:-2])

    def end(self, data: bytes = b"") -> None:
        assert not self.ended
        if data:
            self.write(data)
        self.ended = True

    def cut(self) -> None:
        self.was_cut = True

    async def flushed(self) -> None:
        return None


@contextmanager
def faults() -> Iterator[list[logging.LogRecord]]:
    """The errors that the gateway logs about its own code."""
    found: list[logging.LogRecord] = []
    handler, logger = logging.Handler(logging.ERROR), logging.getLogger("pd_proxy")
    handler.emit = found.append  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)
