"""Cuts a TCP connection with a reset.

Invariant: after `reset` the peer sees a reset (RST), not an orderly end, once it has read what was sent before.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct

_NO_LINGER = struct.pack("ii", 1, 0)


def reset(transport: asyncio.Transport) -> None:
    """Abort a connection so that its peer sees a reset at once."""
    plain = transport.get_extra_info("socket")
    if plain is not None:
        # A duplicate is used, because an event loop's own socket object may not allow the option, which is the
        # connection's.
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(plain.fileno())) as duplicate:
            duplicate.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
    transport.abort()
