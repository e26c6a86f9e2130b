"""What a client sends: the parsing of requests, bounded against slow and hostile clients.

Headers are bounded in bytes, number and time; so are the requests that a client sends ahead, and the framing around a
body. A request that two readers could understand in two ways is refused. A refusal is answered in OpenAI's shape, and
the application sees nothing of such a request, or never its whole body.
"""

from __future__ import annotations

import asyncio
import re
from abc import ABC, abstractmethod
from enum import Enum
from typing import ClassVar

import httptools

from pd_proxy.errors import GatewayError, HeadersTooLarge, InvalidRequest, RequestTimedOut, VersionNotSupported
from pd_proxy.http.client_connections import Connections
from pd_proxy.http.response import Scope
from pd_proxy.http.server_exchange import App, ServerExchange

Waiting = tuple[ServerExchange, App, Scope]
"""A request, what is to serve it, and with which scope."""

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
_TOO_MUCH_FRAMING = f"more than {_MOST_FRAMING} bytes of chunk sizes, extensions and trailers"


class Reading(Enum):
    """What is read next from a client's connection."""

    HEAD = "head"
    """The head of a request. It has begun to come, or the connection is new; the limits on headers apply."""

    BODY = "body"
    """The body of the request whose head came last."""

    BETWEEN = "between"
    """The next request, of which nothing has come."""

    NOTHING = "nothing"
    """Nothing that the client still sends is parsed."""


# A member of an enum is found by a function in Python; a global is not.
_HEAD, _BODY, _BETWEEN, _NOTHING = Reading


