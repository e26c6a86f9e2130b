"""Content codings of request bodies (RFC 9110, section 8.4): gzip and deflate are decoded, up to a limit.

Engines decode none, so the body that they are sent is always plain.
"""

from __future__ import annotations

import asyncio
import zlib

from pd_proxy.errors import BodyTooLarge, EncodingNotSupported, InvalidRequest
from pd_proxy.http.response import ClientResponse
from pd_proxy.http.server_exchange import ServerExchange

ACCEPTED = ("gzip", "deflate")
_NAMES = {b"gzip": "gzip", b"x-gzip": "gzip", b"deflate": "deflate"}
_PIECE = 256 * 1024  # bytes that are decoded in one turn of the event loop; less than a millisecond's work
_MOST_MEMBERS = 64  # of one gzip body; a body that is written in parts has several
_GZIP = 16 + zlib.MAX_WBITS


def coding_of(headers: dict[bytes, bytes]) -> str:
    """The coding of a request's body; empty if it has none.

    Raises:
        EncodingNotSupported
    """
    header = headers.get(b"content-encoding")
    if header is None:
        return ""
    named = [name for name in (part.strip().lower() for part in header.split(b",")) if name not in (b"", b"identity")]
    if not named:
        return ""
    if len(named) > 1 or named[0] not in _NAMES:
        shown = header.decode("latin-1")[:64]
        raise EncodingNotSupported(
            f"the content-encoding {shown!r} of the request body is not supported; use {', '.join(ACCEPTED)} or none"
        )
    return _NAMES[named[0]]


async def plain(body: bytes | bytearray, coding: str, limit: int, client: ClientResponse | None) -> bytearray:
    """Decode a body.

    Raises:
        InvalidRequest: the body is not valid in that coding, or not whole.
        BodyTooLarge: the decoded body is longer than `limit` bytes.
        BodiesFull: the memory for bodies is used up.
    """
    result, members = bytearray(), 0
    rest: bytes | memoryview = memoryview(body)
    decoder = zlib.decompressobj(_window(body, coding))
    try:
        while True:
            piece = decoder.decompress(rest, _PIECE)
            result += piece
            if len(result) > limit:
                raise BodyTooLarge(f"the request body exceeds the limit of {limit} bytes once its {coding} is decoded")
            if isinstance(client, ServerExchange):
                client.hold(len(piece))
            if decoder.eof:
                rest = decoder.unused_data
                if not rest:
                    return result
                members += 1
                if coding != "gzip" or members > _MOST_MEMBERS:
                    raise InvalidRequest(f"the request body has bytes after the end of its {coding}")
                decoder = zlib.decompressobj(_GZIP)  # gzip may have several members
            else:
                rest = decoder.unconsumed_tail
                if not rest and not piece:
                    raise InvalidRequest(f"the request body ends before the end of its {coding}")
            await asyncio.sleep(0)
    except zlib.error as error:
        raise InvalidRequest(f"the request body is not valid {coding}: {error}") from None


def _window(body: bytes | bytearray, coding: str) -> int:
    """The window parameter of zlib. "deflate" means zlib's format, but some clients send the raw deflate data that is
    inside of it."""
    if coding == "gzip":
        return _GZIP
    wrapped = len(body) >= 2 and body[0] & 0x0F == 8 and (body[0] << 8 | body[1]) % 31 == 0
    return zlib.MAX_WBITS if wrapped else -zlib.MAX_WBITS
