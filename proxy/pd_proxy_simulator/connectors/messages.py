"""Messages from engines to a gateway over ZeroMQ: one msgpack map each, sent without blocking.

Each engine has a ZeroMQ context of its own, as a process has; it is closed with the task that uses it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import msgspec


@contextmanager
def sender(kind: Literal["PUSH", "DEALER"], address: str) -> Iterator[Any]:
    """A socket that connects to `address` (host:port), now or when the address is reachable."""
    zmq = importlib.import_module("zmq")
    context = zmq.Context(io_threads=1)
    try:
        socket = context.socket(getattr(zmq, kind))
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RECONNECT_IVL, 20)
        socket.connect(f"tcp://{address}")
        yield socket
    finally:
        context.destroy(linger=0)


def send(socket: Any, message: dict[str, Any]) -> bool:
    """Send a message; returns whether the socket accepted it."""
    zmq = importlib.import_module("zmq")
    try:
        socket.send(msgspec.msgpack.encode(message), zmq.NOBLOCK)
    except zmq.Again:
        return False
    return True
