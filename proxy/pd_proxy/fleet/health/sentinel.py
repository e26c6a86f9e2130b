"""A connection to an engine that is held open; what was learnt over it holds as long as the connection.

A process that ends takes its connections with it, and its kernel closes them before another process can listen in its
place. So while the connection is open, the engine is the one that was asked, whatever was at its address before or will
be. Requests from time to time would leave gaps, in which an engine may have been started again with another block size.

An engine closes a connection that is idle for long (vLLM after 5 s), so each health check sends a request over it.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable

from pd_proxy.errors import BackendCut, BackendError
from pd_proxy.http.address import Address, connect
from pd_proxy.http.collected import Collected
from pd_proxy.http.connection import Connection
from pd_proxy.http.control import MOST_BODY, refuse_encoded
from pd_proxy.http.deadlines import Deadlines


class SentinelClosed(Exception):
    """The connection could not be made, or has ended; the text says why."""


class Sentinel:
    """A connection for one request after the other. It owns the connection that it holds (`http.connection.Owner`).

    Arguments:
        headers: whole lines, each ending in CRLF.
        on_lost: called once when the connection ends, unless `close` has ended it.
    """

    def __init__(self, url: str, headers: bytes, on_lost: Callable[[], object]) -> None:
        self.url = url
        self.rests = Deadlines(None)  # only relayed streams rest
        self._headers = headers
        self._on_lost: Callable[[], object] | None = on_lost  # until it is called
        self._address = Address.of(url)
        self._connection = _Held(self)
        self._answer: Collected | None = None

    @classmethod
    async def connect(
        cls,
        url: str,
        headers: bytes,
        on_lost: Callable[[], object],
        seconds: float,
        trust: Callable[[], ssl.SSLContext] = ssl.create_default_context,
    ) -> Sentinel:
        """Connect.

        Arguments:
            headers: whole lines, each ending in CRLF.
            trust: returns what certificates are checked against; called only for a URL of https.
        Raises:
            SentinelClosed: the connection was not made within `seconds`.
        """
        sentinel = cls(url, headers, on_lost)
        address = sentinel._address
        try:
            await connect(address, lambda: sentinel._connection, seconds, trust() if address.tls else None)
        except BackendError as error:
            sentinel.close()
            raise SentinelClosed(str(error)) from None
        return sentinel

    @property
    def holds(self) -> bool:
        """Whether the connection is open."""
        return self._connection.is_open

    async def ask(self, path: str, seconds: float) -> tuple[int, bytes]:
        """GET a page: its status and body.

        Raises:
            SentinelClosed: there was no whole answer within `seconds`. The connection has ended then.
        """
        if not self.holds:
            raise SentinelClosed("the connection has ended")
        head = b"%baccept-encoding: identity\r\n%b\r\n" % (self._address.head(b"GET", path), self._headers)
        self._answer = answer = Collected(self.url, limit=MOST_BODY)
        answer.connection = self._connection
        self._connection.begin(answer, head, (b"",))
        try:
            body = await answer.wait(Deadlines(seconds))
            refuse_encoded(answer.headers.get(b"content-encoding", b""))
        except BackendError as error:
            self._connection.abort()
            raise SentinelClosed(str(error)) from None
        return answer.status, body

    def close(self) -> None:
        """End the connection without calling `on_lost`. A request on it fails."""
        self._on_lost = None
        if self._answer is not None:
            self._answer.fail(BackendCut(f"the connection to {self.url} was closed"))
        self._connection.abort()

    def give(self, connection: Connection) -> None:
        """The answer is whole; the connection is kept."""

    def lost(self) -> None:
        """The connection has ended."""
        on_lost, self._on_lost = self._on_lost, None
        if on_lost is not None:
            on_lost()


class _Held(Connection):
    """A connection that tells its sentinel when it ends."""

    __slots__ = ("_sentinel",)

    def __init__(self, sentinel: Sentinel) -> None:
        super().__init__(sentinel)
        self._sentinel = sentinel

    def eof_received(self) -> None:
        self.connection_lost(None)  # now; the transport calls it once it has closed itself

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._sentinel.lost()
