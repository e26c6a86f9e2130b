"""What a client sends: uvicorn's httptools protocol, bounded against slow and hostile clients.

Headers are bounded in bytes, number and time; so are the requests that a client sends ahead, and the framing around a
body. What could be read in two ways is refused. A request that is refused here is answered in OpenAI's shape, and the
application never sees it, or never its whole body.
"""

from __future__ import annotations

import asyncio
import re
from contextlib import suppress
from random import getrandbits
from typing import Any, ClassVar

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from pd_proxy.errors import GatewayError, HeadersTooLarge, InvalidRequest, RequestTimedOut, VersionNotSupported
from pd_proxy.http.client_connections import Connections
from pd_proxy.http.direct import DirectResponse

# Seconds for which what a client still sends is read and thrown away after its request was refused. Closing at once
# would reset the connection, and the answer would be lost with it.
_LINGER = 2.0
_MOST_HEADERS = 256  # lines; engines and proxies take about 100
# Requests that wait behind a running one. Each costs some kB, and one read may bring thousands; clients send none.
_MOST_AHEAD = 16
# Bytes of chunk sizes, extensions and trailers around one body. 64 MiB in chunks of 500 bytes need less.
_MOST_FRAMING = 1024 * 1024
# RFC 3986's host and port. No comma, with which proxies join two values into one.
_VALID_HOST = re.compile(rb"([A-Za-z0-9._~%!$&'()*+;=-]+|\[[A-Za-z0-9:.%_~-]+\])(:[0-9]*)?[ \t]*").fullmatch
_MOST_KNOWN = 64
_known_hosts: set[bytes] = set()
"""Values of Host that have been found valid: clients send few, and each again and again."""
_VERSIONS = "this gateway speaks HTTP/1.1 and HTTP/1.0"
_OTHER_VERSION = "Invalid HTTP version"  # the parser's words


