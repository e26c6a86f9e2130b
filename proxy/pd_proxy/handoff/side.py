"""The address at which decode's engine fetches the KV cache of a hand-off, for connectors whose parameters contain it.

Used only for diagnosis: `doctor` checks whether the address can be reached, to explain why a hand-off failed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import msgspec

from pd_proxy.decoding import Undecodable, decode_json, json_decoder
from pd_proxy.handoff.connector import Handoff

_decode = json_decoder(dict[str, Any])
_PORTS = ("remote_port", "remote_handshake_port")


def side_of(handoff: Handoff) -> tuple[str, int] | None:
    """Host and port of prefill's side; None where the hand-off does not contain them in readable form."""
    members = handoff.members
    if "bootstrap_host" in members:
        try:
            host, port = (decode_json(members[name]) for name in ("bootstrap_host", "bootstrap_port"))
        except (Undecodable, KeyError):
            return None
        return _checked(host.strip("[]") if isinstance(host, str) else host, port)
    try:
        params = _decode(members.get("kv_transfer_params", msgspec.Raw(b"{}")))
    except Undecodable:
        return None
    return _in_params(params) or _in_params(params.get("remote_prefiller"))


def _in_params(params: Any) -> tuple[str, int] | None:
    if not isinstance(params, Mapping):
        return None
    if isinstance(address := params.get("remote_bootstrap_addr"), str):
        try:
            parts = urlsplit(address)
            return _checked(parts.hostname, parts.port)
        except ValueError:
            return None
    port = next((params[name] for name in _PORTS if name in params), None)
    return _checked(params.get("remote_host"), port)


def _checked(host: object, port: object) -> tuple[str, int] | None:
    if not (isinstance(host, str) and host and type(port) is int and 0 < port < 65536):
        return None
    return host, port
