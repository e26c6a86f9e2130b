"""A free address for a ZeroMQ socket of the gateway, and a peer that sends to it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import zmq


@contextmanager
def address() -> Iterator[str]:
    """A free address, reserved for the one that binds it."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{held.getsockname()[1]}"


@contextmanager
def sender(where: str, kind: int = zmq.PUSH) -> Iterator[Any]:
    """A socket that is connected to an address."""
    context = zmq.Context()
    try:
        out = context.socket(kind)
        out.setsockopt(zmq.LINGER, 0)
        out.setsockopt(zmq.SNDHWM, 100_000)
        out.connect(f"tcp://{where}")
        yield out
    finally:
        context.destroy(linger=0)
