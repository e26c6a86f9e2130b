"""The addresses and ids of an engine's side of a hand-off.

They are set by operators or learnt from the engine. Each connector needs some of them.
"""

from __future__ import annotations

from typing import Literal

import msgspec


class Coordinates(msgspec.Struct, frozen=True):
    """An engine's coordinates. Values that are not known, or that the connector does not use, are empty.

    Attributes:
        host: the host by which other engines reach it: a name or an address, IPv6 without brackets.
        port: the port with which the connector begins: that of a bootstrap server, a side channel or a handshake.
        notify_port: the port at which it receives notifications of transfers, for connectors that have them.
        init_ports, alloc_ports, query_ports: the ports of a receiver, one for each tensor-parallel rank.
        engine_ids: the ids that its connector has, one for each data-parallel rank.
        tp, pp, dp: the number of its tensor-parallel, pipeline-parallel and data-parallel ranks.
    """

    host: str = ""
    port: int = 0
    notify_port: int = 0
    init_ports: tuple[int, ...] = ()
    alloc_ports: tuple[int, ...] = ()
    query_ports: tuple[int, ...] = ()
    engine_ids: tuple[str, ...] = ()
    tp: int = 1
    pp: int = 1
    dp: int = 1

    @property
    def authority(self) -> str:
        """`host:port`, with brackets where the host needs them."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


class Announcement(msgspec.Struct, frozen=True):
    """What an engine announces when it registers.

    Attributes:
        role: the role in which it was started.
        host, port: the address of its API, by which its backend is found.
        coordinates: the coordinates of its side of a hand-off.
    """

    role: Literal["prefill", "decode"]
    host: str
    port: int
    coordinates: Coordinates