class Inbound(HttpToolsProtocol):
    """One client connection's requests.

    Class attributes are set once, in a subclass, before the server listens:
        header_limit: bytes of request line and headers.
        header_seconds: seconds in which they must arrive, once the first byte is there, and for the first byte on a
            new connection.
        shared: what all connections have in common.
    Attributes:
        awaited: a request is on its way: it has begun to come, or the connection is new.
        clients: of the requests whose answers are not complete.
        deaf: nothing that the client still sends is heard.
        version: of HTTP, of the request whose head was read last.
    """

    # What uvicorn keeps of a connection fits into a dictionary that shares its keys with those of all others; with
    # ours beside it each would have keys of its own, a kB of them.
    __slots__ = (
        "_framing",
        "_header_bytes",
        "_headers_wait",
        "_hosts",
        "_in_message",
        "_lingering",
        "_offered",
        "_read_size",
        "_refusal",
        "_timed",
        "awaited",
        "clients",
        "deaf",
        "version",
    )

    header_limit: ClassVar[int] = 64 * 1024
    header_seconds: ClassVar[float] = 30.0
    shared: ClassVar[Connections] = Connections()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.clients: set[DirectResponse] = set()
        self.deaf = False
        self.version = ""
        self._offered = False  # the request at hand asks for another protocol
        self._in_message = False  # between a request's headers and its end
        self._refusal: GatewayError | None = None  # of what has just been read, or still to be answered with
        self._hosts = 0  # Host headers of the request at hand
        self._read_size = 0
        self._framing = 0
        self._header_bytes = 0
        self._headers_wait = self.shared.headers(self.header_seconds)
        self._timed = False  # the limit on headers runs
        self.awaited = False
        self._lingering: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_headers()
        self._time_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._headers_wait.forget(self)
        if self._lingering is not None:
            self._lingering.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        # As uvicorn's, which would write a line to the log for each of a hostile client's requests.
        if self.deaf:
            return
        self._unset_keepalive_if_required()
        alone = not self.clients
        self._read_size = len(data)
        if self._in_message:
            self._framing += len(data)
        else:
            if not self.awaited:
                self._expect_headers()
            self._header_bytes += len(data)
        while data:
            try:
                self.parser.feed_data(data)
                break
            except httptools.HttpParserUpgrade as offer:
                data = self._decline_upgrade() + data[offer.args[0] :]
            except httptools.HttpParserError as error:
                refusal = self._refusal or (
                    VersionNotSupported(_VERSIONS)
                    if str(error) == _OTHER_VERSION
                    else InvalidRequest("the request is not valid HTTP/1.1")
                )
                self._refuse(refusal, at_leisure=alone)
                return
        if not self.awaited:
            if self._framing > _MOST_FRAMING:
                self._refuse(InvalidRequest(f"more than {_MOST_FRAMING} bytes of chunk sizes, extensions and trailers"))
            return
        if not self._timed:  # they have not come in one read, as nearly all do
            self._time_headers()
        if self._header_bytes > self.header_limit:
            self._refuse(HeadersTooLarge(f"request line and headers exceed {self.header_limit} bytes"))
        elif self._framing > _MOST_FRAMING:
            self._refuse(InvalidRequest(f"more than {_MOST_FRAMING} bytes of chunk sizes, extensions and trailers"))

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= _MOST_AHEAD:
            # Those before it are answered, and the last of them closes the connection; clients send the rest again.
            self.cycle.keep_alive = False
            self._stop_listening()
            raise _Unheard
        self.url = b""
        self.headers = []
        self._hosts = 0
        self.expect_100_continue = False
        if not self.awaited:  # behind another request, in the same read
            self._expect_headers()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_message:
            return  # a trailer: no header, lest it passes what is in front of us and looks at headers alone
        name = name.lower()
        if name == b"host":
            self._hosts += 1
            if value not in _known_hosts:
                self._check_host(value)
        elif name == b"expect":
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
        self.version = self.parser.get_http_version()
        if self._hosts != 1 or self.version != "1.1":
            self._check_version_and_host()
        if len(self.headers) > _MOST_HEADERS or self._header_bytes + self._read_size > self.header_limit:
            self._check_header_size()
        self.begin_request()
        self._in_message = True
        self._expect_nothing()
        self._header_bytes = 0
        self._framing = 0

    def begin_request(self) -> None:
        """The head of a request is whole: make its scope and its cycle, and start its application."""
        url, headers, expected = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()  # uvicorn makes the scope before it knows what goes into it
        self.url = url
        self.headers += headers
        self.expect_100_continue = expected
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        if self._offered:
            return
        self._in_message = False
        self._framing = 0
        cycle = self.cycle
        if not cycle.response_complete:  # as uvicorn's from here
            cycle.more_body = False
            cycle.message_event.set()

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

    def _check_host(self, value: bytes) -> None:
        if not _VALID_HOST(value):
            self._refusal = InvalidRequest("the Host header is no host and port")
            raise self._refusal
        if len(_known_hosts) < _MOST_KNOWN and len(value) < 300:
            _known_hosts.add(value)

    def _check_version_and_host(self) -> None:
        """RFC 9112, sections 2.3 and 3.2."""
        version = self.version
        if version not in ("1.1", "1.0"):
            self._refusal = VersionNotSupported(_VERSIONS)
        elif self._hosts > 1:
            self._refusal = InvalidRequest("the request has more than one Host header")
        elif self._hosts == 0 and version == "1.1":
            self._refusal = InvalidRequest("the request has no Host header")
        if self._refusal is not None:
            raise self._refusal

    def _check_header_size(self) -> None:
        if len(self.headers) > _MOST_HEADERS:
            self._refusal = HeadersTooLarge(f"more than {_MOST_HEADERS} headers")
        elif len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > self.header_limit:
            self._refusal = HeadersTooLarge(f"request line and headers exceed {self.header_limit} bytes")
        if self._refusal is not None:
            raise self._refusal

    def _expect_headers(self) -> None:
        """The bounds on headers apply from now until they are complete."""
        self.awaited = True
        self._header_bytes = 0

    def _time_headers(self) -> None:
        self._timed = True
        self._headers_wait.watch(self, self.loop)

    def _expect_nothing(self) -> None:
        self.awaited = False
        if self._timed:
            self._timed = False
            self._headers_wait.forget(self)

    def overdue(self, seconds: float) -> None:
        """Headers are late."""
        if self.transport.is_closing():
            return
        if self._header_bytes == 0:
            self.transport.close()  # a connection that never asked for anything gets no answer
        else:
            self._refuse(RequestTimedOut(f"headers did not arrive within {seconds:g} s"))

    # Refusing

    def _refuse(self, error: GatewayError, *, at_leisure: bool = True) -> None:
        """Answer a request that the application will never see, or never whole, and close. Those before it are answered
        first, as answers come in order.

        Arguments:
            at_leisure: those before it have all the time they need; else a short one.
        """
        if self.transport.is_closing() or self.deaf:
            return
        if self._in_message and self.pipeline and self.pipeline[0][0] is self.cycle:
            del self.pipeline[0]  # its body will never be whole
            for client in [client for client in self.clients if client._cycle is self.cycle]:
                self.clients.discard(client)
                client.release()
        if self._in_message and len(self.clients) == 1:
            [client] = self.clients
            if client._cycle is self.cycle and not client.started:  # it waits for a body that will never be whole
                self.clients.clear()
                client.left()
        if self.clients:
            self._refusal = error
            self._stop_listening()
            self.flow.pause_reading()
            if not at_leisure:
                self.loop.call_later(_LINGER, self.transport.close)
            return
        self._answer_refused(error)

    def _answer_refused(self, error: GatewayError) -> None:
        body = error.body()
        lines = [b"%b: %b\r\n" % header for header in (*answer_headers(), (b"connection", b"close"))]
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
                with suppress(OSError):  # the client has gone, unseen while nothing was read from it
                    self.transport.write_eof()

    def _stop_listening(self) -> None:
        self.deaf = True
        self._expect_nothing()


class _Unheard(Exception):
    """A request that came too far ahead of its answer."""


def answer_headers() -> list[tuple[bytes, bytes]]:
    return [(b"content-type", b"application/json"), (b"x-request-id", b"%032x" % getrandbits(128))]
