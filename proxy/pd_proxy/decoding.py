"""The only module that decodes bytes from outside: JSON, msgpack and text from clients, engines and operators.

Every error in such bytes raises `Undecodable`: wrong syntax, types or UTF-8, nesting that is too deep, numbers that are
too large. msgspec itself raises `MsgspecError`, `UnicodeDecodeError` or `RecursionError`, and a caller that did not
catch all of them would fail a request with 500. `tests/test_decoding.py` checks that no other module of `proxy/` calls
a decoder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, overload

import msgspec

if TYPE_CHECKING:
    from typing_extensions import Buffer

T = TypeVar("T")


class Undecodable(ValueError):
    """Bytes from outside could not be decoded."""


UNDECODABLE = (ValueError, RecursionError, OverflowError, msgspec.MsgspecError)
"""All exceptions that a decoder raises for bytes that it cannot decode, `Undecodable` and `UnicodeError` included."""


class WrongShape(Undecodable):
    """The bytes are JSON or msgpack, as far as they were read, but not of the expected type."""


def _error(error: Exception) -> Undecodable:
    if isinstance(error, msgspec.ValidationError):
        return WrongShape(str(error))
    if isinstance(error, RecursionError):
        return Undecodable("nested too deeply")
    return Undecodable(str(error).removeprefix("JSON is malformed: ").removeprefix("MessagePack data is malformed: "))


@overload
def json_decoder(kind: type[T]) -> Callable[[Buffer | str], T]: ...
@overload
def json_decoder(kind: Any) -> Callable[[Buffer | str], Any]: ...
def json_decoder(kind: Any) -> Callable[[Buffer | str], Any]:
    """Make a function that decodes JSON into one type, and raises `Undecodable`."""
    return _guarded(msgspec.json.Decoder(kind).decode)


@overload
def msgpack_decoder(kind: type[T]) -> Callable[[Buffer], T]: ...
@overload
def msgpack_decoder(kind: Any) -> Callable[[Buffer], Any]: ...
def msgpack_decoder(kind: Any) -> Callable[[Buffer], Any]:
    """The same for msgpack."""
    return _guarded(msgspec.msgpack.Decoder(kind).decode)


@overload
def bare_json_decoder(kind: type[T]) -> Callable[[Buffer | str], T]: ...
@overload
def bare_json_decoder(kind: Any) -> Callable[[Buffer | str], Any]: ...
def bare_json_decoder(kind: Any) -> Callable[[Buffer | str], Any]:
    """The same for values that are decoded several times in each request: without the cost of a call, and without the
    translation of errors. A caller must catch `UNDECODABLE` as a whole, which the test checks too."""
    return msgspec.json.Decoder(kind).decode


def _guarded(decode: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def guarded(raw: Any) -> Any:
        try:
            return decode(raw)
        except UNDECODABLE as error:
            raise _error(error) from None

    return guarded


decode_json: Callable[[Buffer | str], Any] = json_decoder(Any)
"""JSON of any type. Raises `Undecodable`."""

Members = dict[str, msgspec.Raw]
"""The members of a JSON object, each as raw bytes."""

decode_members = json_decoder(Members)
"""A JSON object. Raises `Undecodable`."""

decode_objects = json_decoder(list[Members])
"""A JSON list of objects. Raises `Undecodable`."""

decode_items = json_decoder(list[msgspec.Raw])
"""A JSON list, each of its items as raw bytes. Raises `Undecodable`."""


def is_null(raw: msgspec.Raw) -> bool:
    """Whether a member is absent or null."""
    return bytes(memoryview(raw)[:4]) in (b"", b"null")


def json_extent(raw: memoryview) -> int:
    """The length in bytes of the JSON value with which `raw` begins, whatever follows. The value is not decoded.

    Raises:
        Undecodable: `raw` does not begin with a JSON value.
    """
    try:
        return len(memoryview(_decode_raw(raw)))
    except msgspec.DecodeError as error:
        follows = _FOLLOWS.search(str(error))
        if follows is None:
            raise _error(error) from None
    except UNDECODABLE as error:
        raise _error(error) from None
    end = int(follows[1]) - _FOLLOWS_LATE
    # Whitespace behind a value is not part of it, and no value ends with whitespace.
    return end if raw[end - 1] not in b" \t\r\n" else len(bytes(raw[:end]).rstrip(b" \t\r\n"))


_decode_raw = msgspec.json.Decoder(msgspec.Raw).decode
_FOLLOWS = re.compile(r"trailing characters \(byte (\d+)\)")


def _reported_late() -> int:
    """By how many bytes the position is too high that msgspec reports for the text behind a value."""
    try:
        _decode_raw(b"[1] 2")
    except msgspec.DecodeError as error:
        if follows := _FOLLOWS.search(str(error)):
            return int(follows[1]) - 4
    raise RuntimeError("this msgspec does not say where the first of two values ends; another version does")


_FOLLOWS_LATE = _reported_late()


def decode_python_json(raw: bytes | str) -> Any:
    """Decode JSON as Python's `json` does, which accepts NaN and Infinity, as engines written in Python do.

    Raises:
        Undecodable
    """
    try:
        return json.loads(raw)
    except UNDECODABLE as error:
        raise _error(error) from None


def decode_json_once(raw: bytes | str) -> Any:
    """Decode JSON in which no object may have a name twice. For settings, where the first value would be lost silently.

    Raises:
        Undecodable
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a name is given twice")
        return dict(pairs)

    try:
        return json.loads(raw, object_pairs_hook=unique)
    except UNDECODABLE as error:
        raise _error(error) from None


def decode_text(raw: bytes | bytearray, encoding: str = "utf-8") -> str:
    """Decode text.

    Raises:
        Undecodable
    """
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise _error(error) from None
