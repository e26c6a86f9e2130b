"""The time for which a client may read nothing while bytes for it are held."""

from __future__ import annotations

import asyncio
import socket
import struct

_ACKED = struct.Struct("@120xQ")  # tcpi_bytes_acked in Linux's struct tcp_info


class WriteLimit:
    """Ends a connection whose client reads nothing, until all that is held for it has gone.

    Arguments:
        seconds: in which the client must have read something, again and again.
    Attributes:
        over: nothing is held any more.
    """

    __slots__ = ("_loop", "_seconds", "_timer", "_transport", "over")

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        self._transport = transport
        self._loop = loop
        self._seconds = seconds
        self.over = False
        self._watch(self._taken())

    def cancel(self) -> None:
        self.over = True
        self._timer.cancel()

    def _watch(self, taken: int) -> None:
        self._timer = self._loop.call_later(self._seconds, self._check, taken)

    def _check(self, taken: int) -> None:
        if not self._transport.get_write_buffer_size():
            self.over = True
            return
        now_taken = self._taken()
        if now_taken > taken:
            self._watch(now_taken)
        else:
            self.over = True
            self._transport.abort()  # not close(), which would wait for the client

    def _taken(self) -> int:
        """A number that grows when the client reads."""
        sock = self._transport.get_extra_info("socket")
        if hasattr(socket, "TCP_INFO") and sock.family != socket.AF_UNIX:
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _ACKED.size)
            if len(info) == _ACKED.size:
                return int(_ACKED.unpack(info)[0])
        return -self._transport.get_write_buffer_size()
