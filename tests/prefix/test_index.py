"""The index of which engine holds which blocks."""

from __future__ import annotations

from hashlib import blake2b
from itertools import product

import pytest
from pd_proxy.prefix.blocks import growing
from pd_proxy.prefix.chain import Chain
from pd_proxy.prefix.index import DEFAULT_CAPACITY, Caching, PrefixIndex

BLOCKS = growing(((1000, 10),))


def prompt(*parts: str, scale: float = 1.0, exact: bool = True) -> Chain:
    """A prompt of 10 units for each letter; a block's hash stands for the text up to its end."""
    said = "".join(parts)
    hashes = tuple(int.from_bytes(blake2b(said[: end + 1].encode()).digest()[:8], "big") for end in range(len(said)))
    units = 10 * len(said)
    return Chain(hashes, int(units * scale), units, scale, BLOCKS, exact)


def joined(*engines: str, capacity: int = 1000) -> PrefixIndex:
    index = PrefixIndex()
    for engine in engines:
        index.join(engine, capacity)
    return index


def send(index: PrefixIndex, engine: str, chain: Chain) -> None:
    """Send a prompt that is answered before the next one."""
    index.enter(engine, chain)
    index.settle(engine, chain)


def test_a_prompt_is_believed_cached_from_when_it_is_sent() -> None:
    index = joined("a", "b", "c")
    index.enter("a", prompt("abcd"))
    index.enter("b", prompt("abxy"))
    assert index.cached(prompt("abcdef")) == {"a": 40, "b": 20}
    assert index.cached(prompt("abxyz")) == {"a": 20, "b": 40}
    assert index.cached(prompt("xabcd")) == {}
    assert index.cached(prompt("")) == {}


def test_tokens_are_by_the_prompts_own_scale() -> None:
    index = joined("a")
    index.enter("a", prompt("abcd", scale=0.25))
    assert index.cached(prompt("abcd", scale=0.5)) == {"a": 20}


@pytest.mark.parametrize("engines", [1, 2, 3, 40, 300])
def test_all_engines_are_looked_up_at_once(engines: int) -> None:
    urls = [f"http://{number}" for number in range(engines)]
    index = joined(*urls)
    for number, url in enumerate(urls):
        index.enter(url, prompt("abcdefghij"[: number % 11]))
    found = index.cached(prompt("abcdefghijk"))
    assert found == {url: number % 11 * 10 for number, url in enumerate(urls) if number % 11}


def test_the_least_recently_used_prompt_is_dropped_last_block_first() -> None:
    index = joined("a", capacity=100)
    send(index, "a", prompt("abcde"))
    send(index, "a", prompt("uvwxy"))
    send(index, "a", prompt("ab"))
    send(index, "a", prompt("mn"))
    assert index.cached(prompt("uvwxy")) == {"a": 50}
    assert index.cached(prompt("abcde")) == {"a": 30}
    send(index, "a", prompt("op"))
    assert index.cached(prompt("abcde")) == {"a": 20}
    assert index.cached(prompt("uvwxy")) == {"a": 40}
    assert index.tokens("a") == 100


def test_a_prompt_longer_than_the_cache_leaves_its_start() -> None:
    index = joined("a", capacity=50)
    index.enter("a", prompt("abcdefgh"))
    assert index.cached(prompt("abcdefgh")) == {"a": 50}


def test_an_engine_that_finds_less_has_lost_everything_that_it_used_before() -> None:
    index = joined("a", "b")
    for text in ("old", "abcdef", "new"):
        send(index, "a", prompt(text))
        send(index, "b", prompt(text))
    asked = prompt("abcdefgh")
    index.enter("a", asked)
    index.correct("a", asked, 20, 80)
    assert index.cached(prompt("old")) == {"b": 30}
    assert index.cached(prompt("new")) == {"a": 30, "b": 30}, "it was used later than what was lost"
    assert index.cached(asked) == {"a": 80, "b": 60}, "it has just computed the rest again"
    assert index.figures(0).forgotten == 3


