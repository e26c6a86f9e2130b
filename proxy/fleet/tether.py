"""One connection to an engine that is held open, and what was learnt over it, which holds as long as it does.

A process that ends takes its connections with it, and its kernel says so before another can listen in its place. So
while the connection is open the engine is the one that was asked, whatever it has been before or will be. Asking from
time to time would leave a gap in which an engine may have been started anew with another block size.

An engine closes a connection that is idle for long (vLLM after 5 s); each health check asks for something over it.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from typing import cast
from urllib.parse import urlsplit

import httptools

_MOST = 16 * 1024 * 1024  # bytes of one answer; a page of metrics is 60 kB


class TetherBroken(Exception):
    """The connection could not be made, or is over; the text says why."""


class Tether(asyncio.Protocol):
    """A connection for requests one after the other.

    Arguments:
        on_lost: called once when the connection ends, by whatever hand but `close`.
    """

    def __init__(self, url: str, headers: bytes, on_lost: Callable[[], object]) -> None:
        parts = urlsplit(url)
        self._host, self._tls = parts.hostname or "", parts.scheme == "https"
        self._port = parts.port or (443 if self._tls else 80)
        self._prefix = parts.path.rstrip("/")
        self._head = b"host: %b\r\n%b\r\n" % (parts.netloc.encode("ascii"), headers)
        self._on_lost = on_lost
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._body = bytearray()
        self._closed = False

    @classmethod
    async def tie(cls, url: str, headers: bytes, on_lost: Callable[[], object], seconds: float) -> Tether:
        """Connect.

        Arguments:
            headers: whole lines, each ending in CRLF.
        Raises:
            TetherBroken: it did not come about within `seconds`.
        """
        tether = cls(url, headers, on_lost)
        secure = ssl.create_default_context() if tether._tls else None
        try:
            async with asyncio.timeout(seconds):
                await asyncio.get_running_loop().create_connection(
                    lambda: tether, tether._host, tether._port, ssl=secure
                )
        except (OSError, TimeoutError) as error:
            tether.close()
            raise TetherBroken(str(error) or "timed out") from None
        return tether

    @property
    def holds(self) -> bool:
        """Whether the connection is open."""
        return self._transport is not None and not self._transport.is_closing()

    async def ask(self, path: str, seconds: float) -> tuple[int, bytes]:
        """GET something: status and body.

        Raises:
            TetherBroken: there was no whole answer within `seconds`. The connection is over then.
        """
        if not self.holds:
            raise TetherBroken("the connection has ended")
        transport = cast(asyncio.Transport, self._transport)
        self._answer = asyncio.get_running_loop().create_future()
        self._body.clear()
        transport.write(b"GET %b HTTP/1.1\r\n%b" % ((self._prefix + path).encode("ascii"), self._head))
        try:
            async with asyncio.timeout(seconds):
                return await self._answer
        except TimeoutError:
            transport.abort()
            raise TetherBroken(f"{path} was not answered in time") from None
        except asyncio.CancelledError:
            transport.abort()
            raise
        finally:
            self._answer = None

    def close(self) -> None:
        """End the connection; nobody is told."""
        self._closed = True
        if self._transport is not None:
            self._transport.abort()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if self._closed:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._end()
        if len(self._body) > _MOST:
            self._end()

    def eof_received(self) -> None:
        self._lose()  # at once, not when the transport has been closed

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._lose()

    def _end(self) -> None:
        if self._transport is not None:
            self._transport.abort()
        self._lose()

    def _lose(self) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(TetherBroken("the connection ended"))
        if not self._closed:
            self._closed = True
            self._on_lost()

    # httptools callbacks

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result((self._parser.get_status_code(), bytes(self._body)))
        if not self._parser.should_keep_alive():
            self._end()
