"""Converts numbers and flags as engines do: by the lax mode of pydantic, with which vLLM reads requests.

Engines accept `16.0`, `"16"` or `"true"`, so the gateway does too. Conversions that could be inexact are refused, such
as that of a number beyond 2⁵³ with a decimal point.
"""

from __future__ import annotations

import re

from pd_proxy.decoding import Undecodable, json_decoder

_decode = json_decoder(bool | float | str)

_EXACT = 2**53
_NUMERAL = re.compile(r"[+-]?[0-9]+(?:_[0-9]+)*(?:\.0+)?", re.ASCII)
_WORDS = {
    **dict.fromkeys(("1", "on", "t", "true", "y", "yes"), True),
    **dict.fromkeys(("0", "off", "f", "false", "n", "no"), False),
}


def as_int(raw: bytes) -> int | None:
    """The integer that a JSON value is converted to; None where it cannot be."""
    value = _value(raw)
    if isinstance(value, float):
        return int(value) if value.is_integer() and abs(value) < _EXACT else None
    if isinstance(value, str):
        text = value.strip()
        return int(text.partition(".")[0]) if len(text) < 20 and _NUMERAL.fullmatch(text) else None
    return value if value is None else int(value)


def as_bool(raw: bytes) -> bool | None:
    """The boolean that a JSON value is converted to; None where it cannot be."""
    value = _value(raw)
    if isinstance(value, str):
        return _WORDS.get(value.lower())
    return None if value is None or value not in (0, 1) else bool(value)


def _value(raw: bytes) -> bool | float | str | None:
    try:
        value: bool | float | str = _decode(raw)
    except Undecodable:
        return None
    return value
