"""What registrations of engines have in common: one msgpack map, every member of which is bounded and checked.

`{"type": "P" | "D", "http_address": "host:port", "zmq_address": "…", …}`, sent every three seconds. What is in it comes
from whoever could reach the socket, and what passes here goes into bodies and headers of legs.
"""

from __future__ import annotations

import re
from ipaddress import IPv6Address
from typing import Annotated, Literal

import msgspec

_NAME = re.compile(r"[0-9A-Za-z]([0-9A-Za-z.-]{0,251}[0-9A-Za-z])?")

ROLES: dict[str, Literal["prefill", "decode"]] = {"P": "prefill", "D": "decode"}


class Registration(msgspec.Struct):
    """What every connector's engines say; each has a subclass for the rest."""

    type: Literal["P", "D"]
    http_address: Annotated[str, msgspec.Meta(max_length=300)]
    zmq_address: Annotated[str, msgspec.Meta(max_length=300)]


Ranks = Annotated[int, msgspec.Meta(ge=1, le=4096)]


def host_of(text: str) -> str:
    """A host: a name, or an address; IPv6 with or without brackets.

    Raises:
        ValueError: it is none.
    """
    if _NAME.fullmatch(text):
        return text.lower()
    if text.startswith("[") and text.endswith("]"):
        text = text[1:-1]
    return str(IPv6Address(text.partition("%")[0]))


def port_of(text: str) -> int:
    """A port.

    Raises:
        ValueError: it is none.
    """
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and 0 < int(text) < 65536):
        raise ValueError(f"{text[:20]!r} is no port")
    return int(text)


def address_of(text: str) -> tuple[str, int]:
    """Host and port of `host:port`.

    Raises:
        ValueError: it is something else.
    """
    host, _, port = text.rpartition(":")
    return host_of(host), port_of(port)
