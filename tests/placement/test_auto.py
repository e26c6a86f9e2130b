"""The policy `auto`: the engine that is expected to serve a request soonest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pd_proxy.fleet.pool_speeds import PoolSpeeds
from pd_proxy.placement.auto import (
    CHOICES,
    LONG,
    expected_step,
    first_token,
    next_token,
    time_to_first_token,
    time_to_last_token,
    whole_answer,
    why_first,
)
from pd_proxy.placement.costs import costs
from pd_proxy.placement.policies import least_loaded

from tests.placement.support import Engine, ask, engines, learnt

LEGS = st.lists(st.lists(st.integers(1, 6000), max_size=4), min_size=1, max_size=8)
NUMBERS = st.floats(0, 1, exclude_max=True)
FACTORS = st.sampled_from([1.0, 1.0, 1.0, 0.5, 0.1])
NOW = 100.0


def loaded(legs: Sequence[Sequence[int]]) -> list[Engine]:
    """Equal engines, of which only these legs are known."""
    found = engines(len(legs))
    for engine, own in zip(found, legs, strict=True):
        for tokens in own:
            engine.prefills(tokens, NOW)
    return found


# Nothing cached, equal engines


@given(legs=LEGS, number=NUMBERS, prompt=st.integers(0, 2000), data=st.data())
def test_with_nothing_cached_and_equal_engines_prefill_goes_where_least_loaded_sends_it(
    legs: list[list[int]], number: float, prompt: int, data: st.DataObject
) -> None:
    pool = loaded(legs)
    for engine in pool:
        engine.factor = data.draw(FACTORS)
    asked = ask(prompt, random=lambda: number, now=NOW)
    assert first_token(pool, asked) == least_loaded(pool, asked)


@given(
    loads=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 50), FACTORS), min_size=1, max_size=8),
    number=NUMBERS,
    capacity=st.sampled_from([float("inf"), 10_000.0, 500_000.0]),
)
def test_with_equal_engines_decode_goes_where_least_loaded_sends_it(
    loads: list[tuple[int, int, float]], number: float, capacity: float
) -> None:
    pool = engines(len(loads))
    for engine, (tokens, requests, factor) in zip(pool, loads, strict=True):
        engine.inflight_tokens, engine.inflight_requests, engine.factor = tokens, requests, factor
        engine.speeds.capacity = capacity
    asked = ask(random=lambda: number)
    assert next_token(pool, asked) == least_loaded(pool, asked)
    assert whole_answer(pool, asked) == least_loaded(pool, asked)


@given(steps=st.lists(st.sampled_from([0.01, 0.02]), min_size=4, max_size=4), tokens=st.integers(0, 10**5))
def test_learnt_speeds_of_equal_engines_change_nothing(steps: list[float], tokens: int) -> None:
    """The fits are the pool's: equal engines stay equal, whatever the fits are."""
    pool = PoolSpeeds()
    two = engines(2, pool=pool)
    for step in steps:
        for engine in two:
            engine.speeds.factor = 1.0
            pool.stepped(10, 10_000, step, 0.01)
            engine.speeds.refresh()
    two[0].decodes(tokens + 1)
    two[1].decodes(tokens)
    assert next_token(two, ask()) == 1


# Prefill


def test_while_no_engine_is_free_a_prompt_goes_where_less_of_it_must_be_computed_though_it_starts_later_there() -> None:
    cached = {"http://p0": 4000}
    for waits, chosen in (((22_000, 15_000), 0), ((4_500, 0), 1), ((28_000, 15_000), 1)):
        pool = learnt([10_000.0] * 2, name="p")
        for engine, tokens in zip(pool, waits, strict=True):
            if tokens:
                engine.prefills(tokens, NOW)
        assert first_token(pool, ask(5000, now=NOW, cached=cached)) == chosen, waits


@given(
    rates=st.lists(st.floats(1000, 50_000), min_size=2, max_size=6),
    legs=st.lists(st.lists(st.integers(1, 20_000), max_size=4), min_size=6, max_size=6),
    hits=st.lists(st.integers(0, 9000), min_size=6, max_size=6),
    factors=st.lists(FACTORS, min_size=6, max_size=6),
    late=st.floats(0, 30),
)
def test_a_prompt_goes_where_its_first_token_is_expected_soonest(
    rates: list[float], legs: list[list[int]], hits: list[int], factors: list[float], late: float
) -> None:
    pool = learnt(rates)
    for engine, own, factor in zip(pool, legs, factors, strict=False):
        engine.factor = factor
        for tokens in own:
            engine.prefills(tokens, NOW)
    cached = {engine.url: hit for engine, hit in zip(pool, hits, strict=False) if hit}
    asked = ask(8000, cached=cached, now=NOW + late, ttft=1000.0)
    expected = [time_to_first_token(engine, asked) for engine in pool]
    assert expected[first_token(pool, asked)] == pytest.approx(min(expected))