def test_blocks_that_were_used_together_are_lost_together() -> None:
    index = joined("a")
    send(index, "a", prompt("abcdefgh"))
    asked = prompt("abcd")
    index.enter("a", asked)
    index.correct("a", asked, 0, 40)
    assert index.cached(prompt("abcdefgh")) == {"a": 40}


@pytest.mark.parametrize(("found", "left"), [(40, {"a": 30}), (30, {"a": 30}), (20, {"a": 30}), (10, {}), (0, {})])
def test_a_loss_is_as_old_as_the_first_block_that_is_lost(found: int, left: dict[str, int]) -> None:
    """One more block than was found may be there."""
    index = joined("a")
    for text in ("abcdef", "new", "abc"):
        send(index, "a", prompt(text))
    asked = prompt("abcdefgh")
    index.enter("a", asked)
    index.correct("a", asked, found, 80)
    assert index.cached(prompt("new")) == left


def test_a_prompts_tokens_are_as_they_were_estimated_last() -> None:
    index = joined("a")
    for scale, tokens in ((1.0, 30), (2.0, 60), (0.5, 15)):
        index.enter("a", prompt("abc", scale=scale))
        assert index.tokens("a") == tokens


def test_an_engine_that_finds_what_was_believed_loses_nothing() -> None:
    index = joined("a")
    for text in ("old", "abcdef"):
        send(index, "a", prompt(text))
    for cached in (60, 64, 50, 80):
        asked = prompt("abcdef", f"{cached}")
        index.enter("a", asked)
        index.correct("a", asked, cached, 80)
    assert index.cached(prompt("old")) == {"a": 30}


def test_bytes_may_mislead_about_tokens() -> None:
    """For text it is unknown where in the prompt its tokens are."""
    index = joined("a")
    for text in ("old", "abcdef"):
        send(index, "a", prompt(text))
    asked = prompt("abcdefgh", exact=False)
    index.enter("a", asked)
    index.correct("a", asked, 40, 80)
    assert index.cached(prompt("old")) == {"a": 30}
    index.enter("a", asked)
    index.correct("a", asked, 10, 80)
    assert index.cached(prompt("old")) == {}


def test_a_burst_of_one_prefix_is_no_loss() -> None:
    """The engine has not computed the prefix for the first request when it looks it up for the second."""
    index = joined("a")
    send(index, "a", prompt("old"))
    burst = [prompt("abcdefgh", letter) for letter in "123"]
    for asked in burst:
        index.enter("a", asked)
    for asked in burst:
        index.correct("a", asked, 0, 90)
    assert index.cached(prompt("old")) == {"a": 30}
    assert index.caching("a") is Caching.ON
    later = prompt("abcdefgh", "4")
    index.enter("a", later)
    index.correct("a", later, 0, 90)
    assert index.cached(prompt("old")) == {}, "all of them were answered before this one was sent"


def test_a_computed_prompt_is_cached_while_its_answer_goes_on() -> None:
    index = joined("a")
    stream, old = prompt("stream"), prompt("old")
    index.enter("a", stream)
    send(index, "a", old)
    for forgotten in (False, True):
        asked = prompt("old", "x" if forgotten else "y")
        index.enter("a", asked)
        index.correct("a", asked, 0, 40)
        assert ("a" in index.cached(stream)) is not forgotten
        index.computed("a", stream)
    index.correct("a", stream, 0, 60)


@pytest.mark.parametrize(("cached", "total"), [(-1, 80), (81, 80), (0, 0), (0, -5), (10**30, 80), (10**30, 10**29)])
def test_impossible_reports_are_refused(cached: int, total: int) -> None:
    index = joined("a")
    send(index, "a", prompt("abcdefgh"))
    asked = prompt("abcdefgh")
    index.enter("a", asked)
    index.correct("a", asked, cached, total)
    assert index.cached(asked) == {"a": 80}
    assert index.figures(0).refused == 1


