"""A ZeroMQ socket on which engines tell the gateway something: bound, read as messages come, bounded in every way.

Nobody is authenticated on such a socket: whoever reaches it can send. So nothing is believed for having come here, and
nothing that comes can grow: a message has few and small parts, few wait for each peer, and only some are read in one
turn of the event loop. The socket is read by the loop itself, without a task.

pyzmq is an extra of the package; it is imported where a socket is wanted, and nowhere else.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

log = logging.getLogger("pd_proxy.fleet")

_LONGEST = 1024  # bytes of a part; what engines send has some 300. libzmq cuts off a peer that sends more
_PARTS = 4  # an identity, an empty delimiter, and the message: three at most
_WAITING = 64  # messages that libzmq keeps of each peer
_AT_ONCE = 64  # messages that are read in one turn of the loop


class CannotListen(Exception):
    """The socket cannot be had; the text says why, for people."""


def library(wanting: str = "a connector of the settings speaks ZeroMQ") -> Any:
    """pyzmq.

    Arguments:
        wanting: what it is needed for, for people.
    Raises:
        CannotHear: it is not installed.
    """
    try:
        return importlib.import_module("zmq")
    except ImportError:
        raise CannotListen(f"{wanting}, and pyzmq is not installed: pip install pd-proxy[zmq]") from None


class ZmqListener:
    """One bound socket.

    Arguments:
        kind: `PULL` for messages from anybody, `ROUTER` for those of peers that could be answered.
        address: `host:port`, the host an IP address.
        heard: called with each message, its parts without the sender's identity.
    Raises:
        CannotHear: pyzmq is missing, or the address cannot be had.
    """

    def __init__(
        self, kind: Literal["PULL", "ROUTER"], address: str, heard: Callable[[Sequence[bytes]], object]
    ) -> None:
        self._zmq = zmq = library()
        self._heard = heard
        self._skipped = 1 if kind == "ROUTER" else 0
        self._loop = asyncio.get_running_loop()
        self._again: asyncio.Handle | None = None
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(getattr(zmq, kind))
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, _LONGEST)
        self._socket.setsockopt(zmq.RCVHWM, _WAITING)
        self._socket.setsockopt(zmq.IPV6, int("[" in address))
        try:
            self._socket.bind(f"tcp://{address}")
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise CannotListen(f"cannot listen for engines on {address}: {error}") from None
        self._file = self._socket.getsockopt(zmq.FD)
        self._loop.add_reader(self._file, self._read)
        self._read()  # its descriptor tells of changes only

    def close(self) -> None:
        """Hear nothing any more."""
        self._loop.remove_reader(self._file)
        if self._again is not None:
            self._again.cancel()
        self._context.destroy(linger=0)

    def _read(self) -> None:
        """Read what is there, in several turns of the loop where it is much."""
        zmq, self._again = self._zmq, None
        for _ in range(_AT_ONCE):
            try:
                parts = self._message()
            except zmq.Again:
                return
            try:
                self._heard(parts[self._skipped :] if len(parts) <= _PARTS else ())
            except Exception:  # of one message: those behind it would wait for the next change of the descriptor
                log.exception("a message of an engine's could not be taken")
        self._again = self._loop.call_soon(self._read)

    def _message(self) -> list[bytes]:
        """The parts of the next message; of one that has too many, some.

        Raises:
            zmq.Again: there is none.
        """
        zmq, socket = self._zmq, self._socket
        parts = [socket.recv(zmq.NOBLOCK)]
        while socket.getsockopt(zmq.RCVMORE):
            part = socket.recv(zmq.NOBLOCK)  # all of a message is there once its first part is
            if len(parts) <= _PARTS:
                parts.append(part)
        return parts
