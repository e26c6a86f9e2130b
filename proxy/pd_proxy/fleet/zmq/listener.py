"""A bound ZeroMQ socket on which engines send messages to the gateway.

The senders are not authenticated: anything that reaches the socket can send. So a message is not trusted because it
came here, and all that comes is bounded: a message has few and small parts, few messages wait for each peer, and only
some are read in one turn of the event loop. The loop itself reads the socket, without a task.

pyzmq is an extra of the package; it is imported only if a socket is needed.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

log = logging.getLogger("pd_proxy.fleet")

_LONGEST = 1024  # bytes of a part; engines send some 300. libzmq disconnects a peer that sends more
_PARTS = 4  # more than any message has: an identity, an empty delimiter and the message are three
_WAITING = 64  # messages of each peer that libzmq keeps
_AT_ONCE = 64  # messages that are read in one turn of the event loop


class CannotListen(Exception):
    """The gateway cannot listen; the text says why, for people."""


def library(wanting: str = "a connector of the settings speaks ZeroMQ") -> Any:
    """The module of pyzmq.

    Arguments:
        wanting: why it is needed, for people.
    Raises:
        CannotListen: it is not installed.
    """
    try:
        return importlib.import_module("zmq")
    except ImportError:
        raise CannotListen(f"{wanting}, and pyzmq is not installed: pip install pd-proxy[zmq]") from None


class ZmqListener:
    """One bound socket.

    Arguments:
        kind: `PULL` for engines that push, `ROUTER` for engines whose socket is a DEALER.
        address: `host:port`; the host is an IP address.
        heard: called with the parts of each message, without the sender's identity.
    Raises:
        CannotListen: pyzmq is not installed, or the address cannot be bound.
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
        self._read()  # the descriptor becomes readable for changes only, and messages may be there already

    def close(self) -> None:
        """Close the socket."""
        self._loop.remove_reader(self._file)
        if self._again is not None:
            self._again.cancel()
        self._context.destroy(linger=0)

    def _read(self) -> None:
        """Read the messages that are there, in several turns of the event loop if they are many."""
        zmq, self._again = self._zmq, None
        for _ in range(_AT_ONCE):
            try:
                parts = self._message()
            except zmq.Again:
                return
            try:
                self._heard(parts[self._skipped :] if len(parts) <= _PARTS else ())
            except Exception:  # of one message; the next ones would wait for another change of the descriptor
                log.exception("a message from an engine could not be handled")
        self._again = self._loop.call_soon(self._read)

    def _message(self) -> list[bytes]:
        """The parts of the next message; the first ones, if it has too many.

        Raises:
            zmq.Again: there is no message.
        """
        zmq, socket = self._zmq, self._socket
        parts = [socket.recv(zmq.NOBLOCK)]
        while socket.getsockopt(zmq.RCVMORE):
            part = socket.recv(zmq.NOBLOCK)  # when the first part of a message is there, all its parts are
            if len(parts) <= _PARTS:
                parts.append(part)
        return parts
