"""A receiver that collects an engine's whole answer."""

from __future__ import annotations

import asyncio

from pd_proxy.errors import BackendError, BackendGarbled, BackendTimedOut
from pd_proxy.http.connection import Connection
from pd_proxy.http.deadlines import Deadlines


class Collected:
    """A receiver that collects the whole answer.

    Arguments:
        url: of the backend, for messages.
        limit: bytes of the body.
        loop: the running event loop, if the caller has it at hand.
    Attributes:
        connection: that of the exchange, until it is over; set by the code that sends the request.
        status, headers: valid once `wait` has returned.
    """

    __slots__ = ("_body", "_future", "_limit", "_size", "_url", "connection", "headers", "status")

    def __init__(self, url: str, *, limit: int, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self._url = url
        self._limit = limit
        self._size = 0
        self._future: asyncio.Future[None] = (loop or asyncio.get_running_loop()).create_future()
        self._body: list[bytes] = []
        self.connection: Connection | None = None
        self.status = 0
        self.headers: dict[bytes, bytes] = {}

    async def wait(self, limit: Deadlines) -> bytes:
        """Wait for the body.

        Arguments:
            limit: how long to wait.
        Raises:
            BackendError: the answer did not become whole, or not in time. The exchange is over then.
        """
        limit.watch(self, self._future.get_loop())
        try:
            await self._future
        finally:
            limit.forget(self)
            self.abort()
        return self._body[0] if len(self._body) == 1 else b"".join(self._body)

    def fail(self, error: BackendError) -> None:
        """End the exchange from outside, as if the backend had failed with `error`."""
        self.abort()
        self.lost(error)

    def overdue(self, seconds: float) -> None:
        """Called when the time limit has passed."""
        self.fail(BackendTimedOut(f"{self._url} did not answer within {seconds:g} s"))

    def abort(self) -> None:
        """End the exchange, if it is not over."""
        if self.connection is not None:
            self.connection.abort()
            self.connection = None

    def head(self, status: int, headers: dict[bytes, bytes]) -> None:
        self.status = status
        self.headers = headers

    def data(self, data: bytes, last: bool) -> None:
        self._size += len(data)
        if self._size > self._limit:
            self.fail(BackendGarbled(f"{self._url} answered with more than {self._limit} bytes"))
        else:
            self._body.append(data)

    def end(self) -> None:
        self.connection = None
        if not self._future.done():
            self._future.set_result(None)

    def lost(self, error: BackendError) -> None:
        self.connection = None
        if not self._future.done():
            self._future.set_exception(error)
