"""The block ids of a hand-off: where on prefill's engine the KV cache of a prompt lies."""

from __future__ import annotations

from typing import Annotated

import msgspec

from pd_proxy.decoding import Undecodable, json_decoder
from pd_proxy.errors import HandoffInvalid

BlockId = Annotated[int, msgspec.Meta(ge=0)]

_LONG = 1024  # bytes

_decode_groups = json_decoder(list[list[BlockId]])  # one list a KV cache group
_decode_flat = json_decoder(list[BlockId])  # engines before 0.2x


def check_blocks(ids: msgspec.Raw) -> None:
    """Raise `HandoffInvalid` unless `ids` names at least one block, in either of the two shapes engines use."""
    try:
        some = any(block_counts(ids))
    except Undecodable:
        try:
            some = bool(_decode_flat(ids))
        except Undecodable as error:
            raise HandoffInvalid(f"prefill's remote_block_ids are not usable: {error}") from None
    if not some:
        raise HandoffInvalid("prefill's remote_block_ids name no block")


def block_counts(ids: msgspec.Raw) -> list[int]:
    """How many blocks a hand-off has of each KV cache group.

    Raises:
        Undecodable: `ids` is no list of lists of block ids.
    """
    if (groups := _groups(bytes(ids))) is not None:
        return [group.count(b",") + 1 if group else 0 for group in groups]
    return [len(group) for group in _decode_groups(ids)]


def _groups(ids: bytes) -> list[bytes] | None:
    """The inside of each list in a list of lists of numbers, where the whole is long and has no spaces: the blocks of a
    long prompt are thousands, and to make a number of each takes five times as long. None where it is not like that."""
    if len(ids) < _LONG or not ids.startswith(b"[[") or ids.translate(None, b"0123456789,[]"):
        return None
    groups = ids[2:-2].split(b"],[")
    return None if any(group.find(b"[") >= 0 or group.find(b"]") >= 0 for group in groups) else groups
