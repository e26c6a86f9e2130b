"""The chains of stored responses."""

from __future__ import annotations

from pd_proxy.prefix.chain import Chain
from pd_proxy.prefix.earlier import EarlierChains


def chain(blocks: int) -> Chain:
    return Chain(tuple(range(blocks)), blocks * 128, blocks * 512, 0.25)


def test_a_chain_is_found_by_the_responses_id() -> None:
    earlier = EarlierChains()
    one, other = chain(3), chain(4)
    earlier.keep("resp_1", one)
    earlier.keep("resp_2", other)
    assert (earlier.find("resp_1"), earlier.find("resp_2"), earlier.find("resp_3")) == (one, other, None)


def test_chains_that_are_not_continued_are_dropped() -> None:
    earlier = EarlierChains(most_blocks=100)
    earlier.keep("hot", chain(12))
    for number in range(50):
        earlier.keep(f"{number}", chain(12))
        assert earlier.find("hot") is not None
    assert [number for number in range(50) if earlier.find(f"{number}")] == [46, 47, 48, 49]


def test_a_chain_that_is_kept_again_counts_once_and_one_that_is_too_long_is_not_kept() -> None:
    earlier = EarlierChains(most_blocks=100)
    for _ in range(20):
        earlier.keep("a", chain(12))
    earlier.keep("b", chain(60))
    assert earlier.find("a") is not None
    earlier.keep("c", chain(1000))
    assert earlier.find("c") is None
    assert earlier.find("b") is not None
    earlier.keep("d", chain(10))
    assert earlier.find("d") is not None
