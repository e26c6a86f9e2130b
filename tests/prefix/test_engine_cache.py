"""What an engine's cache is believed to hold follows from its events: exactly, whatever sizes blocks have, and
within bounds, whatever an engine sends."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pd_proxy.prefix.chain import chain_of_ids, root_of_ids
from pd_proxy.prefix.corrections import Corrections
from pd_proxy.prefix.engine_cache import EngineCache
from pd_proxy.prefix.index import PrefixIndex

KEY = b"k" * 32
URL = "http://a:1"
encode = msgspec.msgpack.encode
MODELS: dict[str | None, str | None] = {None: "m", "tuned": "tuned"}


class Bed:
    """One engine's cache in front of an index."""

    def __init__(self, **bounds: int) -> None:
        self.index = PrefixIndex()
        self.index.join(URL, 1 << 30)
        self.corrections = Corrections(self.index, KEY)
        list(self.corrections.want_ids())
        held = self.corrections.join(URL)
        self.counts: Counter[str] = Counter()
        self.complaints: list[tuple[str, str]] = []
        self.cache = EngineCache(
            held, MODELS.get, KEY, self.counts, lambda *said: self.complaints.append(said), **bounds
        )

    def tell(self, *events: object) -> None:
        for _ in self.cache.apply(encode([1.0, events])):
            pass

    def cached(self, ids: Sequence[int], model: str = "m", salt: str = "") -> int:
        chain = chain_of_ids(ids, root_of_ids(model, KEY, salt), KEY)
        return self.index.cached(chain).get(URL, 0)


def stored(names: list[Any], ids: Sequence[int], size: int, parent: Any = None, **more: Any) -> dict[str, Any]:
    event = {"type": "BlockStored", "block_hashes": names, "parent_block_hash": parent, "token_ids": list(ids)}
    return {**event, "block_size": size, "medium": "GPU", **more}


def removed(*names: Any, **more: Any) -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": list(names), "medium": "GPU", **more}


CLEARED = {"type": "AllBlocksCleared"}
PROMPT = [number * 7919 % 100_003 for number in range(3000)]


