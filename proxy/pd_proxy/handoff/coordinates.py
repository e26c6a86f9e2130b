"""Where an engine's side of a hand-off is reached, beside its HTTP port.

Set by people, or learnt from the engine itself; each connector says which of it it needs.
"""

from __future__ import annotations

from typing import Literal

import msgspec


class Coordinates(msgspec.Struct, frozen=True):
    """An engine's coordinates. What is not known, or has no meaning for the connector, is empty.

    Attributes:
        host: as its peers name it: a name or an address, IPv6 without brackets.
        port: of the service by which the connector begins: bootstrap server, side channel, handshake.
        notify_port: where it hears of transfers, for connectors that have one.
        init_ports, alloc_ports, query_ports: those of a receiver that is written to; one for each tensor-parallel rank.
        engine_ids: its connector's id, one for each data-parallel rank.
        tp, pp, dp: how many tensor-parallel, pipeline and data-parallel ranks it has.
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
    """What an engine says of itself when it registers.

    Attributes:
        host, port: of its API, by which it is known as a backend.
    """

    role: Literal["prefill", "decode"]
    host: str
    port: int
    coordinates: Coordinates
