"""The server's end of the client's socket: uvicorn's httptools protocol, bounded against slow and hostile clients.

Owns what uvicorn leaves open on that socket. Headers are bounded in bytes, number and time; so are the requests that a
client sends ahead, the framing around a body, and the time for which a client that does not read may hold memory. A
request that is refused here is answered in OpenAI's shape and never reaches the application. `direct.DirectClient` is
put into each request's scope. Rests on names of uvicorn's `httptools_impl` module; `tests/relay/test_server.py` holds
them.
"""

from __future__ import annotations

import asyncio
import fcntl
import socket
import struct
import termios
from random import getrandbits
from time import monotonic
from typing import Any, ClassVar

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from proxy.errors import GatewayError, HeadersTooLarge, InvalidRequest, RequestTimedOut, TooManyConnections
from proxy.relay.client import EXTENSION, Receive, Scope, Send
from proxy.relay.connections import Connections
from proxy.relay.direct import DirectClient

# Seconds for which what a client still sends is read and thrown away after its request was refused. Closing at once
# would reset the connection, and the answer would be lost with it.
_LINGER = 2.0
_MOST_HEADERS = 256  # lines; engines and proxies take about 100
# Requests that wait behind a running one. Each costs some kB, and one read may bring thousands; clients send none.
_MOST_AHEAD = 16
# Bytes of chunk sizes, extensions and trailers around one body. 64 MiB in chunks of 500 bytes need less.
_MOST_FRAMING = 1024 * 1024
_ACKED = struct.Struct("@120xQ")  # tcpi_bytes_acked in Linux's struct tcp_info


