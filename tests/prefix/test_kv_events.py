"""KV events as they arrive: both encodings, engines of other versions, and any other input."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pd_proxy.decoding import Undecodable
from pd_proxy.prefix.kv_events import (
    MOST_BYTES,
    MOST_EVENTS,
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    UnknownKind,
    read_batch,
    read_event,
)

encode = msgspec.msgpack.encode


def only(event: object) -> Any:
    (raw,) = read_batch(encode([1.5, [event], 0]))
    return read_event(raw)


STORED = {
    "type": "BlockStored",
    "block_hashes": [2**64 - 1, b"\x01" * 32],
    "parent_block_hash": -7,
    "token_ids": [1, 2, 3, 4],
    "block_size": 2,
    "lora_id": None,
    "medium": "GPU",
    "lora_name": "tuned",
    "extra_keys": [["tuned"], None],
    "group_idx": 0,
    "kv_cache_spec_kind": "full_attention",
    "kv_cache_spec_sliding_window": None,
    "locality": None,
    "ownership": None,
    "session_id": "s",
    "of_a_later_version": {},
}


@pytest.mark.parametrize("event", [STORED, list(STORED.values())], ids=["map", "array"])
def test_both_encodings_decode_to_the_same_events(event: object) -> None:
    stored = only(event)
    assert isinstance(stored, BlockStored)
    assert stored.block_hashes == [2**64 - 1, b"\x01" * 32]
    assert (stored.parent_block_hash, stored.token_ids, stored.block_size) == (-7, [1, 2, 3, 4], 2)
    assert (stored.medium, stored.lora_name, stored.extra_keys) == ("GPU", "tuned", [["tuned"], None])
    assert (stored.group_idx, stored.kv_cache_spec_kind) == (0, "full_attention")


@pytest.mark.parametrize(
    ("event", "kind"),
    [
        (["BlockStored", [1], None, [5], 1, None], BlockStored),  # vLLM 0.9 and SGLang: no medium yet
        (["BlockRemoved", [1]], BlockRemoved),
        (["BlockRemoved", [1], "CPU", 1, "LOCAL", None], BlockRemoved),
        ({"type": "BlockRemoved", "block_hashes": [1], "medium": None}, BlockRemoved),
        (["AllBlocksCleared"], AllBlocksCleared),
        ({"type": "AllBlocksCleared"}, AllBlocksCleared),
        (["BlockStored", [1], None, [5], 1, 7, 8, 9, 10, 11, 12], BlockStored),  # optional members may be anything
    ],
)
def test_engines_of_other_versions_are_understood(event: object, kind: type) -> None:
    assert isinstance(only(event), kind)


@pytest.mark.parametrize("event", [["BlockMoved", [1]], {"type": "BlockMoved", "x": 1}])
def test_an_unknown_kind_of_event_is_distinguished_from_a_broken_one(event: object) -> None:
    with pytest.raises(UnknownKind, match="BlockMoved"):
        only(event)


@pytest.mark.parametrize(
    "event",
    [
        ["BlockStored", [1]],
        ["BlockStored", ["one"], None, [5], 1],
        ["BlockStored", [1], None, [[5, 6]], 1],  # pairs of ids, as SGLang has for some models
        ["BlockStored", [1.5], None, [5], 1],
        ["BlockStored", [1], None, None, 1],
        {"type": "BlockStored", "block_hashes": [1]},
        {"block_hashes": [1]},
        7,
        None,
        "BlockStored",
        [],
        {},
    ],
)
def test_a_broken_event_does_not_count_as_unknown(event: object) -> None:
    with pytest.raises(Undecodable) as caught:
        only(event)
    assert not isinstance(caught.value, UnknownKind)


@pytest.mark.parametrize("batch", [b"", b"\x93", encode({}), encode([1.0]), encode([1.0, 5]), encode("x"), b"\xc1"])
def test_an_invalid_batch_is_one_error(batch: bytes) -> None:
    with pytest.raises(Undecodable):
        read_batch(batch)


def test_a_batch_of_too_many_events_is_refused_before_its_events_are_decoded() -> None:
    many = 1 << 22
    with pytest.raises(Undecodable, match="length"):
        read_batch(b"\x92\x01\xdd" + many.to_bytes(4, "big") + b"\x80" * many)
    assert len(read_batch(encode([1.0, [7] * MOST_EVENTS]))) == MOST_EVENTS


def test_an_event_that_would_take_long_to_decode_is_refused() -> None:
    with pytest.raises(Undecodable, match="bytes"):
        only(["BlockStored", [1], None, [1] * MOST_BYTES, MOST_BYTES])


@given(st.binary(max_size=64))
def test_any_bytes_are_events_or_one_error(payload: bytes) -> None:
    with suppress(Undecodable):
        for raw in read_batch(payload):
            read_event(raw)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=4)
    | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
KINDS = st.sampled_from(["BlockStored", "BlockRemoved", "AllBlocksCleared", "Other"])


@given(st.builds(lambda kind, rest: [kind, *rest], KINDS, st.lists(VALUES, max_size=8)))
def test_events_of_any_types_are_events_or_one_error(event: list[object]) -> None:
    with suppress(Undecodable):
        only(event)
