"""Reads JSON from outside value by value, so that a list or an object of any length costs only what is read of it.

A decoder makes a Python object of each element: hundreds of bytes for two bytes of text. Here values stay raw bytes,
and the caller can stop at any value. Values are skipped at the speed of the decoder.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import msgspec

from pd_proxy.decoding import UNDECODABLE, Undecodable, bare_json_decoder, decode_members, json_decoder, json_extent
from pd_proxy.requests.endpoints import Members

MOST_MEMBERS = 1024
"""The most members of an object. Requests have about twenty, and engines know about a hundred."""

_SHORT = 64 * 1024  # bytes up to which an object is decoded in one step
_FEW = 64  # colons up to which a longer object is decoded in one step too

_decode_short = bare_json_decoder(Members)
_decode_text = json_decoder(str)

_BLANK = re.compile(rb"[ \t\r\n]*")
_KEY = re.compile(rb'[ \t\r\n]*("[^"\\]*+(?:\\.[^"\\]*+)*+")[ \t\r\n]*:[ \t\r\n]*', re.DOTALL)
_SCALAR = re.compile(rb'(?:"[ !#-\[\]-~]{0,128}"|-?(?:0|[1-9][0-9]{0,17})|true|false|null)(?=[ \t\r\n]*[,}\]])')


class TooMany(Exception):
    """A list or an object has more elements than the bound."""


def members(raw: bytes | bytearray, most: int = MOST_MEMBERS) -> Members:
    """The members of an object.

    Raises:
        TooMany: there are more than `most`.
        Undecodable: the text is not JSON, or not an object.
    """
    if len(raw) <= _SHORT or has_few(raw, b":", _FEW):
        try:
            found = _decode_short(raw)
        except UNDECODABLE:
            found = decode_members(raw)  # its error says what is wrong
        if len(found) > most:
            raise TooMany
        return found
    start = _blank(raw, 0)
    if raw[start : start + 1] != b"{":
        return decode_members(raw)  # its error says what is wrong
    view = memoryview(raw)
    found = {}
    place = _blank(raw, start + 1)
    if raw[place : place + 1] == b"}":
        return _ended(raw, place, found)
    for _ in range(most):
        key = _KEY.match(raw, place)
        if key is None:
            raise Undecodable(f"expected a member's name (byte {place})")
        end = _end_of(raw, view, key.end())
        found[_decode_text(key[1])] = msgspec.Raw(view[key.end() : end])
        place = _blank(raw, end)
        follows = raw[place : place + 1]
        if follows == b"}":
            return _ended(raw, place, found)
        if follows != b",":
            raise Undecodable(f"expected `,` or `}}` (byte {place})")
        place += 1
    raise TooMany


def elements(raw: bytes | bytearray | memoryview) -> Iterator[memoryview]:
    """The elements of a list, one after the other; nothing where the value is not a list.

    Raises:
        Undecodable: the text is not JSON.
    """
    place = _blank(raw, 0)
    if bytes(raw[place : place + 1]) != b"[":
        return
    view = memoryview(raw)
    place = _blank(raw, place + 1)
    if bytes(raw[place : place + 1]) == b"]":
        return
    while True:
        place = _blank(raw, place)
        end = _end_of(raw, view, place)
        yield view[place:end]
        place = _blank(raw, end)
        follows = bytes(raw[place : place + 1])
        if follows == b"]":
            return
        if follows != b",":
            raise Undecodable(f"expected `,` or `]` (byte {place})")
        place += 1


def has_few(raw: bytes | bytearray, mark: bytes, most: int) -> bool:
    """Whether a byte occurs at most `most` times. The cost is at most that of `most` + 1 searches."""
    place = -1
    for _ in range(most + 1):
        place = raw.find(mark, place + 1)
        if place < 0:
            return True
    return False


def _blank(raw: bytes | bytearray | memoryview, place: int) -> int:
    found = _BLANK.match(raw, place)
    assert found is not None
    return found.end()


def _end_of(raw: bytes | bytearray | memoryview, view: memoryview, start: int) -> int:
    """The index behind the value that begins at `start`."""
    scalar = _SCALAR.match(raw, start)
    return start + json_extent(view[start:]) if scalar is None else scalar.end()


def _ended(raw: bytes | bytearray, place: int, found: Members) -> Members:
    if (after := _blank(raw, place + 1)) < len(raw):
        raise Undecodable(f"trailing characters (byte {after})")
    return found
