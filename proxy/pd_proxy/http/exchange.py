"""One connection to an engine for bounded exchanges, one after the other, that says at once when it ends.

The control plane's client (`control.py`) has a connection for each request. Here the connection itself is the point:
`Tether` has to know the moment at which the engine's kernel closes it, which no client library tells, and whether a
port can be reached at all is asked without a request.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from typing import cast
from urllib.parse import urlsplit

import httptools
import msgspec

from pd_proxy.errors import BackendCut, BackendError, BackendGarbled, BackendUnreachable
from pd_proxy.http.control import MOST_BODY, Answer

MOST_HEAD = 64 * 1024
"""Bytes of an answer's status line and headers at most, and of framing between two pieces of its body."""


class Wire(asyncio.Protocol):
    """A connection for bounded exchanges, one after the other.

    Arguments:
        on_lost: called once when the connection ends, other than by `close`.
    """

    def __init__(self, on_lost: Callable[[], object] = lambda: None) -> None:
        self._on_lost = on_lost
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._waiter: asyncio.Future[None] | None = None
        self._error: BackendError | None = None
        self._headers: dict[bytes, bytes] = {}
        self._status = 0  # 0 until the head is whole
        self._barren = 0  # bytes that came since the last that were a whole head, or of the body
        self._body: list[bytes] = []
        self._size = 0
        self._limit = 0
        self._complete = True  # nothing is asked yet
        self._surplus = False
        self._closed = False

    @property
    def holds(self) -> bool:
        """Whether the connection is open."""
        return self._transport is not None and not self._transport.is_closing()

    def close(self) -> None:
        """End the connection; nobody is told."""
        self._closed = True
        if self._transport is not None:
            self._transport.abort()

    async def ask(self, request: bytes, *, limit: int = MOST_BODY) -> Answer:
        """One exchange, whole. The caller bounds its time; an exchange that was broken off ends the connection.

        Arguments:
            limit: bytes of the body.
        Raises:
            BackendCut, BackendGarbled
        """
        self._begin(request, limit)
        try:
            while not self._complete:
                await self._news()
        except BaseException:
            if self._transport is not None:
                self._transport.abort()
            raise
        return Answer(self._status, self._headers, b"".join(self._body))

    def _begin(self, request: bytes, limit: int) -> None:
        if self._transport is None or not self.holds:
            raise BackendCut("the connection has ended")
        self._status = self._barren = self._size = 0
        self._limit = limit
        self._headers = {}
        self._body = []
        self._complete = False
        self._transport.write(request)

    async def _news(self) -> None:
        """Wait until something has come, or raise why nothing will."""
        if self._error is not None:
            raise self._error
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None
        if self._error is not None and not self._complete:
            raise self._error

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, error: BackendError) -> None:
        if self._error is None:
            self._error = error
        if self._transport is not None:
            self._transport.abort()
        self._lose()

    def _lose(self) -> None:
        if self._error is None:
            self._error = BackendCut("the connection ended")
        self._wake()
        if not self._closed:
            self._closed = True
            self._on_lost()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if self._closed:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._error is not None:
            return
        if self._complete:
            self._fail(BackendGarbled("it sent what nobody had asked for"))
            return
        self._barren += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._fail(BackendGarbled("it wanted to switch protocols"))
        except httptools.HttpParserError as error:
            self._fail(BackendGarbled(f"it did not speak HTTP: {error}"))
        if self._surplus:
            self._fail(BackendGarbled("it answered twice"))
        elif self._barren > MOST_HEAD:
            self._fail(BackendGarbled(f"it sent more than {MOST_HEAD} bytes of headers"))
        elif self._encoding and not self._complete:
            self._fail(BackendGarbled(f"its answer is encoded ({self._encoding[:32]!r}), which was not asked for"))
        elif self._size > self._limit:
            self._body.clear()
            self._fail(BackendGarbled(f"it answered with more than {self._limit} bytes"))
        self._wake()

    @property
    def _encoding(self) -> str:
        """How the answer's body is encoded; empty where it is as it should be."""
        said = self._headers.get(b"content-encoding", b"").strip().lower() if self._status else b""
        return "" if said == b"identity" else said.decode("latin-1")

    def eof_received(self) -> None:
        unbounded = b"content-length" not in self._headers and b"transfer-encoding" not in self._headers
        if self._status and unbounded and self._error is None:
            self._complete = True  # its end is the connection's
        self._lose()  # at once, not when the transport has been closed

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._lose()

    # httptools callbacks

    def on_message_begin(self) -> None:
        self._surplus = self._complete

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._status:  # else a trailer
            self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200:  # 100 Continue and early hints: the answer is still to come
            self._headers = {}
        elif not self._complete:
            self._status = status
            self._barren = 0

    def on_body(self, body: bytes) -> None:
        self._barren = 0
        if not self._complete and not self._encoding and self._size <= self._limit:
            self._size += len(body)
            self._body.append(body)

    def on_message_complete(self) -> None:
        if not self._status or self._complete:
            return
        if not self._encoding:
            self._complete = self._size <= self._limit
        if not self._parser.should_keep_alive() and self._transport is not None:
            self._transport.close()


class Address(msgspec.Struct, frozen=True):
    """Where an engine is, taken from its URL."""

    host: str
    port: int
    tls: bool
    prefix: str
    authority: str

    @classmethod
    def of(cls, url: str) -> Address:
        parts = urlsplit(url)
        tls = parts.scheme == "https"
        authority = parts.netloc.rpartition("@")[2]
        return cls(parts.hostname or "", parts.port or (443 if tls else 80), tls, parts.path, authority)

    def request(self, method: str, path: str, headers: bytes, body: bytes = b"") -> bytes:
        """A whole request.

        Arguments:
            path: behind the URL's own.
            headers: whole lines, each ending in CRLF.
        """
        length = b"content-length: %d\r\n" % len(body) if body or method == "POST" else b""
        return b"%b %b HTTP/1.1\r\nhost: %b\r\naccept-encoding: identity\r\n%b%b\r\n%b" % (
            method.encode("ascii"),
            (self.prefix.rstrip("/") + path or "/").encode("ascii"),
            self.authority.encode("ascii"),
            headers,
            length,
            body,
        )


async def connect(wire: Wire, url: str, seconds: float, trust: Callable[[], ssl.SSLContext]) -> None:
    """Connect.

    Arguments:
        trust: gives what certificates are checked against, where the URL is of https.
    Raises:
        BackendUnreachable: it did not come about within `seconds`.
    """
    loop, address = asyncio.get_running_loop(), Address.of(url)
    try:
        async with asyncio.timeout(seconds):
            secure = trust() if address.tls else None
            await loop.create_connection(lambda: wire, address.host, address.port, ssl=secure)
    except TimeoutError:
        raise BackendUnreachable(f"no connection within {seconds:g} s") from None
    except (OSError, UnicodeError) as error:
        text = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise BackendUnreachable(str(text)) from error
