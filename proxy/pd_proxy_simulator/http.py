"""HTTP/1.1 as uvicorn speaks it to a gateway, on transports that can be cut at any byte.

Invariant: one exchange at a time on a connection, in order. An exchange's `on_close` is called once when the peer
disconnects.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from email.utils import formatdate
from typing import Any, Protocol, cast
from urllib.parse import urlsplit

import httptools

from pd_proxy_simulator.resetting import reset

_REASON = {
    200: b"OK",
    400: b"Bad Request",
    401: b"Unauthorized",
    404: b"Not Found",
    405: b"Method Not Allowed",
    415: b"Unsupported Media Type",
    429: b"Too Many Requests",
    500: b"Internal Server Error",
    503: b"Service Unavailable",
}
_PIPELINE = 16  # further requests are not read before the earlier ones are answered


class Handler(Protocol):
    """The interface of what answers requests."""

    alive: bool
    keep_alive: float
    connections: set[Connection]

    def handle(self, exchange: Exchange) -> Coroutine[Any, Any, None]:
        """Answer one request."""

    def connection_changed(self) -> None:
        """Called when a connection was opened or closed."""


class Exchange:
    """One request and its answer."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.method = ""
        self.path = ""
        self.query = ""
        self.headers: dict[str, str] = {}
        self.body = b""
        self.keep_alive = True
        self.status: int | None = None  # once it has been sent
        self.ended = False
        self.streaming = False
        self.on_close: Callable[[], None] | None = None  # called when the peer disconnects before the end of the answer
        self.on_writable: Callable[[], None] | None = None
        self._paced: bytearray | None = None
        self._pace: tuple[int, float] = (0, 0.0)
        self._pacing: asyncio.Task[None] | None = None
        self._end_when_paced = False

    @property
    def open(self) -> bool:
        """Whether the answer can still be written to."""
        return not self.ended and not self._end_when_paced and self.connection.exchange is self

    @property
    def writable(self) -> bool:
        """False while the peer reads more slowly than the answer is written."""
        return not self.connection.paused

    def pace(self, piece_bytes: int, delay: float) -> None:
        """From now on, send this many bytes at a time with a pause between."""
        self._paced = bytearray()
        self._pace = (max(piece_bytes, 1), delay)

    def respond(
        self,
        status: int,
        body: bytes,
        content_type: str = "application/json",
        headers: dict[str, str] | None = None,
        *,
        length: int | None = None,
    ) -> None:
        """Answer with a whole body. `length` is the Content-Length to send, which may be wrong."""
        if not self.open:
            return
        head = self._head(status, content_type, headers)
        head += b"content-length: %d\r\n\r\n" % (len(body) if length is None else length)
        self.status = status
        self._send(head if self.method == "HEAD" else head + body)
        self._finish()

    def respond_in_part(self, status: int, part: bytes, length: int) -> None:
        """Send the head of an answer of `length` bytes and the first of them. The rest is written by `raw`."""
        if self.open:
            self.status = status
            self._send(self._head(status, "application/json", None) + b"content-length: %d\r\n\r\n" % length + part)

    def start_stream(self, content_type: str = "text/event-stream; charset=utf-8") -> None:
        """Send status and headers; the body follows in chunks."""
        if not self.open:
            return
        self.status = 200
        self.streaming = True
        self._send(self._head(200, content_type, None) + b"transfer-encoding: chunked\r\n\r\n")

    def write(self, data: bytes) -> None:
        """Send one chunk."""
        if self.open:
            self._send(b"%x\r\n%b\r\n" % (len(data), data))

    def end_stream(self) -> None:
        """Send the last chunk."""
        if self.open:
            self._send(b"0\r\n\r\n")
            self._finish()

    def raw(self, data: bytes) -> None:
        """Send bytes as they are; they need not be HTTP."""
        if self.open:
            self._send(data)

    def cut(self, *, polite: bool = False) -> None:
        """End the connection in the middle of the answer: with a reset, or with a close."""
        if self.connection.exchange is not self:
            return
        self.ended = True
        if polite:
            self.connection.close()
        else:
            self.connection.reset()

    def closed(self) -> None:
        """Called by the connection when the peer has disconnected."""
        if self._pacing is not None:
            self._pacing.cancel()
        callback, self.on_close = self.on_close, None
        if callback is not None and not self.ended:
            callback()

    def _head(self, status: int, content_type: str, headers: dict[str, str] | None) -> bytes:
        head = b"HTTP/1.1 %d %b\r\ndate: %b\r\nserver: uvicorn\r\n" % (
            status,
            _REASON.get(status, b"Error"),
            formatdate(usegmt=True).encode(),
        )
        if content_type:
            head += b"content-type: " + content_type.encode() + b"\r\n"
        for name, value in (headers or {}).items():
            head += f"{name}: {value}\r\n".encode("latin-1")
        return head if self.keep_alive else head + b"connection: close\r\n"

    def _send(self, data: bytes) -> None:
        if self._paced is None:
            self.connection.send(data)
            return
        self._paced += data
        if self._pacing is None:
            self._pacing = asyncio.get_running_loop().create_task(self._dribble())

    async def _dribble(self) -> None:
        size, delay = self._pace
        paced = self._paced
        assert paced is not None
        while paced:
            piece = bytes(paced[:size])
            del paced[:size]
            self.connection.send(piece)
            await asyncio.sleep(delay)
        self._pacing = None
        if self._end_when_paced:
            self._end()

    def _finish(self) -> None:
        if self._pacing is not None:
            self._end_when_paced = True
        else:
            self._end()

    def _end(self) -> None:
        self.ended = True
        self.on_close = None
        self.connection.answered(self)


