"""Who is in the pools, who may be given a request, and what failed requests say about that."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from proxy.errors import (
    BackendBusy,
    BackendCut,
    BackendError,
    BackendFailed,
    BackendTimedOut,
    BackendUnreachable,
)
from proxy.fleet.backend import Backend, Lease, Role
from proxy.fleet.fleet import Fleet
from proxy.settings import Settings


def fleet(up: bool = True, **pools: Any) -> Fleet:
    """Pools of so many backends each: `http://decode0` and so on."""
    settings = {
        role: [f"http://{role}{number}" for number in range(pools.pop(role, 0))]
        for role in ("prefill", "decode", "mixed")
    }
    made = Fleet(Settings(**settings, **pools))
    for backend in made:
        if up:
            made.bring_in(backend)
    return made


def at(made: Fleet, url: str) -> Backend:
    return next(backend for backend in made if backend.url == url)


def urls(backends: Any) -> list[str]:
    return [backend.url for backend in backends]


def test_the_pools_are_those_of_the_settings_and_all_begin_down() -> None:
    made = fleet(up=False, prefill=2, decode=1, mixed=1)
    assert urls(made) == ["http://prefill0", "http://prefill1", "http://decode0", "http://mixed0"]
    assert {backend.role for backend in made} == {"prefill", "decode", "mixed"}
    assert not any(backend.up for backend in made)
    assert made.candidates("decode", None) == []


def test_candidates_are_up_here_to_stay_and_serve_the_model() -> None:
    made = fleet(decode=5)
    made.take_out(at(made, "http://decode0"), "gone")
    at(made, "http://decode1").removed = True
    at(made, "http://decode2").models = {"other": {}}
    at(made, "http://decode3").models = {"m": {}}
    assert urls(made.candidates("decode", "m")) == ["http://decode3", "http://decode4"]
    assert urls(made.candidates("decode", None)) == ["http://decode2", "http://decode3", "http://decode4"]


# What real requests tell


def other() -> BackendError:
    return BackendCut("cut")


def test_a_backend_that_cannot_be_reached_leaves_at_once() -> None:
    made = fleet(decode=1)
    backend = at(made, "http://decode0")
    made.failed(backend, BackendUnreachable("refused"))
    assert not backend.up
    assert backend.reason == "failed a request: refused"
    assert backend.attention.is_set()
    assert backend.ejections == 0


@pytest.mark.parametrize("error", [BackendCut("x"), BackendTimedOut("x"), BackendFailed("x", status=500)])
def test_a_backend_leaves_after_as_many_failures_in_a_row_as_are_set(error: BackendError) -> None:
    made = fleet(decode=2, health={"failures": 3})
    backend = at(made, "http://decode0")
    for _ in range(2):
        made.failed(backend, error)
        assert backend.up
        assert backend.attention.is_set()
    made.failed(backend, error)
    assert not backend.up
    assert backend.ejections == 1


def test_a_good_request_between_failures_starts_the_count_anew() -> None:
    made = fleet(decode=2, health={"failures": 2})
    backend = at(made, "http://decode0")
    for _ in range(5):
        made.failed(backend, other())
        made.succeeded(backend)
    assert backend.up
    assert backend.failures == 0


def test_the_last_backend_of_a_pool_stays_though_it_fails() -> None:
    made = fleet(decode=3, health={"failures": 1})
    made.take_out(at(made, "http://decode1"), "gone")
    at(made, "http://decode2").removed = True
    backend = at(made, "http://decode0")
    for _ in range(5):
        made.failed(backend, other())
    assert backend.up
    assert backend.attention.is_set()  # its health is asked at once all the same


def test_a_backend_of_another_role_is_no_replacement() -> None:
    made = fleet(decode=1, mixed=1, prefill=1, health={"failures": 1})
    made.failed(at(made, "http://decode0"), other())
    assert at(made, "http://decode0").up


def test_a_failure_that_blames_nobody_is_no_failure() -> None:
    made = fleet(decode=2, health={"failures": 1})
    backend = at(made, "http://decode0")
    made.failed(backend, BackendCut("kept alive", blame=False))
    assert (backend.up, backend.failures, backend.attention.is_set()) == (True, 0, False)


def test_a_failure_of_a_backend_that_is_down_already_changes_nothing() -> None:
    made = fleet(decode=2)
    backend = at(made, "http://decode0")
    made.take_out(backend, "first reason")
    made.failed(backend, BackendUnreachable("second reason"))
    assert (backend.reason, backend.failures, backend.ejections) == ("first reason", 0, 0)


def test_a_good_request_forgets_ejections_and_coming_up_does_not() -> None:
    made = fleet(decode=2, health={"failures": 1})
    backend = at(made, "http://decode0")
    for number in (1, 2):
        made.failed(backend, other())
        assert backend.ejections == number
        made.bring_in(backend)
    made.succeeded(backend)
    assert backend.ejections == 0


def test_taking_a_backend_out_tells_its_waiting_legs() -> None:
    made = fleet(decode=1)
    told: list[BackendError] = []
    with Lease(at(made, "http://decode0"), 1) as lease:
        lease.on_lost = told.append
        made.take_out(at(made, "http://decode0"), "gone")
    assert [str(error) for error in told] == ["http://decode0 gone"]


def test_leaving_and_coming_back_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pd_proxy.fleet")
    made = fleet(decode=1)
    backend = at(made, "http://decode0")
    for _ in range(2):
        made.take_out(backend, "gone")
    for _ in range(2):
        made.bring_in(backend)
    assert [record.getMessage() for record in caplog.records] == [
        "decode backend http://decode0 is up",
        "decode backend http://decode0 is out: gone",
        "decode backend http://decode0 is up",
    ]


@pytest.mark.parametrize("kind", [BackendBusy])
def test_an_engine_at_its_limit_counts_as_any_failure(kind: type[BackendBusy]) -> None:
    made = fleet(decode=2, health={"failures": 1})
    made.failed(at(made, "http://decode0"), kind("full", status=503))
    assert not at(made, "http://decode0").up


# Membership


def test_a_backend_that_joins_is_told_of_and_begins_down() -> None:
    made, joined = fleet(), list[Backend]()
    made.on_join = joined.append
    backend = made.add("http://new", "decode")
    assert joined == [backend]
    assert not backend.up
    assert made.find("http://new", "decode") is backend
    assert made.find("http://new", "prefill") is None


def test_a_backend_that_is_there_already_is_not_added_again() -> None:
    made = fleet(decode=1)
    made.on_join = lambda backend: pytest.fail("joined")
    assert made.add("http://decode0", "decode") is at(made, "http://decode0")
    assert len(made.pool("decode")) == 1


def test_an_idle_backend_that_is_removed_is_forgotten_at_once() -> None:
    made, left = fleet(decode=2), list[Backend]()
    made.on_leave = left.append
    assert made.remove("http://decode0", "decode")
    assert urls(left) == ["http://decode0"]
    assert urls(made) == ["http://decode1"]


def test_a_busy_backend_that_is_removed_finishes_what_it_has_and_gets_nothing_new() -> None:
    made, left = fleet(decode=1), list[Backend]()
    made.on_leave = left.append
    with Lease(at(made, "http://decode0"), 1):
        assert made.remove("http://decode0", "decode")
        assert made.candidates("decode", None) == []
        assert at(made, "http://decode0").up
        made.forget_idle()
        assert left == []
    made.forget_idle()
    assert urls(left) == ["http://decode0"]
    assert made.pool("decode") == []


def test_a_removed_backend_that_is_still_busy_can_be_taken_back() -> None:
    made = fleet(decode=1)
    with Lease(at(made, "http://decode0"), 1):
        made.remove("http://decode0", "decode")
        made.add("http://decode0", "decode")
    made.forget_idle()
    assert urls(made.candidates("decode", None)) == ["http://decode0"]


@pytest.mark.parametrize(("url", "role"), [("http://nobody", "decode"), ("http://decode0", "prefill")])
def test_what_is_not_there_cannot_be_removed(url: str, role: Role) -> None:
    made = fleet(decode=1)
    assert made.remove(url, role) is False
    assert urls(made) == ["http://decode0"]


# Readiness and models


@pytest.mark.parametrize(
    ("pools", "down", "says"),
    [
        ({"prefill": 1, "decode": 1}, [], ""),
        ({"mixed": 1}, [], ""),
        ({"prefill": 1, "decode": 1, "mixed": 1}, ["prefill0", "decode0"], ""),
        ({"prefill": 1, "decode": 1}, ["prefill0"], "no prefill backend is up"),
        ({"prefill": 1, "decode": 1}, ["decode0"], "no decode backend is up"),
        ({"prefill": 1, "decode": 1}, ["prefill0", "decode0"], "no prefill and no decode backend is up"),
        ({"prefill": 1, "decode": 2}, ["decode0"], ""),
        ({}, [], "no backend is configured"),
    ],
)
def test_a_fleet_that_could_not_serve_says_why(pools: dict[str, int], down: list[str], says: str) -> None:
    made = fleet(**pools)
    for name in down:
        made.take_out(at(made, f"http://{name}"), "gone")
    assert made.not_ready() == says


def test_a_fleet_whose_backends_are_all_leaving_could_not_serve() -> None:
    made = fleet(mixed=1)
    at(made, "http://mixed0").removed = True
    assert made.not_ready()


def test_models_are_known_when_some_backend_serves_them_or_has_not_said() -> None:
    made = fleet(prefill=1, decode=1)
    assert made.knows("anything")
    assert not made.names("anything")
    for backend in made:
        backend.models = {"m": {"id": "m"}}
    assert made.knows("m")
    assert made.names("m")
    assert not made.knows("anything")
    assert not made.names("anything")


def test_the_cards_are_those_of_backends_that_answer_clients() -> None:
    made = fleet(prefill=1, decode=2, mixed=1)
    assert made.model_cards() == []
    at(made, "http://prefill0").models = {"only-prefill": {"id": "only-prefill"}, "m": {"id": "m"}}
    at(made, "http://decode0").models = {"m": {"id": "m", "owned_by": "vllm", "extra": [1]}}
    at(made, "http://decode1").models = {"m": {"id": "m", "owned_by": "someone"}, "lora": {"id": "lora"}}
    at(made, "http://mixed0").models = {"other": {"id": "other"}}
    assert made.model_cards() == [
        {"id": "m", "owned_by": "vllm", "extra": [1]},
        {"id": "lora"},
        {"id": "other"},
    ]


@pytest.mark.parametrize(
    ("prefill", "first", "second", "shown"),
    [(None, 4096, 2048, 2048), (1024, 4096, 2048, 1024), (8192, 4096, None, 4096), (None, None, 2048, 2048)],
)
def test_the_context_is_as_long_as_the_shortest_backends(
    prefill: int | None, first: int | None, second: int | None, shown: int
) -> None:
    made = fleet(prefill=1, decode=2)
    lengths = {"http://prefill0": prefill, "http://decode0": first, "http://decode1": second}
    for url, length in lengths.items():
        at(made, url).models = {"m": {"id": "m", "max_model_len": length}}
    (card,) = made.model_cards()
    assert card["max_model_len"] == shown


def test_making_cards_does_not_change_what_a_backend_said() -> None:
    made = fleet(decode=2)
    at(made, "http://decode0").models = {"m": {"id": "m", "max_model_len": 100}}
    at(made, "http://decode1").models = {"m": {"id": "m", "max_model_len": 50}}
    made.model_cards()
    assert at(made, "http://decode0").models == {"m": {"id": "m", "max_model_len": 100}}
