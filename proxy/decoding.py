"""The one place where bytes from outside become values: JSON, msgpack and text of clients, engines and operators.

Whatever can be wrong with such bytes raises `Undecodable`: syntax, types, UTF-8, nesting that is too deep, numbers that
are too large. msgspec by itself raises `MsgspecError`, `UnicodeDecodeError` or `RecursionError`, and a caller that has
forgotten one of them fails a request with a bare 500. `tests/test_decoding.py` holds that no other module of `proxy/`
calls a decoder.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, overload

import msgspec

if TYPE_CHECKING:
    from typing_extensions import Buffer

T = TypeVar("T")


class Undecodable(ValueError):
    """Bytes from outside that are not what they should be."""


UNDECODABLE = (ValueError, RecursionError, OverflowError, msgspec.MsgspecError)
"""Whatever a decoder raises for bytes that it cannot decode; `Undecodable` is among it, as are `UnicodeError`s."""


class WrongShape(Undecodable):
    """They are JSON or msgpack, as far as they were read, but not of the type that was asked for."""


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
    """A function that decodes JSON into one type, and raises `Undecodable`."""
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
    """The same, a call cheaper and without the translation: for what is decoded several times in each request. Whoever
    calls it catches `UNDECODABLE`, all of it; the test reads that too."""
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


def decode_python_json(raw: bytes | str) -> Any:
    """What Python's own `json` takes for JSON: NaN and Infinity too, as engines written in Python do.

    Raises:
        Undecodable
    """
    try:
        return json.loads(raw)
    except UNDECODABLE as error:
        raise _error(error) from None


def decode_json_once(raw: bytes | str) -> Any:
    """JSON in which no name of an object is given twice: what people write, where the second would win in silence.

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
    """Text in one encoding.

    Raises:
        Undecodable
    """
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise _error(error) from None
