"""A request whose body is sent in chunks while it is being received.

Invariant: a connection on which the request was not sent whole is never used again, whatever the answer was.
"""

from __future__ import annotations

import asyncio

from pd_proxy.http.connection import Connection
from pd_proxy.http.connection_state import ConnectionState
from pd_proxy.http.origin import Origin
from pd_proxy.http.receiver import Receiver


class Upload(Connection):
    """A connection with such a request on it.

    It is always a new connection: the engine may close an idle one at any moment, and the pieces of the body that were
    sent by then could not be sent again.
    """

    __slots__ = ("_room", "_whole")

    def __init__(self, origin: Origin) -> None:
        super().__init__(origin)
        self._whole = False
        self._room: asyncio.Future[None] | None = None  # pending while the engine does not keep up

    @classmethod
    async def open(cls, origin: Origin, path: str, content_type: bytes, headers: bytes, receiver: Receiver) -> Upload:
        """Begin a request.

        Arguments:
            headers: whole lines, each ending in CRLF.
        Raises:
            BackendUnreachable: no connection could be made.
        """
        upload = await origin.connect(cls, origin.connect_timeout)
        upload.begin(receiver, origin.chunked_head(path, content_type, headers), (b"",))
        return upload

    async def write(self, data: bytes) -> None:
        """Send a piece of the body, never empty; returns when the next may be sent. It does nothing once the exchange
        is over."""
        self._put(b"%x\r\n%b\r\n" % (len(data), data))
        if self._room is not None:
            await self._room

    def finish(self) -> None:
        """End the body."""
        self._put(b"0\r\n\r\n")
        self._whole = True

    def _put(self, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def pause_writing(self) -> None:
        self._room = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        room, self._room = self._room, None
        if room is not None and not room.done():
            room.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self.resume_writing()
        super().connection_lost(exc)

    def _finish(self, receiver: Receiver) -> None:
        if self._state is ConnectionState.WHOLE and not self._whole:
            self._state = ConnectionState.LAST
        super()._finish(receiver)
