"""Where a request goes, and the reason in the decision."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pd_proxy.errors import InvalidRequest, NoBackend
from pd_proxy.placement.ask import Ask
from pd_proxy.placement.decide import Decision, View, choose, decide

from tests.placement.support import Backend


def view(prefill: int = 0, decode: int = 0, mixed: int = 0, /, **configured: int) -> View[Backend]:
    """Pools with this many backends up; as many are configured, unless given otherwise."""
    counts = {"prefill": prefill, "decode": decode, "mixed": mixed}
    pools = {role: [Backend(f"http://{role}{n}") for n in range(count)] for role, count in counts.items()}
    return View(**pools, configured={**counts, **configured})


def decided(fleet: View[Backend], **options: Any) -> Decision[Backend]:
    arguments: dict[str, Any] = {
        "unsplittable": "",
        "policies": dict.fromkeys(("prefill", "decode", "mixed"), "least_loaded"),
        "allow_local_prefill": True,
        "prefill_answers": False,
    }
    asked = {name: value for name, value in options.items() if name not in arguments}
    ask = Ask(**{"random": lambda: 0.0, **asked})
    return decide(fleet, ask, **{**arguments, **{name: options[name] for name in options.keys() - asked}})


def summary(decision: Decision[Backend]) -> tuple[str, str, str | None, str]:
    prefill = decision.prefill.url if decision.prefill else None
    return decision.decode.url, decision.pool, prefill, decision.fallback


PAIR = ("http://decode0", "decode", "http://prefill0", "")


@pytest.mark.parametrize("local", [True, False])
def test_a_request_goes_to_a_pair(local: bool) -> None:
    assert summary(decided(view(1, 1), allow_local_prefill=local)) == PAIR


def test_a_pair_is_preferred_to_a_mixed_backend() -> None:
    assert summary(decided(view(1, 1, 1))) == PAIR


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("unsplittable", ["", "n"])
def test_mixed_backends_without_pools_serve_everything_without_a_fallback(local: bool, unsplittable: str) -> None:
    decision = decided(view(0, 0, 1), unsplittable=unsplittable, allow_local_prefill=local)
    assert summary(decision) == ("http://mixed0", "mixed", None, "")


@pytest.mark.parametrize("local", [True, False])
def test_a_request_that_cannot_be_split_goes_to_a_mixed_backend_first(local: bool) -> None:
    decision = decided(view(1, 1, 1), unsplittable="prompt_list", allow_local_prefill=local)
    assert summary(decision) == ("http://mixed0", "mixed", None, "prompt_list")


def test_a_request_that_cannot_be_split_goes_to_decode_whole() -> None:
    assert summary(decided(view(1, 1), unsplittable="echo")) == ("http://decode0", "decode", None, "echo")


def test_a_request_that_cannot_be_split_is_refused_where_decode_may_not_prefill() -> None:
    with pytest.raises(InvalidRequest, match=r"`n` cannot be split.*fallback: reject") as caught:
        decided(view(1, 1), unsplittable="n", allow_local_prefill=False)
    assert caught.value.param == "n"


def test_without_a_prefill_backend_decode_computes_the_prompt() -> None:
    decision = decided(view(0, 1, prefill=2))
    assert summary(decision) == ("http://decode0", "decode", None, "no_prefill_backend")


def test_without_a_prefill_backend_a_mixed_one_is_better_than_decode() -> None:
    decision = decided(view(0, 1, 1, prefill=1))
    assert summary(decision) == ("http://mixed0", "mixed", None, "no_prefill_backend")


def test_without_a_decode_backend_the_reason_names_decode() -> None:
    decision = decided(view(1, 0, 1, decode=1))
    assert decision.decode.url == "http://mixed0"
    assert decision.fallback == "no_decode_backend"


def test_without_a_prefill_backend_nothing_is_served_where_decode_may_not_prefill() -> None:
    with pytest.raises(NoBackend, match=r"no prefill backend is up.*fallback: reject") as caught:
        decided(view(0, 1, prefill=1), allow_local_prefill=False)
    assert caught.value.retry_after == 1


@pytest.mark.parametrize(
    ("fleet", "says"),
    [
        (view(1, 0, decode=2), "configured: 1 prefill, 2 decode"),
        (view(0, 0, prefill=1, decode=1, mixed=1), "configured: 1 prefill, 1 decode, 1 mixed"),
        (view(0, 0, mixed=3), "configured: 3 mixed"),
        (view(), "configured: none"),
        (view(2), "configured: 2 prefill"),
    ],
)
@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("unsplittable", ["", "n"])
def test_when_nothing_that_could_answer_is_up_the_error_counts_the_pools_and_names_no_address(
    fleet: View[Backend], says: str, local: bool, unsplittable: str
) -> None:
    with pytest.raises(NoBackend) as caught:
        decided(fleet, allow_local_prefill=local, unsplittable=unsplittable)
    assert says in str(caught.value)
    assert "http" not in str(caught.value)
    assert caught.value.retry_after == 1


def test_each_pool_has_its_own_policy() -> None:
    policies = {"prefill": "round_robin", "decode": "least_loaded", "mixed": "random"}
    turns = [decided(view(3, 3), policies=policies, turn=turn) for turn in range(3)]
    assert {summary(decision)[2] for decision in turns} == {"http://prefill0", "http://prefill1", "http://prefill2"}
    assert {summary(decision)[0] for decision in turns} == {"http://decode0"}


def test_a_backend_that_failed_the_request_is_avoided() -> None:
    decision = decided(view(2, 2), avoid={"http://prefill0", "http://decode0"})
    assert summary(decision)[:3] == ("http://decode1", "decode", "http://prefill1")


def test_a_backend_that_failed_the_request_is_used_when_no_other_is_up() -> None:
    assert summary(decided(view(1, 1), avoid={"http://prefill0", "http://decode0"})) == PAIR


@given(
    loads=st.lists(st.integers(0, 3), min_size=1, max_size=6),
    avoided=st.sets(st.integers(0, 5)),
    policy=st.sampled_from(["least_loaded", "round_robin", "random", "power_of_two"]),
    number=st.floats(0, 1, exclude_max=True),
    turn=st.integers(0, 100),
)
def test_an_avoided_backend_is_chosen_only_when_all_are(
    loads: list[int], avoided: set[int], policy: str, number: float, turn: int
) -> None:
    backends = [Backend(f"http://b{index}", tokens) for index, tokens in enumerate(loads)]
    avoid = {f"http://b{index}" for index in avoided}
    chosen = choose(backends, "decode", policy, Ask(lambda: number, turn, avoid=avoid))
    assert chosen in backends
    assert chosen.url not in avoid or avoid >= {backend.url for backend in backends}


@given(
    counts=st.tuples(*[st.integers(0, 2)] * 3),
    down=st.tuples(*[st.integers(0, 2)] * 3),
    unsplittable=st.sampled_from(["", "n"]),
    local=st.booleans(),
)
def test_a_decision_is_a_pair_or_says_why_not(
    counts: tuple[int, int, int], down: tuple[int, int, int], unsplittable: str, local: bool
) -> None:
    configured = {role: up + off for role, up, off in zip(("prefill", "decode", "mixed"), counts, down, strict=True)}
    fleet = view(*counts)
    fleet = View(fleet.prefill, fleet.decode, fleet.mixed, configured)
    try:
        decision = decided(fleet, unsplittable=unsplittable, allow_local_prefill=local)
    except NoBackend:
        assert not counts[2]
        assert not counts[1] or not local
        return
    except InvalidRequest:
        assert unsplittable
        assert not local
        return
    only_mixed = not configured["prefill"] and not configured["decode"]
    assert (decision.prefill is not None) == (decision.fallback == "" and not only_mixed)
    assert decision.pool in ("decode", "mixed")
    assert decision.decode in (fleet.decode if decision.pool == "decode" else fleet.mixed)


# Decode backends that need a hand-off


def needing(prefill: int, decode: int, mixed: int, plain: int) -> View[Backend]:
    """A fleet in which only the last `plain` decode backends answer without a hand-off."""
    pools = view(prefill, decode, mixed)
    return View(pools.prefill, pools.decode, pools.mixed, pools.configured, plain=pools.decode[decode - plain :])


def test_a_decode_backend_that_needs_a_hand_off_serves_pairs() -> None:
    assert summary(decided(needing(1, 1, 0, 0))) == PAIR


def test_of_the_decode_backends_only_those_that_need_no_hand_off_serve_whole_requests() -> None:
    decision = decided(needing(1, 3, 0, 1), unsplittable="n")
    assert summary(decision) == ("http://decode2", "decode", None, "n")


def test_an_unsplittable_request_is_refused_where_every_decode_backend_needs_a_hand_off() -> None:
    with pytest.raises(InvalidRequest, match=r"`n` cannot be split.*their connector") as caught:
        decided(needing(1, 2, 0, 0), unsplittable="n")
    assert caught.value.param == "n"
    assert summary(decided(needing(1, 2, 1, 0), unsplittable="n")) == ("http://mixed0", "mixed", None, "n")


def test_without_prefill_nothing_is_served_where_every_decode_backend_needs_a_hand_off() -> None:
    with pytest.raises(NoBackend, match=r"no prefill backend is up.*their connector"):
        decided(needing(0, 2, 0, 0))