class Connection(asyncio.Protocol):
    """One connection from a peer."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._queue: deque[Exchange] = deque()
        self._reading: Exchange | None = None
        self._body: list[bytes] = []
        self._idle: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self.exchange: Exchange | None = None  # the one that is being answered
        self.paused = False
        self.received = 0  # bytes of the body that is being received, or that was received last

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Not checked: uvloop's transports do not inherit from asyncio's.
        transport = cast(asyncio.Transport, transport)
        self._transport = transport
        if not self._handler.alive:
            reset(transport)  # accepted while the engine was being killed
            return
        self._handler.connections.add(self)
        self._handler.connection_changed()

    def connection_lost(self, exc: Exception | None) -> None:
        self._handler.connections.discard(self)
        self._queue.clear()
        self._stop_idling()
        exchange, self.exchange = self.exchange, None
        if exchange is not None:
            exchange.closed()
        self._handler.connection_changed()

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        if self.exchange is not None and self.exchange.on_writable is not None:
            self.exchange.on_writable()

    def data_received(self, data: bytes) -> None:
        self._stop_idling()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self.close()
        except httptools.HttpParserError:
            self.send(b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
            self.close()

    # The parser's callbacks.

    def on_message_begin(self) -> None:
        self._reading = Exchange(self)
        self._body = []
        self.received = 0

    def on_url(self, url: bytes) -> None:
        assert self._reading is not None
        self._reading.path += url.decode("latin-1")

    def on_header(self, name: bytes, value: bytes) -> None:
        assert self._reading is not None
        lowered = name.decode("latin-1").lower()
        self._reading.headers[lowered] = value.decode("latin-1")
        if lowered == "expect" and value.lower() == b"100-continue" and self.exchange is None:
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self._body.append(body)
        self.received += len(body)
        self._handler.connection_changed()

    def on_message_complete(self) -> None:
        exchange = self._reading
        assert exchange is not None
        self._reading = None
        exchange.method = self._parser.get_method().decode("latin-1")
        target = urlsplit(exchange.path)
        exchange.path, exchange.query = target.path, target.query
        exchange.body = b"".join(self._body)
        exchange.keep_alive = self._parser.should_keep_alive()
        if self.exchange is None:
            self._serve(exchange)
            return
        self._queue.append(exchange)
        if len(self._queue) >= _PIPELINE and self._transport is not None:
            self._transport.pause_reading()

    # Answering.

    def _serve(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self._task = asyncio.get_running_loop().create_task(self._handler.handle(exchange))

    def answered(self, exchange: Exchange) -> None:
        """Handle the end of an answer: close, wait for the next request, or serve the one that has been read."""
        if self.exchange is exchange:
            self.exchange = None
        if not exchange.keep_alive:
            self.close()
        elif self._queue:
            self._serve(self._queue.popleft())
            if self._transport is not None:
                self._transport.resume_reading()
        elif self._transport is not None and not self._transport.is_closing():
            self._idle = asyncio.get_running_loop().call_later(self._handler.keep_alive, self.close)

    def _stop_idling(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None

    def send(self, data: bytes) -> None:
        """Write bytes as they are."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def close(self) -> None:
        """Close the connection after everything written has been sent."""
        if self._transport is not None:
            self._transport.close()

    def reset(self) -> None:
        """Reset the connection."""
        if self._transport is not None:
            reset(self._transport)

    def kill(self) -> None:
        """End the connection as a killed process does: no answer goes on."""
        self.reset()
        if self._task is not None:
            self._task.cancel()