class GatewayProtocol(HttpToolsProtocol):
    """uvicorn's protocol for one client connection, with bounds and `DirectClient`.

    Class attributes are set once, in a subclass, before the server listens:
        header_limit: bytes of request line and headers.
        header_seconds: seconds in which they must arrive, once the first byte is there, and for the first byte on a
            new connection.
        write_seconds: seconds for which a client may read nothing while bytes for it are held.
        shared: the count of open connections, and their limit.
    Attributes:
        deaf: nothing that the client still sends is heard.
    """

    header_limit: ClassVar[int] = 64 * 1024
    header_seconds: ClassVar[float] = 30.0
    write_seconds: ClassVar[float] = 120.0
    shared: ClassVar[Connections] = Connections()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.clients: set[DirectClient] = set()
        self.streaming: DirectClient | None = None
        self.deaf = False
        self._crowded = False  # one connection too many
        self._held_back = False  # the next request waits for the client to read
        self._offered = False  # the request at hand asks for another protocol
        self._in_message = False  # between a request's headers and its end
        self._refusal: GatewayError | None = None
        self._read_size = 0
        self._framing = 0
        self._header_bytes = 0
        self._header_deadline: asyncio.TimerHandle | None = None
        self._waiting_since: float | None = None
        self._write_deadline: asyncio.TimerHandle | None = None
        self._lingering: asyncio.TimerHandle | None = None

    # A connection's beginning and end

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        shared = self.shared
        shared.open += 1
        if shared.open > shared.limit:
            if shared.open > shared.limit + shared.spare:
                shared.refused += 1
                self.deaf = True
                transport.abort()
                return
            self._crowded = True
            self.app = self._serve_crowded
        self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self.shared.open -= 1
        for timer in (self._header_deadline, self._write_deadline, self._lingering):
            if timer is not None:
                timer.cancel()
        self.pipeline.clear()
        super().connection_lost(exc)
        clients, self.clients, self.streaming = self.clients, set(), None
        for client in clients:
            client.left()

    async def _serve_crowded(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The application of a connection beyond the limit."""
        if scope["path"] in self.shared.spared:
            await self.config.loaded_app(scope, receive, send)
            return
        self.shared.refused += 1
        error = TooManyConnections(f"this gateway serves {self.shared.limit} connections at a time", retry_after=1)
        client: DirectClient = scope["extensions"][EXTENSION]
        client.respond(error.status, [*_headers(), (b"retry-after", b"1")], error.body())

    @property
    def awaited(self) -> bool:
        """Whether a request is on its way: it has begun to come, or the connection is new."""
        return self._waiting_since is not None

    @property
    def unsent(self) -> int:
        """Bytes that the client has not taken yet."""
        return self.transport.get_write_buffer_size()

    def leave(self) -> None:
        """The answer in progress is this connection's last. (What `shared.leaving` does for the next one.)"""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.keep_alive = False

    def close_if_idle(self) -> None:
        """Close a connection that waits for another request, unless one is already in its socket."""
        idle = self.cycle is not None and self.cycle.response_complete and not self.awaited
        if not idle or self.transport.is_closing():
            return
        descriptor = self.transport.get_extra_info("socket").fileno()
        if not any(fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4))):
            self.transport.close()

    # What the client sends

    def data_received(self, data: bytes) -> None:
        # As uvicorn's, which would write a line to the log for each of a hostile client's requests.
        if self.deaf:
            return
        self._unset_keepalive_if_required()
        self._read_size = len(data)
        if self._in_message:
            self._framing += len(data)
        else:
            if self._waiting_since is None:
                self._expect_headers()
            self._header_bytes += len(data)
        while data:
            try:
                self.parser.feed_data(data)
                break
            except httptools.HttpParserUpgrade as offer:
                data = self._decline_upgrade() + data[offer.args[0] :]
            except httptools.HttpParserError:
                self._refuse(self._refusal or InvalidRequest("the request is not valid HTTP/1.1"))
                return
        if self._waiting_since is not None and self._header_bytes > self.header_limit:
            self._refuse(HeadersTooLarge(f"request line and headers exceed {self.header_limit} bytes"))
        elif self._framing > _MOST_FRAMING:
            self._refuse(InvalidRequest(f"more than {_MOST_FRAMING} bytes of chunk sizes, extensions and trailers"))

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= _MOST_AHEAD:
            # Those before it are answered, and the last of them closes the connection; clients send the rest again.
            self.cycle.keep_alive = False
            self._stop_listening()
            raise _Unheard
        super().on_message_begin()
        if self._waiting_since is None:  # behind another request, in the same read
            self._expect_headers()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_message:
            return  # a trailer: no header, lest it passes what is in front of us and looks at headers alone
        name = name.lower()
        if name == b"expect":
            self.expect_100_continue = value.lower() == b"100-continue"
        elif name == b"transfer-encoding" and (value.lower() != b"chunked" or self.parser.get_http_version() != "1.1"):
            self._refusal = InvalidRequest("of all transfer codings only chunked, in HTTP/1.1, is understood")
            raise self._refusal
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                self._refusal = InvalidRequest("this is no forward proxy")
                raise self._refusal
            self._offered = True
            return
        if len(self.headers) > _MOST_HEADERS or self._header_bytes + self._read_size > self.header_limit:
            self._check_header_size()
        super().on_headers_complete()
        self._in_message = True
        self._waiting_since = None
        self._header_bytes = 0
        self._framing = 0
        cycle = self.cycle
        if self._crowded or self.shared.leaving:
            cycle.keep_alive = False
        client = DirectClient(self, cycle)
        self.clients.add(client)
        cycle.scope["extensions"] = {EXTENSION: client}  # type: ignore[dict-item]

    def on_body(self, body: bytes) -> None:
        self._framing -= len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._offered:
            return
        self._in_message = False
        self._framing = 0
        super().on_message_complete()

    def _decline_upgrade(self) -> bytes:
        """The head of a request that offered another protocol, without the offer.

        The parser takes what follows such a head for the other protocol, and so the body for a request. Java's clients
        offer HTTP/2 with each first request, bodies or not.
        """
        head = b"%b %b HTTP/%b\r\n" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        for name, value in self.headers:
            if name == b"connection":
                value = b"close" if b"close" in value.lower() else b"keep-alive"
            if name not in (b"upgrade", b"http2-settings"):
                head += b"%b: %b\r\n" % (name, value)
        self._offered = False
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        return head + b"\r\n"

    def _check_header_size(self) -> None:
        if len(self.headers) > _MOST_HEADERS:
            self._refusal = HeadersTooLarge(f"more than {_MOST_HEADERS} headers")
        elif len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > self.header_limit:
            self._refusal = HeadersTooLarge(f"request line and headers exceed {self.header_limit} bytes")
        if self._refusal is not None:
            raise self._refusal

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

    # What the client reads

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        if self.flow.write_paused:
            # It has not read the answers that it asked for before: another would add to what is held for it.
            self._held_back = True
            self.pipeline.append((cycle, app))
            self.flow.pause_reading()
        else:
            super()._start_asgi_task(cycle, app)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_writes()
        if self.streaming is not None and self.streaming.flow is not None:
            self.streaming.flow.pause()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.streaming is not None and self.streaming.flow is not None:
            self.streaming.flow.resume()
        elif self._held_back and not self.transport.is_closing():
            self._held_back = False
            self._start_asgi_task(*self.pipeline.pop())

    def on_response_complete(self) -> None:
        # Answers that went through plain `send` end here too; the next request has a client of its own.
        self.clients = {client for client in self.clients if not client._cycle.response_complete}
        if self.transport.get_write_buffer_size():
            self._watch_writes()
        if self.cycle.more_body and self.cycle.response_complete:
            self.linger()  # the rest of the body is nobody's, and may never end
        if self._lingering is None:
            super().on_response_complete()

    def _watch_writes(self) -> None:
        """From now on the client must read, until all that is held for it has gone."""
        if self._write_deadline is None:
            self._write_deadline = self.loop.call_later(self.write_seconds, self._check_writes, self._taken())

    def _check_writes(self, taken: int) -> None:
        self._write_deadline = None
        if not self.transport.get_write_buffer_size():
            return
        now_taken = self._taken()
        if now_taken > taken:
            self._write_deadline = self.loop.call_later(self.write_seconds, self._check_writes, now_taken)
        else:
            self.transport.abort()  # not close(), which would wait for it

    def _taken(self) -> int:
        """A number that grows when the client reads."""
        sock = self.transport.get_extra_info("socket")
        if hasattr(socket, "TCP_INFO") and sock.family != socket.AF_UNIX:
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _ACKED.size)
            if len(info) == _ACKED.size:
                return int(_ACKED.unpack(info)[0])
        return -self.transport.get_write_buffer_size()

    # Refusing

    def _refuse(self, error: GatewayError) -> None:
        """Answer a request that the application will never see, or never whole, and close."""
        if self.transport.is_closing() or self.deaf:
            return
        if self._in_message and len(self.clients) == 1:
            [client] = self.clients
            if client._cycle is self.cycle and not client.started:  # it waits for a body that will never be whole
                self.clients.clear()
                client.left()
        if self.clients:
            self.transport.close()  # another request is being answered, and answers come in order
            return
        body = error.body()
        lines = [b"%b: %b\r\n" % header for header in (*_headers(), (b"connection", b"close"))]
        self.transport.write(
            b"%b%bcontent-length: %d\r\n\r\n%b" % (STATUS_LINE[error.status], b"".join(lines), len(body), body)
        )
        self.linger()

    def linger(self) -> None:
        """Close once the client has heard the answer: it has closed its side, or had its time."""
        if self._lingering is None and not self.transport.is_closing():
            self._lingering = self.loop.call_later(_LINGER, self.transport.abort)
            self._stop_listening()
            self.flow.resume_reading()
            if self.transport.can_write_eof():
                self.transport.write_eof()

    def _stop_listening(self) -> None:
        self.deaf = True
        self._waiting_since = None


class _Unheard(Exception):
    """A request that came too far ahead of its answer."""


def _headers() -> list[tuple[bytes, bytes]]:
    return [(b"content-type", b"application/json"), (b"x-request-id", b"%032x" % getrandbits(128))]