@pytest.mark.parametrize("size", [1, 4, 16, 24, 32, 100, 128, 1000])
def test_stored_blocks_are_found_whatever_their_size(size: int) -> None:
    bed = Bed()
    count = len(PROMPT) // size
    bed.tell(stored(list(range(count)), PROMPT[: count * size], size))
    held = count * size
    # The index has an end each 16 tokens up to 2,048, then each 64.
    assert bed.cached(PROMPT) == (held // 16 * 16 if held <= 2048 else held // 64 * 64)
    bed.tell(removed(count - 1))
    assert bed.cached(PROMPT) <= held - min(size, 64)
    bed.tell(removed(*range(count)))
    assert bed.cached(PROMPT) == 0
    assert len(bed.cache) == 0
    assert not bed.corrections.held[URL].sizes


@pytest.mark.parametrize("size", [4, 16, 32])
def test_blocks_may_come_one_by_one_each_with_its_parent(size: int) -> None:
    bed = Bed()
    for number in range(2560 // size):
        at = number * size
        bed.tell(stored([number], PROMPT[at : at + size], size, number - 1 if number else None))
    assert bed.cached(PROMPT) == 2560


def test_prompts_that_diverge_share_the_blocks_before() -> None:
    bed = Bed()
    other = [*PROMPT[:40], *range(500_000, 500_040)]
    bed.tell(stored([0, 1, 2, 3, 4], PROMPT[:80], 16), stored([10, 11], other[32:64], 16, 1))
    assert bed.cached(PROMPT) == 80
    assert bed.cached(other) == 64
    bed.tell(removed(1))
    assert bed.cached(PROMPT) == bed.cached(other) == 16


def test_adapters_and_salts_share_nothing_with_the_base_model() -> None:
    bed = Bed()
    ids = PROMPT[:32]
    bed.tell(stored([1, 2], ids, 16, lora_id=3, lora_name="tuned", extra_keys=[["tuned"], ["tuned"]]))
    bed.tell(stored([3], ids[:16], 16, extra_keys=[["pepper"]]), stored([4], ids[16:], 16, 3, extra_keys=[None]))
    assert bed.cached(ids) == 0
    assert bed.cached(ids, "tuned") == 32
    assert bed.cached(ids, salt="pepper") == 32
    bed.tell(stored([5], ids[:16], 16, lora_id=3, lora_name="tuned", extra_keys=[["tuned", "pepper"]]))
    assert bed.cached(ids, "tuned", "pepper") == 16


@pytest.mark.parametrize(
    "event",
    [
        stored([1], PROMPT[:16], 16, lora_id=3),  # an adapter without a name
        stored([1], PROMPT[:16], 16, lora_name="unheard-of"),
        stored([1], PROMPT[:16], 16, extra_keys=[[["image", 3]]]),
        stored([1], PROMPT[:16], 16, extra_keys=[["one", "two"]]),
        stored([1], PROMPT[:16], 16, 99),  # an unknown parent
        stored([1], [], 0),  # a tier that knows names only
    ],
)
def test_blocks_of_unknown_content_are_ignored(event: object) -> None:
    bed = Bed()
    bed.tell(event)
    assert bed.cached(PROMPT) == bed.cached(PROMPT, "unheard-of") == 0
    assert bed.counts == {"unplaced": 1}
    assert not bed.complaints


def test_blocks_behind_media_are_not_believed() -> None:
    bed = Bed()
    keys = [None, [["image", 3]], None]
    bed.tell(stored([1, 2, 3], PROMPT[:48], 16, extra_keys=keys), stored([4], PROMPT[48:64], 16, 3))
    assert bed.cached(PROMPT) == 16
    assert bed.counts == {"stored": 1, "unplaced": 3}


def test_a_block_is_cached_as_long_as_one_tier_has_it() -> None:
    bed = Bed()
    bed.tell(stored([1, 2], PROMPT[:32], 16), stored([1], [], 0, medium="CPU"), stored([2], [], 0, medium="STORAGE"))
    bed.tell(removed(2), removed(1, medium=None))
    assert bed.cached(PROMPT) == 32
    bed.tell(removed(2, medium="STORAGE"))
    assert bed.cached(PROMPT) == 16
    bed.tell(removed(1, medium="CPU"))
    assert bed.cached(PROMPT) == 0


def test_remote_tiers_and_a_models_other_caches_are_left_out() -> None:
    bed = Bed()
    bed.tell(stored([1], PROMPT[:16], 16, medium="STORAGE", locality="REMOTE"))
    bed.tell(stored([1], PROMPT[:16], 16, group_idx=1, kv_cache_spec_kind="mamba"))
    assert bed.cached(PROMPT) == 0
    bed.tell(stored([1], PROMPT[:16], 16, group_idx=0, kv_cache_spec_kind="full_attention"))
    bed.tell(removed(1, group_idx=1), removed(1, locality="REMOTE", medium="STORAGE"))
    assert bed.cached(PROMPT) == 16
    assert bed.counts["ignored"] == 4


def test_a_cache_that_is_cleared_has_nothing_and_begins_anew() -> None:
    bed = Bed()
    bed.tell(stored([1, 2], PROMPT[:32], 16), CLEARED)
    assert bed.cached(PROMPT) == 0
    bed.tell(stored([3], PROMPT[16:32], 16, 1), stored([1], PROMPT[:16], 16))
    assert bed.cached(PROMPT) == 16
    bed.cache.clear()
    assert bed.cached(PROMPT) == 0


def test_a_block_behind_an_evicted_one_is_found_again_when_that_is_stored_again() -> None:
    bed = Bed()
    bed.tell(stored([0, 1, 2], PROMPT[:48], 16), removed(1))
    assert bed.cached(PROMPT) == 16
    bed.tell(stored([1], PROMPT[16:32], 16, 0))
    assert bed.cached(PROMPT) == 48


@pytest.mark.parametrize(
    "event",
    [
        stored([1, 2], PROMPT[:31], 16),
        stored([1], PROMPT[:16], 0),
        stored([1], PROMPT[:16], -16),
        stored([1], [-1] * 16, 16),
        stored([1], [1 << 40] * 16, 16),
        ["BlockStored", 5],
        5,
    ],
)
def test_an_inconsistent_event_is_reported_and_ignored(event: object) -> None:
    bed = Bed()
    bed.tell(event, stored([7], PROMPT[:16], 16))
    assert bed.cached(PROMPT) == 16
    assert bed.counts == {"malformed": 1, "stored": 1}
    assert [what for what, _ in bed.complaints] == ["malformed"]


def test_events_of_an_unknown_kind_are_counted_and_the_others_are_applied() -> None:
    bed = Bed()
    bed.tell({"type": "BlockMoved", "block_hashes": [1]}, stored([7], PROMPT[:16], 16))
    assert bed.cached(PROMPT) == 16
    assert bed.counts == {"unknown": 1, "stored": 1}


def test_an_invalid_batch_is_reported() -> None:
    bed = Bed()
    for _ in bed.cache.apply(b"\xc1"):
        pass
    assert bed.counts == {"malformed": 1}


def test_the_oldest_blocks_are_dropped_where_an_engine_reports_more_than_it_can_have() -> None:
    bed = Bed(most_blocks=100)
    for start in range(0, 1000, 10):
        ids = range(start * 16, (start + 10) * 16)
        bed.tell(stored(list(range(start, start + 10)), ids, 16))
    assert len(bed.cache) == 100
    assert bed.counts["forgotten"] == 900
    assert bed.cached(range(990 * 16, 1000 * 16)) == 160
    assert bed.cached(range(160)) == 0


def test_one_event_with_too_many_blocks_is_bounded_too() -> None:
    bed = Bed(most_blocks=100)
    most = 0
    for _ in bed.cache.apply(encode([1.0, [stored(list(range(2000)), range(2000), 1)]])):
        most = max(most, len(bed.cache))
    assert len(bed.cache) <= 100
    assert most < 200


def test_the_kept_ids_are_bounded() -> None:
    bed = Bed(most_bytes=1000)
    for number in range(100):
        bed.tell(stored([number], [number] * 15, 15))
    assert len(bed.cache) == 1000 // 60


def test_ids_are_kept_once_a_client_has_sent_prompts_of_ids() -> None:
    bed = Bed()
    bed.corrections.ids_wanted = False
    bed.tell(stored(list(range(100)), PROMPT[:1600], 16))
    assert bed.cached(PROMPT) == 0
    steps = sum(1 for _ in bed.corrections.want_ids())
    assert steps == 1
    assert bed.cached(PROMPT) == 1600


# Compared with a plain model: a set of blocks, each with all ids from the prompt's start.

NAMES = st.integers(0, 11)
SIZES = st.sampled_from([4, 16, 48])
SCRIPT = st.lists(
    st.one_of(
        st.tuples(st.just("store"), NAMES, st.none() | NAMES),
        st.tuples(st.just("remove"), NAMES, st.none()),
        st.tuples(st.just("clear"), st.none(), st.none()),
    ),
    max_size=40,
)


@given(SIZES, SCRIPT)
def test_the_index_has_exactly_the_blocks_of_the_events(size: int, script: list[tuple[str, Any, Any]]) -> None:
    bed = Bed()
    truth: dict[int, tuple[int, ...]] = {}
    fresh = itertools.count(1)
    for what, name, parent in script:
        if what == "clear":
            bed.tell(CLEARED)
            truth.clear()
        elif what == "remove":
            bed.tell(removed(name))
            truth.pop(name, None)
        elif name not in truth and (parent is None or parent in truth):
            before = truth[parent] if parent is not None else ()
            if _whole(before, truth, size):
                own = tuple(next(fresh) for _ in range(size))
                bed.tell(stored([name], own, size, parent))
                truth[name] = before + own
    prompts = set(truth.values())
    for prompt in prompts:
        depth = 0
        while (depth + 1) * size <= len(prompt) and prompt[: (depth + 1) * size] in prompts:
            depth += 1
        assert bed.cached(prompt) == depth * size // 16 * 16
    assert bed.counts["malformed"] == 0


def _whole(prompt: tuple[int, ...], truth: dict[int, tuple[int, ...]], size: int) -> bool:
    """Whether all blocks of a prompt are cached: an engine computes the missing ones before it goes on."""
    held = set(truth.values())
    return all(prompt[:end] in held for end in range(size, len(prompt) + 1, size))


MESSAGES = st.lists(
    st.one_of(
        st.builds(
            stored,
            st.lists(st.integers(0, 5) | st.binary(max_size=2), max_size=3),
            st.lists(st.integers(-1, 1 << 33), max_size=8),
            st.integers(-1, 4),
            st.none() | st.integers(0, 5),
        ),
        st.builds(removed, st.integers(0, 5)),
        st.just(CLEARED),
        st.lists(st.integers(0, 9), max_size=2),
    ),
    max_size=12,
)


@given(MESSAGES)
def test_whatever_an_engine_sends_no_more_than_its_blocks_is_held(events: list[object]) -> None:
    bed = Bed(most_blocks=4, most_bytes=64)
    bed.tell(*events)
    assert len(bed.cache) <= 4
    bed.tell(CLEARED)
    assert len(bed.cache) == 0
    assert not bed.corrections.held[URL].sizes
    assert bed.index.tokens(URL) == 0


@given(st.lists(st.binary(max_size=40), max_size=5))
def test_any_bytes_leave_the_cache_in_order(payloads: list[bytes]) -> None:
    bed = Bed()
    bed.tell(stored([1], PROMPT[:16], 16))
    for payload in payloads:
        for _ in bed.cache.apply(payload):
            pass
    assert bed.cached(PROMPT) == 16


def test_blocks_that_follow_each_other_in_a_ring_are_left_out() -> None:
    bed = Bed()
    ring = [stored([1], [1], 1), stored([2], [2], 1, 1), removed(1), stored([1], [3], 1, 2)]
    bed.tell(*ring, *(stored([number], [number], 1, number - 1 if number > 3 else 1) for number in range(3, 40)))
    assert bed.cached([1, 2, 3, *range(3, 40)]) == 0
    assert bed.counts["unplaced"] > 0


def test_a_block_with_too_many_tokens_is_ignored() -> None:
    bed = Bed()
    bed.tell(stored([1], range(20_000), 20_000))
    assert bed.counts["malformed"] == 1 and len(bed.cache) == 0


@pytest.mark.parametrize("size", [16, 1000])
def test_large_blocks_are_processed_in_several_steps(size: int) -> None:
    bed = Bed()
    count = 64_000 // size
    event = stored(list(range(count)), [0] * count * size, size)
    assert sum(1 for _ in bed.cache.apply(encode([1.0, [event]]))) >= 15


@given(st.lists(st.tuples(st.integers(0, 5), st.none() | st.integers(0, 5), st.booleans()), max_size=60))
def test_every_batch_of_any_sequence_is_processed_to_its_end(said: list[tuple[int, int | None, bool]]) -> None:
    bed = Bed()
    for name, parent, gone in said:
        bed.tell(removed(name) if gone else stored([name], [name] * 5, 5, parent))
    bed.tell(CLEARED)
    assert len(bed.cache) == 0 and not bed.corrections.held[URL].sizes
