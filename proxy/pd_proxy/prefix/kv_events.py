"""KV events as they come: what an engine publishes about its prefix cache, decoded.

vLLM (`distributed/kv_events.py`, 0.9 to 0.32 were read) and SGLang (`disaggregation/kv_events.py`) publish msgpack
`[time, events, data-parallel rank]`. An event is a map with `type`, or an array whose first item is the type; which of
the two depends on the engine's version alone. Members are only ever added at the end, so that what follows `block_size`
is looked at one by one, and whatever is not of the type it should be counts as not given.

Nothing is believed for being well-formed: `engine_cache.py` bounds what events may do.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from pd_proxy.decoding import Undecodable, msgpack_decoder

MOST_EVENTS = 1 << 16
"""Events of a batch. vLLM publishes one batch a step, with an event for each request and each block that it evicted."""
MOST_BYTES = 1 << 19
"""Of an event: 100,000 tokens at least, and engines tell of a step's. It is decoded in one piece, which takes some
10 ms for so many bytes."""

Hash = int | bytes
"""An engine's own name of a block: 64 bits, or the bytes of a digest."""


class BlockStored(msgspec.Struct, gc=False):
    """Blocks can be found in the cache from now on, one after the other.

    Attributes:
        parent_block_hash: of the block before the first; None where that begins a prompt.
        token_ids: of all of them; empty where the engine does not know any more.
        block_size: tokens a block.
        medium: the tier they are in: `GPU`, `CPU` and the like; None is the first.
        extra_keys: for each block, what else its hash depends on: its adapter, `[media item, position]`, the
            `cache_salt` (with the first block alone).
        group_idx: which of several caches of a hybrid model.
        kv_cache_spec_kind: of what kind that one is.
        locality: `REMOTE`: the tier is no cache of this engine.
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
    """Blocks cannot be found any more in a tier."""

    block_hashes: list[Hash]
    medium: Any = None
    group_idx: Any = None
    locality: Any = None


class AllBlocksCleared(msgspec.Struct, gc=False):
    """No block can be found any more."""


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
    """An event, as it seems, of a kind that is not known here: an engine newer than this gateway."""


def read_batch(payload: bytes) -> list[msgspec.Raw]:
    """The events of a batch, each still encoded.

    Raises:
        Undecodable: it is no batch, or has more than `MOST_EVENTS` events.
    """
    return _read_batch(payload).events


def read_event(raw: msgspec.Raw) -> Event:
    """One event.

    Raises:
        UnknownKind
        Undecodable: it is of a known kind, and not as it should be; or it is no event.
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
