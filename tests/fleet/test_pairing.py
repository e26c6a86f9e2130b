"""Which prefill backend may hand over to which decode backend."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from pd_proxy.fleet.backend import Backend
from pd_proxy.fleet.fleet import Fleet
from pd_proxy.fleet.pairing import same_weights
from pd_proxy.fleet.readiness import not_ready
from pd_proxy.settings.tree import build_settings


def card(model: str, root: Any = None, parent: Any = None) -> dict[str, Any]:
    return {"id": model, "root": root, "parent": parent}


def cards(*listed: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {one["id"]: one for one in listed}


BASE = card("m", "/models/m")


def fleet(**settings: Any) -> tuple[Fleet, Backend, Backend]:
    """One pair, up."""
    made = Fleet(build_settings({"prefill": ["p:1"], "decode": ["d:1"], **settings}, {}))
    for backend in made:
        backend.mark_up()
    return made, made.pool("prefill")[0], made.pool("decode")[0]


def test_what_is_not_known_is_not_held_against_a_pair() -> None:
    made, prefill, decode = fleet()
    assert made.pairing.uniform
    assert made.pairing.pairs(prefill, decode, "m")
    made.set_models(prefill, cards(BASE), "1.0")
    assert made.pairing.uniform
    assert made.pairing.pairs(prefill, decode, "m")
    made.set_models(decode, cards(card("m", None)), "")
    assert made.pairing.uniform
    assert made.pairing.pairs(prefill, decode, "m")


def test_engines_of_two_versions_are_no_pair() -> None:
    made, prefill, decode = fleet()
    made.set_models(prefill, cards(BASE), "1.0")
    made.set_models(decode, cards(BASE), "1.1")
    assert not made.pairing.uniform
    assert made.pairing.why_not(prefill, decode, "m") == "version"
    assert "versions" in not_ready(made)
    made.set_models(prefill, cards(BASE), "1.1")
    assert made.pairing.uniform
    assert not_ready(made) == ""


def test_a_model_loaded_from_two_places_is_no_pair_and_another_beside_it_is() -> None:
    made, prefill, decode = fleet()
    other = card("other", "/models/other")
    made.set_models(prefill, cards(BASE, other), "1.0")
    made.set_models(decode, cards(card("m", "/models/m-2"), other), "1.0")
    assert not made.pairing.uniform
    assert made.pairing.why_not(prefill, decode, "m") == "root"
    assert made.pairing.pairs(prefill, decode, "other")
    assert not_ready(made) == "", "one of its models can be served"


@pytest.mark.parametrize(
    ("theirs", "same"),
    [
        (cards(BASE, card("lora", "/a/1", "m")), True),
        (cards(BASE, card("lora", "/a/2", "m")), False),
        (cards(card("m", "/models/m-2"), card("lora", "/a/1", "m")), False),
        (cards(BASE, card("lora", None, "m")), True),
        (cards(BASE, card("lora", 7, [])), True),
        (cards(BASE), True),
        (None, True),
    ],
    ids=["same", "another adapter", "another model below", "unknown root", "garbage", "not listed", "not known"],
)
def test_of_an_adapter_its_own_root_counts_and_that_of_the_model_below(theirs: Any, same: bool) -> None:
    assert same_weights(cards(BASE, card("lora", "/a/1", "m")), theirs, "lora") is same


def test_a_request_that_names_no_model_means_the_one_that_is_no_adapter() -> None:
    ours = cards(card("lora", "/a/1", "m"), BASE)
    assert same_weights(ours, cards(card("renamed", "/models/m")), None)
    assert not same_weights(ours, cards(card("m", "/models/m-2")), None)


def test_the_setting_pairs_all_revisions_but_never_groups() -> None:
    made, prefill, decode = fleet(pair_revisions="any", groups=[{"name": "g", "decode": ["e:1"]}])
    elsewhere = made.pool("decode")[1]
    made.set_models(prefill, cards(BASE), "1.0")
    made.set_models(decode, cards(card("m", "/models/m-2")), "1.1")
    assert made.pairing.pairs(prefill, decode, "m")
    assert made.pairing.why_not(prefill, elsewhere, "m") == "group"


def test_the_flag_follows_who_comes_and_goes() -> None:
    made, prefill, decode = fleet()
    for backend in (prefill, decode):
        made.set_models(backend, cards(BASE), "1.0")
    new = made.add("http://d:2", "decode")
    assert made.pairing.uniform, "nothing is known of it"
    made.set_models(new, cards(BASE), "1.1")
    assert not made.pairing.uniform
    made.remove("http://d:2", "decode")
    assert made.pairing.uniform


def test_mixed_backends_of_another_revision_make_no_difference_to_pairs() -> None:
    made, prefill, decode = fleet(mixed=["x:1"])
    for backend in (prefill, decode):
        made.set_models(backend, cards(BASE), "1.0")
    made.set_models(made.pool("mixed")[0], cards(BASE), "1.1")
    assert made.pairing.uniform


def test_several_revisions_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    made, prefill, decode = fleet()
    with caplog.at_level(logging.WARNING, "pd_proxy.fleet"):
        made.set_models(prefill, cards(BASE), "1.0")
        made.set_models(decode, cards(card("m", "/models/m-2")), "1.1")
        made.set_models(decode, cards(card("m", "/models/m-2"), card("lora", "/a", "m")), "1.1")
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "engines of versions 1.0, 1.1",
        "model m has more than one root",
    ]


def test_a_request_has_to_name_its_model_where_backends_have_several() -> None:
    made, prefill, decode = fleet(mixed=["x:1"])
    mixed = made.pool("mixed")[0]
    made.set_models(prefill, cards(BASE, card("lora", "/a", "m")), "")
    made.set_models(decode, cards(BASE), "")
    assert not made.pairing.several_models, "an adapter is no model of its own"
    made.set_models(mixed, cards(card("m", "/models/m-2")), "")
    assert not made.pairing.several_models, "another revision is the same model by name"
    made.set_models(mixed, cards(card("second", "/models/m")), "")
    assert not made.pairing.several_models, "another name is the same model by root"
    made.set_models(mixed, cards(card("second", "/models/second")), "")
    assert made.pairing.several_models


def test_a_group_is_not_ready_where_its_backends_have_no_model_in_common() -> None:
    made, prefill, decode = fleet()
    made.set_models(prefill, cards(BASE), "")
    made.set_models(decode, cards(card("n", "/models/n")), "")
    assert (
        not_ready(made) == "its prefill and decode backends have no model in common (prefill serves m; decode serves n)"
    )
