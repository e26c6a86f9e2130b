"""Decodes KV events, which engines publish about their prefix caches.

vLLM (`distributed/kv_events.py`, 0.9 to 0.32 were read) and SGLang (`disaggregation/kv_events.py`) publish msgpack
`[time, events, data-parallel rank]`. An event is a map with `type`, or an array whose first item is the type, depending
on the engine's version. New members are only added at the end. Those behind `block_size` are checked one by one, and
one of an unexpected type counts as absent.

A well-formed event may still be false; `engine_cache.py` bounds the effects of events.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from pd_proxy.decoding import Undecodable, msgpack_decoder

MOST_EVENTS = 1 << 16
"""The most events of a batch. vLLM publishes a batch for each step, with an event for each request and evicted
block."""
MOST_BYTES = 1 << 19
"""The most bytes of an event: at least 100,000 tokens, while an event has the tokens of one step. An event is decoded
in one piece, which takes some 10 ms for so many bytes."""

Hash = int | bytes
"""An engine's own name of a block: 64 bits, or the bytes of a digest."""


class BlockStored(msgspec.Struct, gc=False):
    """Blocks that follow one another were stored.

    Attributes:
        parent_block_hash: the hash of the block before the first; None where the first begins a prompt.
        token_ids: the ids of all blocks; empty where the engine does not know them any more.
        block_size: the tokens of a block.
        medium: the tier that holds them: `GPU`, `CPU` and others; None is the first tier.
        extra_keys: for each block, what else its hash depends on: its adapter, `[media item, position]`, the
            `cache_salt` (only with the first block).
        group_idx: which cache of a hybrid model holds them.
        kv_cache_spec_kind: the kind of that cache.
        locality: `REMOTE` where the tier is not a cache of this engine.
    """

    block_hashes: list[Hash]
    parent_block_hash: Hash | None
    token_ids: list[int]
    block_size: int
    lora_id: Any = None
    medium: Any = None
    lora_name: Any = None
    extra_keys: Any = None
    group_idx: Any = None
    kv_cache_spec_kind: Any = None
    kv_cache_spec_sliding_window: Any = None
    locality: Any = None


class BlockRemoved(msgspec.Struct, gc=False):
    """Blocks were removed from a tier."""

    block_hashes: list[Hash]
    medium: Any = None
    group_idx: Any = None
    locality: Any = None


class AllBlocksCleared(msgspec.Struct, gc=False):
    """All blocks were removed."""


class _StoredMap(BlockStored, tag="BlockStored"):
    pass


class _RemovedMap(BlockRemoved, tag="BlockRemoved"):
    pass


class _ClearedMap(AllBlocksCleared, tag="AllBlocksCleared"):
    pass


class _StoredArray(BlockStored, tag="BlockStored", array_like=True):
    pass


class _RemovedArray(BlockRemoved, tag="BlockRemoved", array_like=True):
    pass


class _ClearedArray(AllBlocksCleared, tag="AllBlocksCleared", array_like=True):
    pass


class _Batch(msgspec.Struct, array_like=True):
    ts: Any
    events: Annotated[list[msgspec.Raw], msgspec.Meta(max_length=MOST_EVENTS)]


class _MapTag(msgspec.Struct):
    type: str


class _ArrayTag(msgspec.Struct, array_like=True):
    type: str


Event = BlockStored | BlockRemoved | AllBlocksCleared

_KINDS = {"BlockStored", "BlockRemoved", "AllBlocksCleared"}
_read_batch = msgpack_decoder(_Batch)
_read_map = msgpack_decoder(_StoredMap | _RemovedMap | _ClearedMap)
_read_array = msgpack_decoder(_StoredArray | _RemovedArray | _ClearedArray)
_read_map_tag = msgpack_decoder(_MapTag)
_read_array_tag = msgpack_decoder(_ArrayTag)


class UnknownKind(Undecodable):
    """The event is of a kind that is not known here. The engine may be newer than this gateway."""


def read_batch(payload: bytes) -> list[msgspec.Raw]:
    """Decode a batch. Returns its events, each still encoded.

    Raises:
        Undecodable: it is not a batch, or has more than `MOST_EVENTS` events.
    """
    return _read_batch(payload).events


def read_event(raw: msgspec.Raw) -> Event:
    """Decode one event.

    Raises:
        UnknownKind
        Undecodable: it is malformed, or is not an event.
    """
    if len(memoryview(raw)) > MOST_BYTES:
        raise Undecodable(f"it has more than {MOST_BYTES} bytes")
    is_map = _is_map(raw)
    try:
        event: Event = (_read_map if is_map else _read_array)(raw)
    except Undecodable:
        kind = (_read_map_tag if is_map else _read_array_tag)(raw).type
        if kind in _KINDS:
            raise
        raise UnknownKind(f"events of kind {kind[:64]!r} are not known") from None
    return event


def _is_map(raw: msgspec.Raw) -> bool:
    first = memoryview(raw)[0]
    return first & 0xF0 == 0x80 or first in (0xDE, 0xDF)
