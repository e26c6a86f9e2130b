"""The common part of engines' registrations: a msgpack map in which every member is bounded and checked.

`{"type": "P" | "D", "http_address": "host:port", "zmq_address": "…", …}`, sent every three seconds. Anybody who can
reach the socket can send one, and its values become part of legs' bodies and headers.
"""

from __future__ import annotations

import re
from ipaddress import IPv6Address
from typing import Annotated, Literal

import msgspec

_NAME = re.compile(r"[0-9A-Za-z]([0-9A-Za-z.-]{0,251}[0-9A-Za-z])?")

ROLES: dict[str, Literal["prefill", "decode"]] = {"P": "prefill", "D": "decode"}


class Registration(msgspec.Struct):
    """The members that all connectors have. A connector with more members has a subclass."""

    type: Literal["P", "D"]
    http_address: Annotated[str, msgspec.Meta(max_length=300)]
    zmq_address: Annotated[str, msgspec.Meta(max_length=300)]


Ranks = Annotated[int, msgspec.Meta(ge=1, le=4096)]


def host_of(text: str) -> str:
    """Read a host: a name or an address; IPv6 with or without brackets.

    Raises:
        ValueError: the text is neither.
    """
    if _NAME.fullmatch(text):
        return text.lower()
    if text.startswith("[") and text.endswith("]"):
        text = text[1:-1]
    return str(IPv6Address(text.partition("%")[0]))


def port_of(text: str) -> int:
    """Read a port.

    Raises:
        ValueError: the text is not a port.
    """
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and 0 < int(text) < 65536):
        raise ValueError(f"{text[:20]!r} is not a port")
    return int(text)


def address_of(text: str) -> tuple[str, int]:
    """Read `host:port`.

    Raises:
        ValueError: the text has another form.
    """
    host, _, port = text.rpartition(":")
    return host_of(host), port_of(port)
