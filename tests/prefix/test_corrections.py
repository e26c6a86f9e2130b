"""Events about token ids correct what is believed of prompts of text, where the ids of such a prompt are known."""

from __future__ import annotations

import json
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pd_proxy.prefix.chain import Chain, chain_of, chain_of_ids, root_of_ids
from pd_proxy.prefix.corrections import Corrections
from pd_proxy.prefix.index import PrefixIndex
from pd_proxy.requests.body import read_body

KEY = b"k" * 32
ONE, OTHER = "http://a:1", "http://b:1"


def text_chain(text: str) -> Chain:
    return chain_of(read_body(json.dumps({"model": "m", "prompt": text}).encode(), "completions"), KEY)


def ids_of(text: str) -> list[int]:
    """A tokenizer of four characters a token."""
    return [crc32(text[at : at + 4].encode()) for at in range(0, len(text), 4)]


def id_hashes(text: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    chain = chain_of_ids(ids_of(text), root_of_ids("m", KEY), KEY)
    return chain.hashes, chain.blocks.sizes[: len(chain.hashes)]


class Bed:
    def __init__(self, most_texts: int = 1 << 17) -> None:
        self.index = PrefixIndex()
        self.corrections = Corrections(self.index, KEY, most_texts=most_texts)
        for url in (ONE, OTHER):
            self.index.join(url, 1 << 20)
        self.one, self.other = (self.corrections.join(url) for url in (ONE, OTHER))

    def cached(self, text: str) -> dict[str, int]:
        return dict(self.index.cached(text_chain(text)))


TEXT = "".join(f"{number} bottles of beer on the wall, " for number in range(100))
assert 3000 < len(TEXT) < 4000
BLOCKS = len(TEXT) // 512


def test_the_cache_of_a_warm_engine_is_known_once_the_ids_of_a_prompt_are_known() -> None:
    bed = Bed()
    bed.one.stored(*id_hashes(TEXT))
    assert bed.cached(TEXT) == {}
    bed.corrections.learn(text_chain(TEXT), ids_of(TEXT), "m")
    assert bed.cached(TEXT).keys() == {ONE}
    assert bed.cached(TEXT)[ONE] >= (BLOCKS - 1) * 128


def test_blocks_that_are_stored_later_count_for_the_text_too() -> None:
    bed = Bed()
    bed.corrections.learn(text_chain(TEXT), ids_of(TEXT), "m")
    assert bed.cached(TEXT) == {}
    hashes, sizes = id_hashes(TEXT)
    bed.other.stored(hashes[:20], sizes[:20])
    half = bed.cached(TEXT)[OTHER]
    assert 128 <= half <= 320
    bed.other.stored(hashes[20:], sizes[20:])
    assert bed.cached(TEXT)[OTHER] > half


def test_evicted_blocks_are_removed_for_the_text_from_there_on() -> None:
    bed = Bed()
    chain = text_chain(TEXT)
    bed.index.enter(ONE, chain)
    hashes, sizes = id_hashes(TEXT)
    bed.one.stored(hashes, sizes)
    whole = bed.cached(TEXT)[ONE]
    bed.corrections.learn(chain, ids_of(TEXT), "m")
    assert bed.cached(TEXT) == {ONE: whole}
    bed.one.removed(hashes[20:])
    assert 128 <= bed.cached(TEXT)[ONE] <= 320
    bed.one.removed(hashes[:20])
    assert bed.cached(TEXT) == {}


def test_an_entry_made_at_dispatch_stays_until_the_engine_says_otherwise() -> None:
    bed = Bed()
    chain = text_chain(TEXT)
    bed.corrections.learn(chain, ids_of(TEXT), "m")
    bed.index.enter(OTHER, chain)
    before = bed.cached(TEXT)
    bed.one.stored(*id_hashes("something else " * 100))
    bed.one.removed(id_hashes(TEXT)[0])
    assert bed.cached(TEXT) == before


def test_prompts_with_the_same_beginning_share_the_learnt_ids() -> None:
    bed = Bed()
    bed.corrections.learn(text_chain(TEXT), ids_of(TEXT), "m")
    longer = TEXT + "and what then? " * 100
    bed.corrections.learn(text_chain(longer), ids_of(longer), "m")
    bed.one.stored(*id_hashes(longer))
    assert bed.cached(longer)[ONE] > bed.cached(TEXT)[ONE] > 0


def test_another_model_or_salt_is_another_cache() -> None:
    bed = Bed()
    bed.corrections.learn(text_chain(TEXT), ids_of(TEXT), "another")
    bed.corrections.learn(text_chain(TEXT), ids_of(TEXT), "m", "pepper")
    bed.one.stored(*id_hashes(TEXT))
    assert bed.cached(TEXT) == {}


def test_nothing_is_learnt_of_a_prompt_of_ids_or_a_short_one() -> None:
    bed = Bed()
    bed.corrections.learn(chain_of_ids(ids_of(TEXT), root_of_ids("m", KEY), KEY), ids_of(TEXT), "m")
    bed.corrections.learn(text_chain("short"), [1, 2], "m")
    bed.corrections.learn(text_chain(TEXT), [], "m")
    assert bed.corrections.texts == 0


def test_the_learnt_ids_are_bounded_and_the_oldest_are_dropped_first() -> None:
    bed = Bed(most_texts=10)
    for number in range(20):
        text = f"{number} " + TEXT
        bed.corrections.learn(text_chain(text), ids_of(text), "m")
    assert bed.corrections.texts == 10
    bed.one.stored(*id_hashes(text))
    assert bed.cached(text)


def test_events_of_a_removed_engine_are_ignored() -> None:
    bed = Bed()
    bed.one.stored(*id_hashes(TEXT))
    bed.corrections.leave(ONE)
    bed.corrections.learn(text_chain(TEXT), ids_of(TEXT), "m")
    assert bed.cached(TEXT) == {}


def test_a_cache_of_one_publisher_is_cleared_with_what_was_entered_at_dispatch() -> None:
    bed = Bed()
    bed.index.enter(ONE, text_chain(TEXT))
    bed.one.cleared()
    assert bed.cached(TEXT) == {}


@given(st.text(min_size=1, max_size=40), st.lists(st.integers(0, (1 << 32) - 1), max_size=600))
def test_whatever_the_ids_of_a_text_no_more_is_believed_than_the_ids_that_are_stored(word: str, ids: list[int]) -> None:
    text = (word + " ") * 200
    chain = text_chain(text)
    bed = Bed()
    bed.corrections.learn(chain, ids, "m")
    of_ids = chain_of_ids(ids, root_of_ids("m", KEY), KEY)
    bed.one.stored(of_ids.hashes, of_ids.blocks.sizes[: len(of_ids.hashes)])
    # The tokens of a text are estimated here; of its bytes, no more are believed cached than its stored ids stand for.
    believed = bed.index.cached(chain).get(ONE, 0) / max(1, chain.tokens)
    assert believed <= len(of_ids.hashes) * 16 / max(1, len(ids)) + 1e-9
    bed.one.removed(of_ids.hashes)
    assert bed.index.cached(chain) == {}


def test_an_invalid_id_is_refused() -> None:
    bed = Bed()
    for ids in ([1 << 32] * 16, [-1] * 16):
        with pytest.raises(OverflowError):
            bed.corrections.learn(text_chain(TEXT), ids, "m")