def test_an_engine_that_never_finds_anything_has_no_cache_until_it_does() -> None:
    index = joined("a")
    for _ in range(9):
        asked = prompt("abcdefgh")
        index.enter("a", asked)
        index.correct("a", asked, 0, 80)
    assert index.caching("a") is Caching.BLIND
    assert index.cached(prompt("abcdefgh")) == {}
    index.enter("a", prompt("abcdefgh"))
    assert index.cached(prompt("abcdefgh")) == {}
    index.correct("a", prompt("abcdefgh"), 50, 80)
    assert index.caching("a") is Caching.ON
    assert index.cached(prompt("abcdefgh")) == {"a": 50}


def test_an_engine_that_finds_more_holds_it() -> None:
    """It was warm when the gateway started, and the request was sent before the engine was known."""
    index = joined("a")
    index.correct("a", prompt("abcdefgh"), 45, 80)
    assert index.cached(prompt("abcdefgh")) == {"a": 40}


def test_a_prompt_that_was_not_computed_is_withdrawn() -> None:
    index = joined("a")
    send(index, "a", prompt("abc"))
    refused, other = prompt("abcdef"), prompt("abcdx")
    index.enter("a", refused)
    index.enter("a", other)
    index.withdraw("a", refused)
    index.withdraw("a", refused)
    assert index.cached(refused) == {"a": 40}
    assert index.cached(other) == {"a": 50}


def test_clear_leave_and_disable_drop_all_entries() -> None:
    index = joined("a", "b", "c", "d")
    for engine in "abcd":
        index.enter(engine, prompt("abc"))
    index.clear("a")
    index.leave("b")
    index.disable("c")
    assert index.cached(prompt("abc")) == {"d": 30}
    for engine in "abc":
        index.enter(engine, prompt("abc"))
    assert index.cached(prompt("abc")) == {"a": 30, "d": 30}
    index.join("c", 500)
    index.join("b", 500)
    index.join("e", 500)
    for engine in "bce":
        index.enter(engine, prompt("abc"))
    assert index.cached(prompt("abc")) == dict.fromkeys("abcde", 30)
    index.join("a", 500, caching=False)
    assert index.caching("a") is Caching.ABSENT
    assert set(index.engines) == set("abcde")


def test_a_smaller_capacity_applies_from_when_it_is_reported() -> None:
    index = joined("a", capacity=100)
    index.enter("a", prompt("abcdefgh"))
    index.join("a", 30)
    assert index.cached(prompt("abcdefgh")) == {"a": 30}
    index.join("a", 0)
    for number in range(30):
        index.enter("a", Chain((number,), 10_000, 10, 1000.0, BLOCKS))
    assert index.tokens("a") == DEFAULT_CAPACITY // 10_000 * 10_000


def test_a_cache_holds_less_text_where_it_has_more_tokens_than_estimated() -> None:
    index = joined("a", capacity=100_000)
    for number in range(400):
        chain = Chain((number,), 2_000, 10, 200.0, BLOCKS)
        index.enter("a", chain)
        index.correct("a", chain, 0, 4_000)
    assert index.tokens("a") == 50_000
    for number in range(400):
        chain = Chain((number,), 2_000, 10, 200.0, BLOCKS)
        index.enter("a", chain)
        index.correct("a", chain, 0, 10**20)
    assert index.tokens("a") == 24_000 or index.tokens("a") == 26_000, "no report makes it less than a quarter"


def test_an_engine_with_repeated_losses_is_believed_to_hold_less_until_it_finds_more() -> None:
    """Running requests take a changing part of its cache."""
    index = joined("a", capacity=200)

    def held() -> int:
        for number in range(30):
            send(index, "a", prompt(chr(1000 + number)))
        return index.tokens("a")

    assert held() == 200
    for _ in range(20):
        asked = prompt("abcdef")
        send(index, "a", asked)
        send(index, "a", prompt("xyz"))
        index.enter("a", asked)
        index.correct("a", asked, 10, 60)
    assert held() == 90, "what it had used since"
    for number in range(60):
        asked = prompt(chr(2000 + number), "abcde")
        index.enter("a", asked)
        index.correct("a", asked, 60, 60)
    assert 150 < held() <= 200


