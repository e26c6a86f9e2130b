"""The HTTP client of the control plane: the one way to ask an engine anything aside from a request's legs.

Probes, models, versions, what connectors have to know of an engine, orders of operators, stored responses. An engine
may be broken, slow or hostile, and whoever asks must not suffer for it, so every exchange is bounded: in time as a
whole, in the bytes of its head and of its body. No encoding is accepted, since a small answer could inflate to any
size, and no redirect is followed, since the fleet says where engines are.

Each request has a connection of its own. Whether a new one can be made is a part of what a probe is to find out.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlencode, urlsplit

import httptools
import msgspec

from proxy.errors import BackendCut, BackendError, BackendGarbled, BackendTimedOut, BackendUnreachable

MOST_HEAD = 64 * 1024
"""Bytes of an answer's status line and headers at most, and of framing between two pieces of its body."""
MOST_BODY = 4 * 1024 * 1024
"""Bytes of an answer's body, where nothing else is said: a list of some thousand adapters, a long page of metrics."""
_MOST_HELD = 64 * 1024  # bytes of a streamed body that wait for their reader before the engine has to


class Answer(msgspec.Struct, frozen=True):
    """What an engine answered.

    Attributes:
        headers: names in lower case; of repeated ones the last.
        body: empty for an answer whose body is read piece by piece.
    """

    status: int
    headers: Mapping[bytes, bytes]
    body: bytes = b""

    @property
    def type(self) -> bytes:
        """Its media type, in lower case and without parameters."""
        return self.headers.get(b"content-type", b"").partition(b";")[0].strip().lower()


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
        self._piecewise = False
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

    async def head(self, request: bytes) -> Answer:
        """Send a request whose body is read by `piece`.

        Raises:
            BackendCut, BackendGarbled
        """
        self._begin(request, 0)
        self._piecewise = True
        while not self._status:
            await self._news()
        return Answer(self._status, self._headers)

    async def piece(self) -> bytes:
        """What has come of the body since the last time; empty at its end.

        Raises:
            BackendCut, BackendGarbled
        """
        while not self._body and not self._complete:
            await self._news()
        piece = b"".join(self._body)
        self._body.clear()
        self._size = 0
        if self.holds and self._transport is not None:
            self._transport.resume_reading()
        return piece

    def _begin(self, request: bytes, limit: int) -> None:
        if self._transport is None or not self.holds:
            raise BackendCut("the connection has ended")
        self._status = self._barren = self._size = 0
        self._limit = limit
        self._headers = {}
        self._body = []
        self._piecewise = self._complete = False
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
        elif self._piecewise:
            if self._size > _MOST_HELD and self._transport is not None and not self._transport.is_closing():
                self._transport.pause_reading()
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
        if not self._complete and not self._encoding and (self._piecewise or self._size <= self._limit):
            self._size += len(body)
            self._body.append(body)

    def on_message_complete(self) -> None:
        if not self._status or self._complete:
            return
        if not self._encoding:
            self._complete = self._size <= self._limit or self._piecewise
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


class Control:
    """Asks engines.

    Certificates are those that the system trusts, as on the legs; they are loaded when the first https backend is
    asked, since most fleets have none and they cost a gateway 2 MB and a tenth of its start.

    Arguments:
        timeout: seconds that an exchange may take in all, connecting included, where nothing else is said.
        headers: what every request carries, as whole lines, each ending in CRLF.
    """

    def __init__(self, timeout: float, headers: bytes = b"") -> None:
        self.timeout = timeout
        self._headers = headers

    @cached_property
    def _trust(self) -> ssl.SSLContext:
        return ssl.create_default_context()

    async def ask(
        self,
        url: str,
        *,
        method: str = "GET",
        query: Mapping[str, Any] | None = None,
        body: bytes = b"",
        seconds: float | None = None,
        limit: int = MOST_BODY,
        socket: Path | None = None,
    ) -> Answer:
        """One exchange.

        Arguments:
            query: strings, numbers, and lists of them.
            body: JSON, where there is any.
            seconds: that it may take in all, connecting included.
            limit: bytes of the answer's body.
            socket: of a process of this machine, to be reached there instead of at the URL's host.
        Raises:
            BackendUnreachable, BackendTimedOut, BackendCut, BackendGarbled: the message says why, and not of whom.
        """
        seconds = self.timeout if seconds is None else seconds
        wire = Wire()
        try:
            async with asyncio.timeout(seconds):
                await self.connect(wire, url, min(seconds, self.timeout), socket)
                return await wire.ask(self._request(url, method, query, body), limit=limit)
        except TimeoutError:
            raise BackendTimedOut(f"no whole answer within {seconds:g} s") from None
        finally:
            wire.close()

    @asynccontextmanager
    async def stream(
        self, url: str, *, query: Mapping[str, Any] | None = None, idle: float
    ) -> AsyncIterator[tuple[Answer, AsyncIterator[bytes]]]:
        """An exchange whose body is of any length: its head, and the pieces of the body as they come. While they are
        not taken, the engine waits.

        Arguments:
            idle: seconds of silence after which it is given up.
        Raises:
            BackendError: as `ask`; the iterator likewise.
        """
        wire = Wire()

        async def pieces() -> AsyncIterator[bytes]:
            while True:
                try:
                    async with asyncio.timeout(idle):
                        piece = await wire.piece()
                except TimeoutError:
                    raise BackendTimedOut(f"silent for {idle:g} s") from None
                if not piece:
                    return
                yield piece

        try:
            try:
                async with asyncio.timeout(idle):
                    await self.connect(wire, url, min(idle, self.timeout))
                    head = await wire.head(self._request(url, "GET", query, b""))
            except TimeoutError:
                raise BackendTimedOut(f"no answer within {idle:g} s") from None
            yield head, pieces()
        finally:
            wire.close()

    async def connect(self, wire: Wire, url: str, seconds: float, socket: Path | None = None) -> None:
        """Connect.

        Raises:
            BackendUnreachable: it did not come about within `seconds`.
        """
        loop, address = asyncio.get_running_loop(), Address.of(url)
        try:
            async with asyncio.timeout(seconds):
                if socket is not None:
                    await loop.create_unix_connection(lambda: wire, str(socket))
                else:
                    trust = self._trust if address.tls else None
                    await loop.create_connection(lambda: wire, address.host, address.port, ssl=trust)
        except TimeoutError:
            raise BackendUnreachable(f"no connection within {seconds:g} s") from None
        except (OSError, UnicodeError) as error:
            raise BackendUnreachable(_why(error)) from None

    def _request(self, url: str, method: str, query: Mapping[str, Any] | None, body: bytes) -> bytes:
        parts = urlsplit(url)
        said = "&".join(filter(None, (parts.query, urlencode(query or {}, doseq=True))))
        headers = self._headers + b"connection: close\r\n"
        if body:
            headers += b"content-type: application/json\r\n"
        return Address.of(url).request(method, f"?{said}" if said else "", headers, body)


def _why(error: Exception) -> str:
    """What a failed connection says, in few words and without its address."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text)
