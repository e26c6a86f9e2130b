"""The connections to one engine, and the requests that are sent over them.

Invariants: a connection returns to the idle list only after a whole answer, and only if both sides keep it alive; the
cost of taking a connection and of giving it back does not depend on how many are open.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import TypeVar

from pd_proxy.errors import BackendUnreachable
from pd_proxy.http.address import Address, connect
from pd_proxy.http.connection import Connection
from pd_proxy.http.deadlines import Deadlines
from pd_proxy.http.receiver import Receiver

# vLLM closes a connection that has been idle for 5 s (VLLM_HTTP_TIMEOUT_KEEP_ALIVE). The gateway stops using it before,
# so that no request is sent on a connection that is about to close.
KEEPALIVE = 4.0
_REST = 0.005  # seconds for which a connection with very frequent reads is not read
_MOST_HEADS = 32  # paths whose heads are kept; the paths of some routes contain values that clients choose

C = TypeVar("C", bound="Connection")


class Origin:
    """One backend's address and its connections.

    Arguments:
        url: `http://host:port`, or https; its path is put before the path of each request.
        connect_timeout: seconds.
    Attributes:
        rests: how long its connections rest (`Connection.rest`).
    """

    def __init__(self, url: str, *, connect_timeout: float = 5.0) -> None:
        self.url = url
        self.connect_timeout = connect_timeout
        self._address = Address.of(url)
        self._trust = ssl.create_default_context() if self._address.tls else None
        self._idle: deque[Connection] = deque()
        self._outbox: list[Connection] = []
        self._heads: dict[str, bytes] = {}  # by path: of JSON POSTs, up to the length of the body
        self._closed = False
        self.rests = Deadlines(_REST)

    def request_head(self, path: str, headers: bytes, length: int) -> bytes:
        """The head of a JSON POST: `headers` are whole lines, each ending in CRLF."""
        head = self._heads.get(path)
        if head is None:
            head = self._address.head(b"POST", path) + b"content-type: application/json\r\ncontent-length: "
            if len(self._heads) < _MOST_HEADS:
                self._heads[path] = head
        return b"%b%d\r\n%b\r\n" % (head, length, headers)

    def chunked_head(self, path: str, content_type: bytes, headers: bytes) -> bytes:
        """The head of a POST whose body follows in chunks."""
        head = self._address.head(b"POST", path)
        return b"%bcontent-type: %b\r\ntransfer-encoding: chunked\r\n%b\r\n" % (head, content_type, headers)

    async def send(
        self,
        path: str,
        headers: bytes,
        body: tuple[bytes | memoryview, ...],
        receiver: Receiver,
        *,
        within: float | None = None,
        check: Callable[[], object] | None = None,
        sent: Callable[[], object] | None = None,
    ) -> Connection:
        """Send one request and return its connection; `receiver` gets the answer.

        Arguments:
            body: in pieces, which must not change before the exchange is over.
            within: seconds after which the request must no longer be sent, if that is less than the connect timeout.
            check: called once there is a connection. If it raises, its exception is raised and nothing is sent.
            sent: called when the request has been written, soon after this returns; never called if the exchange is
                aborted before.
        Raises:
            BackendUnreachable: no connection could be made; nothing was sent.
        """
        connection = self._take()
        if connection is None:
            timeout = self.connect_timeout if within is None else min(within, self.connect_timeout)
            connection = await self.connect(Connection, timeout)
        if check is not None:
            try:
                check()
            except BaseException:
                connection.abort()
                raise
        length = len(body[0]) if len(body) == 1 else sum(map(len, body))
        connection.begin(receiver, self.request_head(path, headers, length), body, self._post, sent)
        return connection

    def _post(self, connection: Connection) -> None:
        """Send the connection's request at the end of this turn of the event loop. An engine on this machine sleeps
        while it has nothing to do, and waking it is expensive: requests that are sent together wake it once."""
        if not self._outbox:
            asyncio.get_running_loop().call_soon(self._send_all)
        self._outbox.append(connection)

    def _send_all(self) -> None:
        outbox, self._outbox = self._outbox, []
        for connection in outbox:
            receiver = connection._receiver
            try:
                connection.send()
            except Exception as fault:  # of one request; the others are sent all the same
                connection.broken(receiver, fault)

    def close(self) -> None:
        """Close the idle connections; those in use end with their exchange."""
        self._closed = True
        while self._idle:
            self._idle.pop().abort()

    def _take(self) -> Connection | None:
        """An idle connection that is still open, the last one given back first."""
        oldest_useful = monotonic() - KEEPALIVE
        while self._idle:
            connection = self._idle.pop()
            transport = connection._transport
            if connection.idle_since >= oldest_useful and transport is not None and not transport.is_closing():
                return connection
            connection.abort()
        return None

    def give(self, connection: Connection) -> None:
        """Take a connection back, after a whole answer."""
        if self._closed:
            connection.abort()
            return
        now = connection.idle_since = monotonic()
        idle = self._idle
        idle.append(connection)
        # Connections that are not needed move to the left end. Closing up to two for each one that is given back
        # removes them faster than any burst adds them.
        if now - idle[0].idle_since > KEEPALIVE:
            idle.popleft().abort()
            if now - idle[0].idle_since > KEEPALIVE:
                idle.popleft().abort()

    async def connect(self, kind: Callable[[Origin], C], timeout: float) -> C:
        """Make a new connection.

        Arguments:
            kind: its class.
            timeout: seconds.
        Raises:
            BackendUnreachable
        """
        try:
            _, connection = await connect(self._address, lambda: kind(self), timeout, self._trust)
        except BackendUnreachable as error:
            raise BackendUnreachable(f"{self.url}: {error}", blame=error.blame) from error
        return connection
