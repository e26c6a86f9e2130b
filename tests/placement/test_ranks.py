"""Which of an engine's data-parallel ranks gets a request."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pd_proxy.placement.ranks import by_engine, rank_for

from tests.placement.support import Engine, ask, learnt

COUNTS = st.lists(st.integers(0, 10**6), min_size=2, max_size=16)


@dataclass(eq=False)
class Ranks(Engine):
    """An engine of two ranks."""

    role: str = "prefill"
    ranks: tuple[int, ...] = (0, 0)
    rank_work: tuple[int, ...] = (0, 0)
    rank_names: tuple[str, ...] = ("e#0", "e#1")


def cached(**ranks: int) -> dict[str, int]:
    return {name.replace("r", "e#"): tokens for name, tokens in ranks.items()}


@given(tokens=COUNTS)
def test_without_learnt_speeds_the_rank_with_the_fewest_tokens_in_flight_is_chosen(tokens: list[int]) -> None:
    names = tuple(f"e#{number}" for number in range(len(tokens)))
    engine = Ranks("e", ranks=tuple(tokens), rank_work=(0,) * len(tokens), rank_names=names)
    assert rank_for(engine, ask(500)) == tokens.index(min(tokens))


@pytest.mark.parametrize(
    ("work", "known", "rank"),
    [
        ((0, 0), cached(r1=800), 1),  # less to compute there
        ((0, 700), cached(r1=800), 1),  # sooner, though it has other work
        ((0, 900), cached(r1=800), 0),  # later
        ((100, 0), cached(r0=800, r1=800), 1),
        ((0, 100), cached(r0=100, r1=900), 1),
        ((5, 0), {}, 1),
    ],
)
def test_the_rank_that_will_have_computed_the_prompt_first_is_chosen(
    work: tuple[int, int], known: dict[str, int], rank: int
) -> None:
    assert rank_for(Ranks("e", rank_work=work, ranks=(10, 20)), ask(1000, cached=known)) == rank


@pytest.mark.parametrize(("ahead", "rank"), [(0, 0), (100, 1), (2000, 1), (1_000_000, 1)])
def test_while_no_rank_is_free_a_prompt_waits_at_the_rank_that_has_its_prefix(ahead: int, rank: int) -> None:
    [one] = learnt(rates=[1000.0])
    engine = Ranks("e", one.speeds, rank_work=(ahead, ahead + 1000))
    assert rank_for(engine, ask(1000, cached=cached(r1=900))) == rank


def test_a_rank_that_decodes_too_is_not_given_every_prompt_of_a_prefix() -> None:
    [one] = learnt(rates=[10_000.0], steps=[0.01])
    asked = ask(1000, 500, cached=cached(r1=900))
    for role, tokens, rank in (("mixed", (0, 0), 1), ("mixed", (0, 10**6), 0), ("prefill", (0, 10**6), 1)):
        assert rank_for(Ranks("e", one.speeds, role=role, ranks=tokens), asked) == rank


def test_an_engines_cached_tokens_are_those_of_the_rank_that_would_get_the_prompt() -> None:
    engine, other = Ranks("e", rank_work=(0, 400)), Engine("http://other")
    engines = dict.fromkeys(("e", "e#0", "e#1"), engine)
    sooner, later = {"e#1": 800, other.url: 5}, {"e#0": 10, "e#1": 300, other.url: 5}
    assert by_engine(ask(1000, cached=sooner), engines) == {**sooner, "e": 800}
    assert by_engine(ask(1000, cached=later), engines) == {**later, "e": 10}


def test_tokens_that_another_rank_has_cached_do_not_count() -> None:
    engines = dict.fromkeys(("e", "e#0", "e#1"), Ranks("e"))
    assert by_engine(ask(1000, cached={"e": 900}), engines) == {"e": 0}
    assert by_engine(ask(1000, cached={"e": 900, "e#0": 100}), engines) == {"e": 100, "e#0": 100}


def test_an_engine_that_now_has_one_rank_counts_all_its_cached_tokens() -> None:
    engines = dict.fromkeys(("e", "e#0", "e#1"), Ranks("e", ranks=(), rank_work=(), rank_names=()))
    assert by_engine(ask(1000, cached={"e": 900, "e#0": 100}), engines) == {"e": 900, "e#0": 100}
