"""Which of a pool's backends a policy chooses."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pd_proxy.placement.ask import Ask
from pd_proxy.placement.policies import POLICIES, least_loaded, load, power_of_two

from tests.placement.support import Backend

LOADS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=8)
NUMBERS = st.floats(0, 1, exclude_max=True)


def pool(loads: list[tuple[int, int]]) -> list[Backend]:
    return [Backend(f"http://b{number}", tokens, requests) for number, (tokens, requests) in enumerate(loads)]


def drawn(*numbers: float) -> Callable[[], float]:
    """A source of exactly these numbers."""
    source: Iterator[float] = iter(numbers)
    return lambda: next(source)


@pytest.mark.parametrize("policy", sorted(POLICIES))
@given(loads=LOADS, first=NUMBERS, second=NUMBERS, turn=st.integers(0, 1000))
def test_every_policy_chooses_a_backend_of_the_pool(
    policy: str, loads: list[tuple[int, int]], first: float, second: float, turn: int
) -> None:
    assert 0 <= POLICIES[policy](pool(loads), Ask(drawn(first, second), turn)) < len(loads)


@given(loads=LOADS, number=NUMBERS, turn=st.integers(0, 1000))
def test_least_loaded_chooses_a_backend_with_the_least_load(
    loads: list[tuple[int, int]], number: float, turn: int
) -> None:
    assert loads[least_loaded(pool(loads), Ask(drawn(number), turn))] == min(loads)


def test_other_workers_load_counts_like_this_workers_own() -> None:
    own, elsewhere = Backend("http://a", 10, 1), Backend("http://b", 0, 0, elsewhere_tokens=11, elsewhere_requests=1)
    assert load(own) < load(elsewhere)
    assert least_loaded([elsewhere, own], Ask(lambda: 0.0)) == 1


def test_least_loaded_compares_tokens_before_requests() -> None:
    assert least_loaded(pool([(10, 1), (9, 8)]), Ask(drawn(0.0))) == 1
    assert least_loaded(pool([(9, 8), (9, 2)]), Ask(drawn(0.0))) == 1


@pytest.mark.parametrize("policy", ["least_loaded", "power_of_two"])
def test_a_backend_in_its_slow_start_gets_its_share_of_the_load(policy: str) -> None:
    def taken(first: tuple[int, int], second: tuple[int, int]) -> int:
        candidates = [Backend("http://slow", *first, factor=0.1), Backend("http://full", *second)]
        return POLICIES[policy](candidates, Ask(drawn(0.0, 0.0)))

    assert taken((0, 0), (0, 0)) == 1, "the idle one with its full load goes first"
    assert taken((0, 0), (500, 1)) == 0, "to have nothing is to have less"
    assert taken((100, 1), (900, 9)) == 1, "100 tokens at a tenth weigh as 1000"
    assert taken((100, 1), (1100, 11)) == 0


@pytest.mark.parametrize("policy", ["round_robin", "random"])
def test_policies_without_loads_skip_a_backend_as_often_as_its_slow_start_requires(policy: str) -> None:
    candidates = [Backend("http://slow", factor=0.25), Backend("http://full")]
    for draw in range(100):
        numbers = drawn(0.0, draw / 100) if policy == "random" else drawn(draw / 100)
        assert POLICIES[policy](candidates, Ask(numbers)) == (0 if draw < 25 else 1)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_backend_in_its_slow_start_that_is_alone_gets_everything(policy: str) -> None:
    assert POLICIES[policy]([Backend("http://slow", factor=0.1)], Ask(drawn(0.99, 0.99), 7)) == 0


@given(count=st.integers(1, 8))
def test_least_loaded_spreads_ties_evenly(count: int) -> None:
    backends = pool([(0, 0)] * count + [(1, 0)])
    taken = Counter(least_loaded(backends, Ask(drawn(step / 840))) for step in range(840))
    assert taken == dict.fromkeys(range(count), 840 // count)


@given(count=st.integers(1, 6), start=st.integers(0, 100))
def test_round_robin_chooses_each_in_turn(count: int, start: int) -> None:
    taken = [POLICIES["round_robin"](pool([(0, 0)] * count), Ask(drawn(), start + step)) for step in range(2 * count)]
    assert taken[:count] == taken[count:]
    assert sorted(taken[:count]) == list(range(count))


@given(count=st.integers(1, 8))
def test_random_chooses_all_equally_often_whatever_their_load(count: int) -> None:
    backends = pool([(number, number) for number in range(count)])
    taken = Counter(POLICIES["random"](backends, Ask(drawn(step / 840))) for step in range(840))
    assert taken == dict.fromkeys(range(count), 840 // count)


@given(loads=LOADS, first=NUMBERS, second=NUMBERS)
def test_power_of_two_never_chooses_the_worse_of_its_two(
    loads: list[tuple[int, int]], first: float, second: float
) -> None:
    backends = pool(loads)
    taken = power_of_two(backends, Ask(drawn(first, second)))
    if len(loads) > 1:
        one = int(first * len(loads))
        others = [index for index in range(len(loads)) if index != one]
        # Whichever the second was: the chosen one is one of the two, and no worse than the first.
        assert load(backends[taken]) <= load(backends[one])
        assert taken == one or taken in others


@given(count=st.integers(2, 6))
def test_power_of_two_draws_every_pair_equally_often_and_never_one_backend_twice(count: int) -> None:
    steps = [step / 60 for step in range(60)]
    pairs: Counter[frozenset[int]] = Counter()
    rising, falling = pool([(n, 0) for n in range(count)]), pool([(-n, 0) for n in range(count)])
    for first in steps:
        for second in steps:
            # The backend with the smaller index is always better and so is chosen; then the same the other way round.
            better = power_of_two(rising, Ask(drawn(first, second)))
            worse = power_of_two(falling, Ask(drawn(first, second)))
            pairs[frozenset((better, worse))] += 1
    assert all(len(pair) == 2 for pair in pairs)
    assert len(pairs) == count * (count - 1) // 2
    assert len(set(pairs.values())) == 1


# Sessions and prefixes

SESSIONS = [b"user-%d" % number for number in range(200)]


def taken_by(policy: str, backends: list[Backend], **asked: object) -> str:
    return backends[POLICIES[policy](backends, Ask(drawn(0.0, 0.0), **asked))].url  # type: ignore[arg-type]


def test_a_session_stays_at_its_backend() -> None:
    backends = pool([(0, 0)] * 5)
    for session in SESSIONS:
        home = taken_by("session", backends, session=session)
        assert taken_by("session", backends, session=session) == home
        assert taken_by("session", backends[::-1], session=session) == home, "whatever the order"


def test_sessions_spread_evenly() -> None:
    backends = pool([(0, 0)] * 4)
    homes = Counter(taken_by("session", backends, session=b"s%d" % n) for n in range(2000))
    assert len(homes) == 4
    assert max(homes.values()) < 1.3 * min(homes.values())


def test_a_backend_that_comes_or_goes_moves_its_own_sessions_only() -> None:
    backends = pool([(0, 0)] * 5)
    for session in SESSIONS:
        home = taken_by("session", backends, session=session)
        for gone in backends:
            left = [backend for backend in backends if backend is not gone]
            assert (taken_by("session", left, session=session) == home) or home == gone.url


@given(
    loads=st.lists(st.tuples(st.integers(0, 100), st.integers(0, 60)), min_size=1, max_size=8),
    session=st.binary(min_size=1, max_size=20),
    policy=st.sampled_from(["session", "prefix"]),
)
def test_affinity_never_goes_above_the_bound_on_load(loads: list[tuple[int, int]], session: bytes, policy: str) -> None:
    backends = pool(loads)
    cached = {backend.url: 500 + 10 * backend.inflight_requests for backend in backends}
    asked = Ask(drawn(0.0), session=session, cached=cached, prompt_tokens=5000)
    requests = backends[POLICIES[policy](backends, asked)].inflight_requests
    mean = (sum(each for _, each in loads) + 1) / len(loads)
    assert requests + 1 <= max(4, math.ceil(1.25 * mean))


def test_a_session_whose_backend_is_overloaded_goes_to_the_same_other_one() -> None:
    calm = pool([(0, 0)] * 5)
    home = taken_by("session", calm, session=b"x")
    busy = [Backend(b.url, 0, 40 if b.url == home else 5) for b in calm]
    second = taken_by("session", busy, session=b"x")
    assert second != home
    assert second == taken_by("session", [b for b in calm if b.url != home], session=b"x")


def test_sessions_are_not_all_sent_to_one_backend_while_all_are_in_their_slow_start() -> None:
    backends = [Backend(f"http://b{n}", 0, 3 - (n == 7), factor=0.95 - 0.02 * (n == 7)) for n in range(40)]
    assert taken_by("session", backends, session=b"x") == "http://b7"
    backends = [Backend(f"http://b{n}", 30 * n, 3, factor=0.95) for n in range(39, -1, -1)]
    assert taken_by("session", backends, session=b"x") == "http://b0"


def test_requests_without_a_session_go_to_the_least_loaded() -> None:
    assert POLICIES["session"](pool([(5, 1), (3, 9), (4, 0)]), Ask(drawn(0.0))) == 1


def test_prefix_chooses_the_longest_match_and_among_equals_the_least_loaded() -> None:
    backends = pool([(0, 0), (50, 3), (40, 3), (10, 1)])
    cached = {backends[1].url: 900, backends[2].url: 900, backends[3].url: 800}
    assert taken_by("prefix", backends, cached=cached, prompt_tokens=1000) == backends[2].url
    assert taken_by("prefix", backends, cached=cached, prompt_tokens=850) == backends[2].url, "no more than the prompt"
    assert taken_by("prefix", backends, cached={"http://nobody": 900}, prompt_tokens=1000) == backends[0].url
    assert taken_by("prefix", backends, prompt_tokens=1000) == backends[0].url