class Inbound(asyncio.Protocol, ABC):
    """One client connection's requests.

    Class attributes are set once, in a subclass, before the server listens:
        header_limit: bytes of request line and headers.
        header_seconds: seconds in which they must arrive, once the first byte is there, and for the first byte on a
            new connection.
        shared: what all connections have in common.
    Attributes:
        reading: what is read next.
        url, headers, version, expects_continue: of the request whose head was read last.
        waiting: requests that have begun to come behind the one that is being answered, oldest first.
    """

    __slots__ = (
        "_hosts",
        "_is_timed",
        "_offers_upgrade",
        "_overhead",
        "_read_size",
        "_refusal",
        "expects_continue",
        "headers",
        "headers_deadlines",
        "loop",
        "parser",
        "reading",
        "transport",
        "url",
        "version",
        "waiting",
    )

    header_limit: ClassVar[int] = 64 * 1024
    header_seconds: ClassVar[float] = 30.0
    shared: ClassVar[Connections] = Connections()

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.transport: asyncio.Transport = None  # type: ignore[assignment]
        self.reading = _HEAD
        self.waiting: list[Waiting] = []
        self.url = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.version = ""
        self.expects_continue = False
        self._offers_upgrade = False  # the request at hand asks for another protocol
        self._hosts = 0  # Host headers of the request at hand
        self._read_size = 0
        self._overhead = 0  # bytes of the head, or of what is around the body
        self._is_timed = False  # the limit on the time of headers runs
        self._refusal: GatewayError | None = None  # of what has just been read, or still to be answered with
        self.headers_deadlines = self.shared.headers(self.header_seconds)
        self._new_parser()

    def _new_parser(self) -> None:
        self.parser = httptools.HttpRequestParser(self)
        # Requests behind one that closes are parsed, so that they can be refused or ignored as such.
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)

    @abstractmethod
    def request_begun(self) -> None:
        """The head of a request is whole."""

    @abstractmethod
    def request_whole(self) -> None:
        """All of a request has come."""

    @abstractmethod
    def data_comes(self) -> bool:
        """Called for each read. Returns whether no request is being answered."""

    @abstractmethod
    def end_after_waiting(self) -> None:
        """Close the connection once the requests that have arrived are answered."""

    @abstractmethod
    def refuse_request(self, error: GatewayError, *, at_leisure: bool = True) -> None:
        """Answer a request that the application sees nothing of, or never whole, and close the connection. Those before
        it are answered first, as answers come in order.

        Arguments:
            at_leisure: those before it have all the time they need; else a short one.
        """

    # What comes

    def data_received(self, data: bytes) -> None:
        if self.reading is _NOTHING:
            return
        at_leisure = self.data_comes()
        self._read_size = len(data)
        if self.reading is _BETWEEN:
            self.expect_head()
        self._overhead += len(data)
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
                self.refuse_request(refusal, at_leisure=at_leisure)
                return
        if self.reading is _HEAD:
            if not self._is_timed:  # it has not come in one read, as nearly all do
                self.time_head()
            if self._overhead > self.header_limit:
                self.refuse_request(self._too_large())
        elif self._overhead > _MOST_FRAMING and self.reading is _BODY:
            self.refuse_request(InvalidRequest(_TOO_MUCH_FRAMING))

    def on_message_begin(self) -> None:
        if len(self.waiting) >= _MOST_AHEAD or self.reading is _NOTHING:
            # Those before it are answered, and the last of them closes the connection; clients send the rest again.
            self.end_after_waiting()
            self.stop_reading()
            raise _TooFarAhead
        self.url = b""
        self.headers = []
        self._hosts = 0
        self.expects_continue = False
        if self.reading is not _HEAD:  # behind another request, in the same read
            self.expect_head()

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.reading is not _HEAD:
            return  # a trailer; a proxy in front of the gateway may have checked headers alone
        name = name.lower()
        if name == b"host":
            self._hosts += 1
            if value not in _known_hosts:
                self._check_host(value)
        elif name == b"expect":
            self.expects_continue = value.lower() == b"100-continue"
        elif name == b"transfer-encoding" and (value.lower() != b"chunked" or self.parser.get_http_version() != "1.1"):
            self._refuse_head(InvalidRequest("of all transfer codings only chunked, in HTTP/1.1, is understood"))
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        parser = self.parser
        if parser.should_upgrade():
            if parser.get_method() == b"CONNECT":
                self._refuse_head(InvalidRequest("this is no forward proxy"))
            self._offers_upgrade = True
            return
        self.version = parser.get_http_version()
        if self._hosts != 1 or self.version != "1.1":
            self._check_version_and_host()
        if len(self.headers) > _MOST_HEADERS or self._overhead + self._read_size > self.header_limit:
            self._check_header_size()
        self.request_begun()
        self._head_came(_BODY)

    def on_message_complete(self) -> None:
        if self._offers_upgrade:
            return
        if self.reading is _BODY:
            self.reading = _BETWEEN
        self.request_whole()

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
        self._offers_upgrade = False
        self._new_parser()
        return head + b"\r\n"

    # Bounds on a head

    def _refuse_head(self, error: GatewayError) -> None:
        """End the parser's work. `data_received` answers with `error`."""
        self._refusal = error
        raise error

    def _check_host(self, value: bytes) -> None:
        if not _VALID_HOST(value):
            self._refuse_head(InvalidRequest("the Host header is no host and port"))
        if len(_known_hosts) < _MOST_KNOWN and len(value) < 300:
            _known_hosts.add(value)

    def _check_version_and_host(self) -> None:
        """RFC 9112, sections 2.3 and 3.2."""
        version = self.version
        if version not in ("1.1", "1.0"):
            self._refuse_head(VersionNotSupported(_VERSIONS))
        elif self._hosts > 1:
            self._refuse_head(InvalidRequest("the request has more than one Host header"))
        elif self._hosts == 0 and version == "1.1":
            self._refuse_head(InvalidRequest("the request has no Host header"))
        if version == "1.0":
            self.expects_continue = False  # RFC 9110, section 10.1.1

    def _check_header_size(self) -> None:
        if len(self.headers) > _MOST_HEADERS:
            self._refuse_head(HeadersTooLarge(f"more than {_MOST_HEADERS} headers"))
        elif len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > self.header_limit:
            self._refuse_head(self._too_large())

    def _too_large(self) -> HeadersTooLarge:
        return HeadersTooLarge(f"request line and headers exceed {self.header_limit} bytes")

    def expect_head(self) -> None:
        """The bounds on headers apply from now until they are complete."""
        self.reading = _HEAD
        self._overhead = 0

    def time_head(self) -> None:
        """The time in which the head must come begins."""
        self._is_timed = True
        self.headers_deadlines.watch(self, self.loop)

    def _head_came(self, then: Reading) -> None:
        self.reading = then
        self._overhead = 0
        if self._is_timed:
            self._is_timed = False
            self.headers_deadlines.forget(self)

    def stop_reading(self) -> None:
        """Parse nothing that still comes."""
        self._head_came(_NOTHING)

    def overdue(self, seconds: float) -> None:
        """A head is late."""
        if self.transport.is_closing():
            return
        if self._overhead == 0:
            self.transport.close()  # a connection that never asked for anything gets no answer
        else:
            self.refuse_request(RequestTimedOut(f"headers did not arrive within {seconds:g} s"))


class _TooFarAhead(Exception):
    """A request that came too far ahead of its answer."""
