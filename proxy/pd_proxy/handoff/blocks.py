"""The block ids of a hand-off, which say where the prefill engine has the KV cache of a prompt."""

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
    """Check that `ids` names at least one block, in one of the two forms that engines use.

    Raises:
        HandoffInvalid: it does not.
    """
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
    """The number of blocks of a hand-off in each KV cache group.

    Raises:
        Undecodable: `ids` is not a list of lists of block ids.
    """
    if (groups := _groups(bytes(ids))) is not None:
        return [group.count(b",") + 1 if group else 0 for group in groups]
    return [len(group) for group in _decode_groups(ids)]


def _groups(ids: bytes) -> list[bytes] | None:
    """The text of each inner list in a long list of lists of numbers without spaces; None where `ids` is not like that.

    A long prompt has thousands of blocks, and decoding each number takes five times as long.
    """
    if len(ids) < _LONG or not ids.startswith(b"[[") or ids.translate(None, b"0123456789,[]"):
        return None
    groups = ids[2:-2].split(b"],[")
    return None if any(group.find(b"[") >= 0 or group.find(b"]") >= 0 for group in groups) else groups