def test_reports_about_unknown_engines_are_ignored() -> None:
    index = PrefixIndex()
    chain = prompt("abc")
    index.enter("a", chain)
    index.correct("a", chain, 10, 30)
    index.settle("a", chain)
    index.withdraw("a", chain)
    index.computed("a", chain)
    index.clear("a")
    index.leave("a")
    index.disable("a")
    index.store("a", chain.hashes, (10, 10, 10))
    index.remove("a", chain.hashes)
    index.entered_elsewhere("a", chain)
    index.trimmed_elsewhere("a", 5)
    assert index.cached(chain) == {}
    assert (index.tokens("a"), index.caching("a"), len(index.engines)) == (0, None, 0)


def test_entries_are_shared_among_the_engines() -> None:
    """A flood of short prompts takes no more memory than there is for all engines."""
    index = PrefixIndex(most_entries=100)
    for engine in "abcd":
        index.join(engine, 10**9)
    for engine, number in product("abcd", range(50)):
        index.enter(engine, prompt(engine, str(number)))
    figures = index.figures(0)
    assert figures.entries == 100
    assert figures.evictions >= 4 * 25
    assert index.cached(prompt("a49")) == {"a": 30}


def test_events_of_an_engine_add_and_remove_blocks() -> None:
    index = joined("a", "b")
    index.store("a", prompt("abcd").hashes, (10, 10, 10, 10))
    assert index.cached(prompt("abcd")) == {"a": 40}
    index.remove("a", (*prompt("abcd").hashes[3:], 12345))
    assert index.cached(prompt("abcd")) == {"a": 30}
    index.remove("a", prompt("abcd").hashes[:1])
    assert index.cached(prompt("abcd")) == {}, "what is behind a gap is no use"
    assert index.tokens("a") == 20
    index.disable("b")
    index.store("b", prompt("abcd").hashes, (10, 10, 10, 10))
    assert index.cached(prompt("abcd")) == {}


def test_prompts_that_other_workers_sent_are_believed_and_are_no_evidence_of_a_loss() -> None:
    """The prompt may still be on its way to the engine."""
    index = joined("a")
    send(index, "a", prompt("old"))
    index.entered_elsewhere("a", prompt("abcdefgh"))
    asked = prompt("abcdefgh")
    assert index.cached(asked) == {"a": 80}
    index.enter("a", asked)
    index.correct("a", asked, 0, 80)
    assert index.cached(prompt("old")) == {"a": 30}


def test_a_loss_that_another_worker_found_is_applied_here() -> None:
    index = joined("a")
    for text in ("old", "abcdef", "new"):
        send(index, "a", prompt(text))
    index.trimmed_elsewhere("a", 60)
    assert index.cached(prompt("old")) == {}
    assert index.cached(prompt("abcdef")) == {"a": 30}
    assert index.cached(prompt("new")) == {"a": 30}


def test_the_age_of_the_oldest_entry_is_known() -> None:
    index = joined("a", "b")
    assert index.figures(5).oldest == 0
    index.enter("a", prompt("abc"), now=100)
    index.enter("b", prompt("xyz"), now=160)
    assert index.figures(170).oldest == 70
    index.enter("a", prompt("abc"), now=180)
    assert index.figures(200).oldest == 40
    for now in range(1000, 3000):
        index.enter("b", prompt("xyz"), now=now)
    assert 2820 <= index.figures(3000).oldest <= 2900, "instants are remembered more coarsely, and not for ever"
    assert index.figures(5000).bytes > 0


def test_requests_without_an_answer_do_not_take_memory_for_ever() -> None:
    index = joined("a")
    chains = [prompt("abc") for _ in range(5000)]
    for chain in chains:
        index.enter("a", chain)
    assert len(index._engines["a"].pending) == 4096
    index.correct("a", chains[0], 0, 30)
    assert index.cached(prompt("abc")) == {"a": 30}