def test_a_cached_prefix_is_worth_waiting_for_as_long_as_computing_it_takes() -> None:
    pool = learnt([10_000.0, 10_000.0])
    cached = {pool[0].url: 8000}
    pool[0].prefills(6000, NOW)
    assert first_token(pool, ask(9000, cached=cached, now=NOW)) == 0
    assert why_first(pool[0], ask(9000, cached=cached, now=NOW)) == "cached"
    pool[0].prefills(4000, NOW)
    assert first_token(pool, ask(9000, cached=cached, now=NOW)) == 1, "affinity is never above load"
    assert why_first(pool[1], ask(9000, cached=cached, now=NOW)) == "earliest"


def test_a_prefix_in_high_demand_spreads_over_engines() -> None:
    """Each request by itself would wait a little less than it takes to compute the prefix again."""
    pool = learnt([10_000.0] * 3)
    cached = {pool[0].url: 12_000}
    asked = ask(12_500, cached=cached, now=NOW, ttft=2.0)
    for _ in range(20):
        pool[0].prefills(400, NOW)
    assert time_to_first_token(pool[0], asked) < time_to_first_token(pool[1], asked)
    assert first_token(pool, asked) in (0,), "its queue is shorter than half the target"
    for _ in range(8):
        pool[0].prefills(400, NOW)
    pool[1].prefills(2_000, NOW)
    assert first_token(pool, asked) == 2
    pool[2].factor = 0.1
    pool[2].prefills(100, NOW)
    assert first_token(pool, ask(30_000, cached={pool[0].url: 29_500}, now=NOW, ttft=2.0)) == 0, "it costs too much"


def test_work_that_has_been_done_meanwhile_is_not_waited_for() -> None:
    pool = learnt([10_000.0, 10_000.0])
    pool[0].prefills(10_000, NOW)
    pool[1].prefills(5_000, NOW + 0.9)
    assert first_token(pool, ask(now=NOW + 0.9)) == 0


def test_a_slow_engine_gets_the_prompts_that_it_can_compute_in_time() -> None:
    pool = learnt([10_000.0, 5_000.0])
    taken = Counter[int]()
    for _ in range(30):
        index = first_token(pool, ask(1000, now=NOW))
        pool[index].prefills(1000, NOW)
        taken[index] += 1
    assert taken[0] in (19, 20, 21)


@pytest.mark.parametrize("hit", [-5, 0, 10**30])
def test_absurd_hits_are_bounded(hit: int) -> None:
    pool = learnt([10_000.0] * 2)
    asked = ask(cached={pool[1].url: hit, "http://nobody": 500}, now=NOW, random=lambda: 0.0)
    assert first_token(pool, asked) == (1 if hit > 0 else 0)
    assert asked.uncached(pool[1].url) == (1 if hit > 0 else 1000)


def test_an_engine_that_does_not_answer_gets_nothing() -> None:
    pool = learnt([10_000.0] * 2)
    pool[0].prefills(100, NOW)
    pool[1].prefills(1000, NOW)
    assert first_token(pool, ask(now=NOW)) == 0
    assert first_token(pool, ask(now=NOW + 20.0)) in (0, 1)
    pool[1].speeds.answered(1000, 1000, 1000, NOW + 0.1)
    assert first_token(pool, ask(now=NOW + 20.0)) == 1


# Long prompts


def test_long_prompts_queue_behind_each_other_and_short_ones_use_the_other_engines() -> None:
    pool = learnt([10_000.0] * 4)
    pool[2].prefills(100_000, NOW)
    document = ask(100_000, now=NOW)
    assert first_token(pool, document) == 2
    assert why_first(pool[2], document) == "long"
    assert first_token(pool, ask(1000, now=NOW)) != 2
    pool[2].prefills(100_000, NOW)
    assert first_token(pool, document) != 2, "it would take more than twice as long"


@pytest.mark.parametrize(("ttft", "together"), [(0.5, True), (3.0, False), (None, False)])
def test_a_prompt_is_long_when_its_own_work_exceeds_the_target(ttft: float | None, together: bool) -> None:
    pool = learnt([10_000.0] * 2)
    pool[1].prefills(10_000, NOW)
    assert first_token(pool, ask(20_000, now=NOW, ttft=ttft)) == (1 if together else 0)
    assert LONG == 4.0


