"""The server's end of the client's socket: uvicorn's httptools protocol, with a straight way to its transport.

Owns what uvicorn leaves open on that socket: a bound on headers in bytes and in time, errors in OpenAI's shape for
requests that never reach the application, and `DirectClient`, through which the relay writes without an ASGI message,
a task or a copy per token. Rests on names of uvicorn's `httptools_impl` module; `tests/relay/test_server.py` holds
them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from random import getrandbits
from time import monotonic
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from proxy.errors import GatewayError, HeadersTooLarge, InvalidRequest, RequestTimedOut
from proxy.relay.client import EXTENSION, Flow, Headers


class DirectClient:
    """A `Client` that writes to the connection's transport.

    It plays the part of the cycle's `send` and leaves the cycle as `send` would, so that keep-alive, pipelining and
    graceful shutdown stay uvicorn's.
    """

    __slots__ = (
        "_chunked",
        "_cycle",
        "_head",
        "_protocol",
        "_transport",
        "flow",
        "gone",
        "on_gone",
        "started",
    )

    def __init__(self, protocol: GatewayProtocol, cycle: RequestResponseCycle) -> None:
        self._protocol = protocol
        self._cycle = cycle
        self._transport = protocol.transport
        self._chunked = True
        self._head = b""  # written with the first bytes of the body: one system call less
        self.started = False
        self.gone = False
        self.flow: Flow | None = None
        self.on_gone: Callable[[], object] | None = None

    @property
    def body(self) -> bytearray | None:
        """The request's body when it is already there, whole; else None, and ASGI's `receive` has it."""
        cycle = self._cycle
        if cycle.more_body or cycle.disconnected:
            return None
        body, cycle.body = cycle.body, bytearray()
        cycle.message_event.clear()
        return body

    def respond(self, status: int, headers: Headers, body: bytes) -> None:
        if self.gone:
            return
        head = self._answer_head(status, headers, b"content-length: %d\r\n\r\n" % len(body))
        if self._cycle.scope["method"] == "HEAD":
            body = b""
        if len(body) < 4096:
            self._transport.write(head + body)
        else:
            self._transport.writelines((head, body))
        self._complete()

    def start(self, status: int, headers: Headers) -> None:
        if self.gone:
            return
        self._chunked = self._cycle.scope["http_version"] == "1.1"
        last = b"transfer-encoding: chunked\r\n\r\n" if self._chunked else b"\r\n"
        self._head = self._answer_head(status, headers, last)
        self._protocol.streaming = self
        if self._protocol.flow.write_paused and self.flow is not None:
            self.flow.pause()

    def write(self, data: bytes) -> None:
        if self.gone:
            return
        self._transport.write(self._head + (b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data))
        self._head = b""

    def chunks(self) -> Callable[[bytes], object] | None:
        return self._transport.write if self._chunked and not self._head and not self.gone else None

    def end(self, data: bytes = b"") -> None:
        if self.gone:
            return
        if self._chunked:
            data = b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data) if data else b"0\r\n\r\n"
        if self._head or data:
            self._transport.write(self._head + data)
        self._complete()

    def left(self) -> None:
        """The client has closed its connection."""
        self.gone = True
        if self.flow is not None:
            self.flow.stop()
        self._cycle.disconnected = True
        self._cycle.message_event.set()
        if self.on_gone is not None:
            self.on_gone()

    def cut(self) -> None:
        self._cycle.keep_alive = False
        self._transport.abort()  # not close(), which would wait for a client that reads nothing

    async def flushed(self) -> None:
        """Nothing is held here; the transport sends what it has by itself."""

    def _answer_head(self, status: int, headers: Headers, last: bytes) -> bytes:
        cycle = self._cycle
        self.started = cycle.response_started = True
        cycle.waiting_for_100_continue = False
        lines = [STATUS_LINE[status]]
        for name, value in cycle.default_headers:
            lines += name, b": ", value, b"\r\n"
        for name, value in headers:
            if name == b"connection" and value == b"close":
                cycle.keep_alive = False
            else:
                lines += name, b": ", value, b"\r\n"
        if not cycle.keep_alive or cycle.scope["http_version"] != "1.1":
            cycle.keep_alive = False
            lines.append(b"connection: close\r\n")
        lines.append(last)
        return b"".join(lines)

    def _complete(self) -> None:
        cycle = self._cycle
        self._protocol.streaming = None
        self._protocol.clients.discard(self)
        cycle.response_complete = True
        cycle.message_event.set()
        if not cycle.keep_alive:
            if cycle.more_body:
                self._protocol.linger()
            else:
                self._transport.close()
        cycle.on_response()


# Seconds for which what a client still sends is read and thrown away after its request was refused. Closing at once
# would reset the connection, and the answer would be lost with it.
_LINGER = 2.0


class GatewayProtocol(HttpToolsProtocol):
    """uvicorn's protocol for one client connection, with bounds and `DirectClient`.

    Class attributes are set once by the server before it listens:
        header_limit: bytes of request line and headers.
        header_seconds: seconds in which they must arrive, once the first byte is there, and for the first byte on a
            new connection.
    """

    header_limit: ClassVar[int] = 64 * 1024
    header_seconds: ClassVar[float] = 30.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.clients: set[DirectClient] = set()
        self.streaming: DirectClient | None = None
        self._in_message = False  # between a request's headers and its end
        self._header_bytes = 0
        self._header_deadline: asyncio.TimerHandle | None = None
        self._waiting_since: float | None = None
        self._lingering: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._header_deadline is not None:
            self._header_deadline.cancel()
        if self._lingering is not None:
            self._lingering.cancel()
        super().connection_lost(exc)
        clients, self.clients, self.streaming = self.clients, set(), None
        for client in clients:
            client.left()

    def data_received(self, data: bytes) -> None:
        if self._lingering is not None:
            return
        if not self._in_message:
            if self._waiting_since is None:
                self._expect_headers()
            self._header_bytes += len(data)
        super().data_received(data)
        if self._waiting_since is not None and self._header_bytes > self.header_limit:
            self._refuse(HeadersTooLarge(f"request line and headers exceed {self.header_limit} bytes"))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._waiting_since is None:  # behind another request, in the same read
            self._expect_headers()

    def on_headers_complete(self) -> None:
        self._in_message = True
        self._waiting_since = None
        self._header_bytes = 0
        super().on_headers_complete()
        client = DirectClient(self, self.cycle)
        self.clients.add(client)
        self.cycle.scope["extensions"] = {EXTENSION: client}  # type: ignore[dict-item]

    def on_message_complete(self) -> None:
        self._in_message = False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        # Answers that went through plain `send` end here too; the next request has a client of its own.
        self.clients = {client for client in self.clients if not client._cycle.response_complete}
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self.streaming is not None and self.streaming.flow is not None:
            self.streaming.flow.pause()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.streaming is not None and self.streaming.flow is not None:
            self.streaming.flow.resume()

    def send_400_response(self, msg: str) -> None:
        self._refuse(InvalidRequest("the request is not valid HTTP/1.1"))

    def _expect_headers(self) -> None:
        """The bounds on headers apply from now until they are complete."""
        self._waiting_since = monotonic()
        self._header_bytes = 0
        if self._header_deadline is None:
            self._header_deadline = self.loop.call_later(self.header_seconds, self._check_headers)

    def _check_headers(self) -> None:
        # One timer a connection, set anew only when it fires: a busy connection pays for one a half minute.
        self._header_deadline = None
        if self._waiting_since is None or self.transport.is_closing():
            return
        left = self._waiting_since + self.header_seconds - monotonic()
        if left > 0:
            self._header_deadline = self.loop.call_later(left, self._check_headers)
        elif self._header_bytes == 0:
            self.transport.close()  # a connection that never asked for anything gets no answer
        else:
            self._refuse(RequestTimedOut(f"headers did not arrive within {self.header_seconds:g} s"))

    def _refuse(self, error: GatewayError) -> None:
        """Answer a request that the application will never see, and close."""
        if self.transport.is_closing() or self._lingering is not None:
            return
        if self.clients:
            self.transport.close()  # another request is being answered, and answers come in order
            return
        body = error.body()
        self.transport.write(
            STATUS_LINE[error.status]
            + b"content-type: application/json\r\nx-request-id: %032x\r\nconnection: close\r\n" % getrandbits(128)
            + b"content-length: %d\r\n\r\n" % len(body)
            + body
        )
        self.linger()

    def linger(self) -> None:
        """Close once the client has heard the answer: it has closed its side, or had its time."""
        if self._lingering is None and not self.transport.is_closing():
            self._lingering = self.loop.call_later(_LINGER, self.transport.abort)
            self.flow.resume_reading()
            if self.transport.can_write_eof():
                self.transport.write_eof()
