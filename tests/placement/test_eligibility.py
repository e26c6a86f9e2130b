"""Which backends may get a request, and which rule excludes the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pd_proxy.placement.eligibility import Eligible, Members, Needs, Rule, Rules, eligible, left_out

from tests.placement.support import Engine

CHAT, BATCH = "/v1/chat/completions", "/v1/batch"


@dataclass(frozen=True)
class Kind:
    routes: frozenset[str] = frozenset({CHAT})


@dataclass(eq=False)
class Member(Engine):
    """A backend as these rules see it."""

    up: bool = True
    draining: bool = False
    resting_until: float = 0.0
    connector: str = "nixl"
    ranks: Sequence[int] = ()
    kind: Kind = field(default_factory=Kind)
    models: frozenset[str] = frozenset({"m"})
    room: bool = True

    def serves(self, model: str | None) -> bool:
        return model is None or model in self.models

    def offers(self, route: str) -> bool:
        return route in self.kind.routes

    def has_capacity(self, tokens: int) -> bool:
        return self.room


PLAIN = Rules(
    splits={"nixl": frozenset()},
    endpoints={"nixl": frozenset({"chat"})},
    plain=frozenset({"nixl"}),
    negotiates=frozenset(),
    all_plain=True,
    splits_somewhere=frozenset(),
    splits_everywhere=frozenset(),
    endpoints_everywhere=frozenset({"chat"}),
)
BOTH = Rules(
    splits={"nixl": frozenset(), "rendezvous": frozenset({"n"}), "": frozenset()},
    endpoints={"nixl": frozenset({"chat"}), "rendezvous": frozenset({"chat", "batch"}), "": frozenset()},
    plain=frozenset({"nixl", ""}),
    negotiates=frozenset({"rendezvous"}),
    all_plain=False,
    splits_somewhere=frozenset({"n"}),
    splits_everywhere=frozenset(),
    endpoints_everywhere=frozenset({"chat"}),
)
"""Of two connectors, one of which needs a hand-off."""


def needs(**more: Any) -> Needs[Member]:
    return Needs(**{"model": "m", "prefill_tokens": 10, "decode_tokens": 20, "endpoint": "chat", "path": CHAT, **more})


class Fleet:
    """Members of each pool."""

    def __init__(self, prefill: int = 2, decode: int = 2, mixed: int = 0) -> None:
        self.pools = {
            role: [Member(f"http://{role}{n}") for n in range(count)]
            for role, count in (("prefill", prefill), ("decode", decode), ("mixed", mixed))
        }
        self.out: set[str] = set()
        self.bounded = False
        self.pairs: Any = None

    def __getitem__(self, name: str) -> Member:
        return next(one for pool in self.pools.values() for one in pool if one.url == f"http://{name}")

    def members(self, model: str | None = "m") -> Members[Member]:
        """The members that are up, fit, and have the model."""
        fit = {
            role: [b for b in pool if b.up and not b.draining and b.serves(model) and b.url not in self.out]
            for role, pool in self.pools.items()
        }
        sizes = {role: len(pool) for role, pool in self.pools.items()}
        return Members(**fit, configured=sizes, pairs=self.pairs, bounded=self.bounded)

    def found(self, rules: Rules = PLAIN, **more: Any) -> Eligible[Member]:
        asked = needs(**more)
        return eligible(self.members(asked.model), asked, rules)

    def rest(self, rules: Rules = PLAIN, avoid: frozenset[str] = frozenset(), **more: Any) -> dict[str, str]:
        asked = needs(**more)
        found = left_out(self.pools, self.members(asked.model), asked, rules, avoid=avoid, now=100.0)
        assert len({id(member) for member, _ in found}) == len(found), "one rule each"
        assert {rule for _, rule in found} <= set(get_args(Rule))
        return {member.url.removeprefix("http://"): rule for member, rule in found}


def urls(pool: Sequence[Member] | None) -> list[str]:
    return [] if pool is None else [member.url.removeprefix("http://") for member in pool]


def test_an_ordinary_request_may_go_to_every_backend_that_is_up_without_a_check_of_each() -> None:
    fleet = Fleet(2, 2, 1)
    members = fleet.members()
    view = eligible(members, needs(), PLAIN).view
    assert view.prefill is members.prefill and view.decode is members.decode and view.mixed is members.mixed
    assert view.plain is None and view.pairs is None
    assert fleet.rest() == {}


def test_each_state_has_its_own_rule() -> None:
    fleet = Fleet(5, 1)
    fleet["prefill0"].draining = True
    fleet["prefill1"].up = False
    fleet["prefill2"].models = frozenset({"other"})
    fleet["prefill3"].resting_until = 101.0
    fleet.out = {"http://prefill3", "http://prefill4"}
    assert fleet.rest() == {
        "prefill0": "draining",
        "prefill1": "down",
        "prefill2": "model",
        "prefill3": "resting",
        "prefill4": "ejected",
    }


def test_a_full_backend_gets_nothing_while_another_has_room() -> None:
    fleet = Fleet()
    fleet.bounded = True
    fleet["decode0"].room = False
    assert urls(fleet.found().view.decode) == ["decode1"]
    assert fleet.rest() == {"decode0": "full"}
    fleet["decode1"].room = False
    assert urls(fleet.found().view.decode) == ["decode0", "decode1"]
    assert fleet.rest() == {}


def test_a_full_pair_is_better_than_none() -> None:
    fleet = Fleet()
    fleet.bounded = True
    fleet.pairs = lambda p, d: p.url[-1] == d.url[-1]
    fleet["decode0"].room = False
    assert urls(fleet.found().view.decode) == ["decode1"]
    fleet["prefill1"].room = False
    assert urls(fleet.found().view.decode) == ["decode0", "decode1"], "those with room are no pair"
    assert urls(fleet.found().view.prefill) == ["prefill0", "prefill1"]


def test_a_backend_without_a_matching_peer_is_excluded_by_the_rule_pairing() -> None:
    fleet = Fleet(3, 2)
    fleet.pairs = lambda p, d: p.url[-1] == d.url[-1] == "0"
    assert fleet.rest() == {"prefill1": "pairing", "prefill2": "pairing", "decode1": "pairing"}
    assert fleet.rest(unsplittable="n")["prefill0"] == "unsplit"
    assert "decode1" not in fleet.rest(unsplittable="n"), "it needs no pair then"


def test_only_engines_with_the_same_weights_go_on_with_an_answer() -> None:
    fleet = Fleet(1, 2, 1)
    same = fleet["decode1"]
    assert urls(fleet.found(fits=lambda b: b is same).view.decode) == ["decode1"]
    assert fleet.rest(fits=lambda b: b is same) == {"prefill0": "weights", "decode0": "weights", "mixed0": "weights"}


def test_a_request_that_continues_state_of_one_backend_goes_to_that_backend() -> None:
    fleet = Fleet(1, 2, 1)
    found = fleet.found(pinned="http://decode1")
    assert (urls(found.view.prefill), urls(found.view.decode), urls(found.view.mixed)) == ([], ["decode1"], [])
    assert fleet.rest(pinned="http://decode1") == {"prefill0": "pinned", "decode0": "pinned", "mixed0": "pinned"}


def test_a_request_that_cannot_be_split_is_not_prefilled() -> None:
    fleet = Fleet(1, 1, 1)
    assert fleet.found(unsplittable="n").unsplittable == "n"
    assert fleet.rest(unsplittable="n") == {"prefill0": "unsplit"}


def test_a_request_that_only_some_connectors_can_split_goes_to_their_engines() -> None:
    fleet = Fleet(2, 1)
    fleet["prefill1"].connector = "rendezvous"
    found = fleet.found(BOTH, unsplittable="n")
    assert (urls(found.view.prefill), found.unsplittable) == (["prefill1"], "")
    assert fleet.rest(BOTH, unsplittable="n") == {"prefill0": "connector"}
    fleet["prefill1"].connector = "nixl"
    assert fleet.found(BOTH, unsplittable="n").unsplittable == "n"


def test_decode_backends_that_answer_without_a_hand_off_are_recognised() -> None:
    fleet = Fleet(1, 2)
    fleet["decode0"].connector = "rendezvous"
    assert urls(fleet.found(BOTH).view.plain) == ["decode1"]


def test_a_request_goes_only_to_backends_that_have_its_endpoint() -> None:
    fleet = Fleet(2, 2, 1)
    fleet["decode1"].kind = Kind(frozenset({CHAT, BATCH}))
    found = fleet.found(BOTH, endpoint="batch", path=BATCH)
    assert (urls(found.view.decode), found.unsplittable) == (["decode1"], "endpoint")
    assert urls(found.view.mixed) == ["mixed0"], "nobody has it, so engines are to say so"
    assert fleet.rest(BOTH, endpoint="batch", path=BATCH) == {
        "prefill0": "unsplit",
        "prefill1": "unsplit",
        "decode0": "endpoint",
    }


def test_an_endpoint_of_one_engine_family_goes_to_no_other() -> None:
    fleet = Fleet(2, 2, 1)
    asked = {"endpoint": "batch", "path": BATCH, "of_one_family": True}
    fleet["prefill1"].connector = fleet["decode1"].connector = "rendezvous"
    found = fleet.found(BOTH, **asked)
    assert (urls(found.view.prefill), urls(found.view.decode), urls(found.view.mixed)) == (
        ["prefill1"],
        ["decode1"],
        [],
    )
    assert (found.unsplittable, urls(found.view.plain)) == ("", [])
    assert fleet.rest(BOTH, **asked) == {"prefill0": "connector", "decode0": "endpoint", "mixed0": "endpoint"}


def test_a_request_whose_legs_cannot_name_a_rank_is_not_split_where_legs_must_be_paired() -> None:
    fleet = Fleet(1, 1)
    fleet["prefill0"].ranks = [0, 0]
    assert fleet.found(BOTH, ranked=False).unsplittable == ""
    fleet["prefill0"].connector = "rendezvous"
    assert fleet.found(BOTH, ranked=False).unsplittable == "data_parallel"
    assert fleet.found(BOTH).unsplittable == ""


def test_after_failed_hand_offs_a_request_goes_without_one_only_where_a_backend_answers_without() -> None:
    fleet = Fleet(1, 1)
    assert fleet.found(given_up="handoff_failed").unsplittable == "handoff_failed"
    fleet["decode0"].connector = "rendezvous"
    assert fleet.found(BOTH, given_up="handoff_failed").unsplittable == ""
    with_mixed = Fleet(1, 1, 1)
    with_mixed["decode0"].connector = "rendezvous"
    assert with_mixed.found(BOTH, given_up="handoff_failed").unsplittable == "handoff_failed"


def test_backends_that_failed_the_request_are_avoided_while_there_are_others() -> None:
    fleet = Fleet(2, 2)
    assert fleet.rest(avoid=frozenset({"http://decode0"})) == {"decode0": "avoided"}
    assert fleet.rest(avoid=frozenset({"http://decode0", "http://decode1"})) == {}


@given(
    states=st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                "up": st.booleans(),
                "draining": st.booleans(),
                "connector": st.sampled_from(["nixl", "rendezvous", ""]),
                "room": st.booleans(),
                "models": st.sampled_from([frozenset({"m"}), frozenset({"n"})]),
                "kind": st.sampled_from([Kind(), Kind(frozenset({CHAT, BATCH})), Kind(frozenset())]),
                "resting_until": st.sampled_from([0.0, 200.0]),
            },
        ),
        min_size=6,
        max_size=6,
    ),
    out=st.sets(st.sampled_from(["http://prefill0", "http://decode0", "http://mixed1"])),
    asked=st.fixed_dictionaries(
        {},
        optional={
            "unsplittable": st.sampled_from(["", "n", "echo"]),
            "pinned": st.sampled_from(["", "http://decode0", "http://mixed0"]),
            "model": st.sampled_from([None, "m"]),
            "given_up": st.sampled_from(["", "prefill_failed"]),
        },
    ),
    endpoint=st.sampled_from(
        [{}, {"endpoint": "batch", "path": BATCH}, {"endpoint": "batch", "path": BATCH, "of_one_family": True}]
    ),
    bounded=st.booleans(),
    paired=st.booleans(),
)
def test_every_backend_is_eligible_or_excluded_by_one_rule(
    states: list[dict[str, Any]],
    out: set[str],
    asked: dict[str, Any],
    endpoint: dict[str, Any],
    bounded: bool,
    paired: bool,
) -> None:
    fleet = Fleet(2, 2, 2)
    for role, pool in fleet.pools.items():
        at = ("prefill", "decode", "mixed").index(role) * 2
        fleet.pools[role] = [replace(member, **states[at + n]) for n, member in enumerate(pool)]
    fleet.out, fleet.bounded = out, bounded
    if paired:
        fleet.pairs = lambda p, d: p.connector == d.connector != ""
    found, rest = fleet.found(BOTH, **asked, **endpoint), fleet.rest(BOTH, **asked, **endpoint)
    for role, pool in fleet.pools.items():
        eligibles = set(
            urls({"prefill": found.view.prefill, "decode": found.view.decode, "mixed": found.view.mixed}[role])
        )
        for member in pool:
            name = member.url.removeprefix("http://")
            if name in eligibles:
                assert rest.get(name) in (None, "unsplit", "pairing")
            else:
                assert rest[name] not in ("unsplit", "pairing", "avoided")


@pytest.mark.parametrize("model", [None, "m"])
def test_empty_pools_have_no_eligible_members(model: str | None) -> None:
    fleet = Fleet(0, 0, 0)
    assert fleet.rest(model=model) == {}
    assert fleet.found(BOTH, model=model).view.plain == []