def test_a_long_prompt_that_is_mostly_cached_is_not_long() -> None:
    pool = learnt([10_000.0] * 2)
    pool[1].prefills(50_000, NOW)
    assert first_token(pool, ask(100_000, cached={pool[0].url: 99_000}, now=NOW)) == 0


def test_with_idle_engines_a_long_prompt_goes_to_the_best() -> None:
    pool = learnt([5_000.0, 10_000.0])
    assert first_token(pool, ask(100_000, now=NOW)) == 1


def test_a_long_prompt_does_not_wait_for_an_engine_that_does_not_answer() -> None:
    pool = learnt([10_000.0] * 2)
    pool[1].prefills(1000, NOW)
    assert first_token(pool, ask(200_000, now=NOW + 8.0)) == 0


# Decode


def test_decode_goes_where_the_expected_step_is_shortest() -> None:
    pool = learnt(steps=[0.02, 0.01, 0.02])
    assert next_token(pool, ask()) == 1
    while expected_step(pool[1], ask()) < expected_step(pool[0], ask()):
        pool[1].decodes(10_000)
    assert next_token(pool, ask()) in (0, 2)
    assert pool[1].inflight_tokens > 20_000


def test_a_full_kv_cache_gets_nothing_while_another_has_room() -> None:
    pool = learnt(steps=[0.01, 0.02])
    pool[0].decodes(9_000)
    pool[0].speeds.capacity = 10_000.0
    assert next_token(pool, ask(200, 300)) == 0
    assert next_token(pool, ask(1000, 500)) == 1
    pool[1].speeds.capacity = 1_000.0
    assert next_token(pool, ask(1000, 500)) == 0, "of two that are too full the one that is less so"


def test_a_whole_answer_goes_where_prompt_and_output_are_done_first() -> None:
    slow_prefill, slow_decode = learnt([1_000.0, 10_000.0], [0.01, 0.03])
    pool = [slow_prefill, slow_decode]
    assert whole_answer(pool, ask(8000, 10)) == 1
    assert whole_answer(pool, ask(100, 1000)) == 0
    both = [time_to_last_token(engine, ask(100, 1000)) for engine in pool]
    assert both[0] < both[1]


# What a decision says


def test_the_costs_of_a_decision_are_the_compared_values() -> None:
    pool = learnt([10_000.0, 5_000.0], [0.01, 0.02])
    pool[0].prefills(5000, NOW)
    asked = ask(4000, cached={pool[1].url: 3000}, now=NOW)
    first, second = costs(pool, asked)
    assert (first.cached, first.uncached, second.cached, second.uncached) == (0, 4000, 3000, 1000)
    assert first.wait == pytest.approx(0.5, rel=0.05) and second.wait == 0.0
    assert first.own == pytest.approx(0.4, rel=0.05) and second.own == pytest.approx(0.2, rel=0.05)
    assert first.first_token == pytest.approx(first.wait + first.own)
    assert (first.rate, second.rate) == (pytest.approx(10_000, rel=0.05), pytest.approx(5_000, rel=0.05))
    assert first.tokens == 5000 and first.requests == 1
    assert second.slowness > first.slowness
    assert second.first_token < first.first_token and first_token(pool, asked) == 1


@pytest.mark.parametrize("role", sorted(CHOICES))
@pytest.mark.parametrize("policy", sorted(CHOICES["prefill"]))
def test_every_policy_chooses_the_only_engine(role: str, policy: str) -> None:
    [engine] = learnt([10_000.0], [0.01])
    engine.factor = 0.5
    assert CHOICES[role][policy]([engine], ask(random=lambda: 0.9, session=b"s", cached={engine.url: 5})) == 0


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=8), st.floats(0, 0.999))
def test_a_brief_prompt_goes_to_the_least_loaded_of_equal_engines(loads: list[int], chance: float) -> None:
    candidates = engines(len(loads))
    for candidate, tokens in zip(candidates, loads, strict=True):
        candidate.decodes(tokens)
    asked = ask(100, random=lambda: chance, brief=True)
    assert first_token(candidates, asked) == least_loaded(candidates, asked)


def test_a_brief_prompt_goes_where_the_load_is_soonest_done() -> None:
    slow, fast = candidates = learnt(rates=(2_000.0, 10_000.0))
    assert first_token(candidates, ask(100, brief=True)) == 1
    fast.decodes(2000)
    assert first_token(candidates, ask(100, brief=True)) == 0
    slow.decodes(2000)
    assert first_token(candidates, ask(100, brief=True)) == 1
