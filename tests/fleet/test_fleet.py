"""Who is in the pools, who may be given a request, and what failed requests say about that."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from pd_proxy.errors import (
    BackendAborted,
    BackendBusy,
    BackendCut,
    BackendError,
    BackendFailed,
    BackendStopping,
    BackendTimedOut,
    BackendUnreachable,
)
from pd_proxy.fleet.backend import Backend, Lease, Role
from pd_proxy.fleet.fleet import Fleet
from pd_proxy.fleet.readiness import not_ready
from pd_proxy.fleet.view import FleetView
from pd_proxy.flow.pending_handoff import PendingHandoff
from pd_proxy.handoff.connector import Handoff
from pd_proxy.settings.tree import Settings


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def fleet(up: bool = True, clock: Clock | None = None, **pools: Any) -> Fleet:
    """Pools of so many backends each: `http://decode0` and so on."""
    settings = {
        role: [f"http://{role}{number}" for number in range(pools.pop(role, 0))]
        for role in ("prefill", "decode", "mixed")
    }
    made = Fleet(Settings(**settings, **pools), clock=clock or Clock())
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
    at(made, "http://decode1").draining = True
    at(made, "http://decode2").models = {"other": {}}
    at(made, "http://decode3").models = {"m": {}}
    assert urls(made.candidates("decode", "m")) == ["http://decode3", "http://decode4"]
    assert urls(made.candidates("decode", None)) == ["http://decode2", "http://decode3", "http://decode4"]


# What real requests tell


def cut() -> BackendError:
    return BackendCut("cut")


def fail(made: Fleet, backend: Backend, times: int, error: BackendError | None = None) -> None:
    for _ in range(times):
        made.failed(backend, error or cut(), "decode")


def test_a_backend_that_cannot_be_reached_leaves_at_once_and_is_not_judged() -> None:
    made = fleet(decode=1)
    backend = at(made, "http://decode0")
    made.failed(backend, BackendUnreachable("refused"), "decode")
    assert not backend.up
    assert backend.reason == "failed a request: refused"
    assert backend.attention.is_set()
    made.bring_in(backend)
    assert made.state(backend) == "slow_start"
    assert not made.outlier_detector.ejections


@pytest.mark.parametrize("error", [BackendCut("x"), BackendTimedOut("x"), BackendFailed("x", status=500)])
def test_a_backend_is_ejected_after_as_many_failures_in_a_row_as_are_set_and_stays_up(error: BackendError) -> None:
    made = fleet(decode=2, breaker={"consecutive_failures": 3})
    backend = at(made, "http://decode0")
    fail(made, backend, 2, error)
    assert len(made.candidates("decode", None)) == 2
    assert backend.attention.is_set()
    fail(made, backend, 1, error)
    assert urls(made.candidates("decode", None)) == ["http://decode1"]
    assert backend.up
    assert made.state(backend) == "ejected"
    assert made.outlier_detector.ejections == {("decode", "http://decode0", "decode", "consecutive"): 1}


def test_an_ejection_ends_by_itself_and_the_backends_load_grows_slowly() -> None:
    clock = Clock()
    made = fleet(clock=clock, decode=2, breaker={"ejection": 10, "slow_start": 20})
    backend = at(made, "http://decode0")
    fail(made, backend, 5)
    clock.now += 9.9
    assert urls(made.candidates("decode", None)) == ["http://decode1"]
    clock.now += 0.2
    assert len(made.candidates("decode", None)) == 2
    assert (made.state(backend), backend.factor) == ("slow_start", 0.1)
    clock.now += 9.9
    made.candidates("decode", None)
    assert backend.factor == pytest.approx(0.5)
    clock.now += 10
    made.candidates("decode", None)
    assert (made.state(backend), backend.factor) == ("up", 1.0)
    assert not made.outlier_detector.watches, "from here on a look at a pool costs nothing again"


def test_what_fails_during_an_ejection_does_not_make_it_longer() -> None:
    clock = Clock()
    made = fleet(clock=clock, decode=2)
    backend = at(made, "http://decode0")
    fail(made, backend, 5)
    clock.now += 5
    fail(made, backend, 50)
    clock.now += 5
    assert len(made.candidates("decode", None)) == 2
    assert sum(made.outlier_detector.ejections.values()) == 1


def test_a_good_leg_between_failures_starts_the_count_anew() -> None:
    clock = Clock()
    made = fleet(clock=clock, decode=2, breaker={"consecutive_failures": 2, "success_rate": 0})
    backend = at(made, "http://decode0")
    for _ in range(5):
        fail(made, backend, 1)
        made.succeeded(backend, "decode")
    assert not made.outlier_detector.ejections


def test_legs_are_judged_apart() -> None:
    made = fleet(mixed=2)
    backend = at(made, "http://mixed0")
    for _ in range(4):
        made.failed(backend, cut(), "prefill")
        made.succeeded(backend, "decode")
    assert not made.outlier_detector.ejections
    made.failed(backend, cut(), "prefill")
    assert made.outlier_detector.ejections == {("mixed", "http://mixed0", "prefill", "consecutive"): 1}
    assert len(made.candidates("mixed", None)) == 2, "whole requests are decode legs"


def test_the_last_backend_of_a_pool_stays_though_it_fails() -> None:
    made = fleet(decode=3)
    made.take_out(at(made, "http://decode1"), "gone")
    made.drain(at(made, "http://decode2"))
    backend = at(made, "http://decode0")
    fail(made, backend, 20)
    assert urls(made.candidates("decode", None)) == ["http://decode0"]
    assert not made.outlier_detector.ejections
    assert backend.attention.is_set()  # its health is asked at once all the same


def test_a_backend_of_another_role_or_model_is_no_replacement() -> None:
    made = fleet(decode=2, mixed=1, prefill=1)
    at(made, "http://decode0").models = {"m": {}}
    at(made, "http://decode1").models = {"other": {}}
    fail(made, at(made, "http://decode0"), 20)
    assert urls(made.candidates("decode", "m")) == ["http://decode0"]
    assert not made.outlier_detector.ejections


def test_when_too_few_are_left_all_that_are_alive_are_candidates_again() -> None:
    made = fleet(decode=4)
    for name in ("http://decode0", "http://decode1"):
        fail(made, at(made, name), 5)
    assert len(made.candidates("decode", None)) == 2
    made.take_out(at(made, "http://decode2"), "gone")
    assert urls(made.candidates("decode", None)) == ["http://decode0", "http://decode1", "http://decode3"]
    assert dict(FleetView(made).panicking()) == {"prefill": False, "decode": True, "mixed": False, "encode": False}
    made.bring_in(at(made, "http://decode2"))
    assert urls(made.candidates("decode", None)) == ["http://decode2", "http://decode3"]
    assert dict(FleetView(made).panicking())["decode"] is False


LEAVES = [BackendAborted("ended"), BackendStopping("no more", status=503)]


@pytest.mark.parametrize("error", LEAVES)
def test_an_engine_that_is_leaving_gets_nothing_more_at_once_and_keeps_what_it_has(error: BackendError) -> None:
    clock = Clock()
    made = fleet(clock=clock, decode=3, breaker={"ejection": 10, "slow_start": 0, "max_ejected": 0})
    backend = at(made, "http://decode0")
    fail(made, backend, 1, error)
    assert urls(made.candidates("decode", None)) == ["http://decode1", "http://decode2"]
    assert backend.up and backend.attention.is_set() and made.state(backend) == "ejected"
    assert made.outlier_detector.leaving(backend)
    assert made.outlier_detector.ejections == {("decode", "http://decode0", "decode", "leaving"): 1}
    fail(made, backend, 3, error)  # what else it had
    assert made.outlier_detector.ejections.total() == 1
    clock.now += 10.1
    assert len(made.candidates("decode", None)) == 3 and not made.outlier_detector.leaving(backend)
    fail(made, backend, 1, error)  # it still drains: it is out for twice as long
    clock.now += 19.9
    assert len(made.candidates("decode", None)) == 2
    clock.now += 0.2
    assert len(made.candidates("decode", None)) == 3


def test_those_that_are_leaving_are_left_out_even_if_few_are_left_but_not_if_nobody_is() -> None:
    """Where the pool is in panic, its ejections are ignored; not those of engines that say themselves that they end."""
    made = fleet(decode=4)
    for number in range(3):
        fail(made, at(made, f"http://decode{number}"), 1, LEAVES[0])
    assert dict(FleetView(made).panicking())["decode"]
    assert urls(made.candidates("decode", None)) == ["http://decode3"]
    fail(made, at(made, "http://decode3"), 1, LEAVES[0])
    assert len(made.candidates("decode", None)) == 4


def test_an_engine_that_was_leaving_and_comes_up_again_is_another() -> None:
    made = fleet(decode=2)
    backend = at(made, "http://decode0")
    fail(made, backend, 1, LEAVES[0])
    made.take_out(backend, "connection refused")
    made.bring_in(backend)
    assert len(made.candidates("decode", None)) == 2 and not made.outlier_detector.leaving(backend)


def test_a_decode_engine_that_is_stopping_casts_no_doubt_on_prefill() -> None:
    made = fleet(prefill=1, decode=2)
    prefill, decode = at(made, "http://prefill0"), at(made, "http://decode0")
    prefill.attention.clear()
    made.failed(decode, LEAVES[1], "decode", prefill)
    assert not prefill.attention.is_set() and made.state(decode) == "ejected"


def test_a_failure_that_blames_nobody_is_no_failure() -> None:
    made = fleet(decode=2)
    backend = at(made, "http://decode0")
    fail(made, backend, 20, BackendCut("kept alive", blame=False))
    assert not made.outlier_detector.ejections
    assert not backend.attention.is_set()


def test_a_failure_of_a_backend_that_is_down_already_changes_nothing() -> None:
    made = fleet(decode=2)
    backend = at(made, "http://decode0")
    made.take_out(backend, "first reason")
    made.failed(backend, BackendUnreachable("second reason"), "decode")
    fail(made, backend, 20)
    assert backend.reason == "first reason"
    assert not made.outlier_detector.ejections


def test_what_comes_up_again_is_not_what_was_ejected() -> None:
    made = fleet(decode=2)
    backend = at(made, "http://decode0")
    fail(made, backend, 5)
    made.take_out(backend, "died")
    made.bring_in(backend)
    assert len(made.candidates("decode", None)) == 2
    assert made.state(backend) == "slow_start"


def test_a_decode_engine_that_could_not_read_from_a_dead_prefill_is_not_to_blame() -> None:
    made = fleet(prefill=1, decode=2)
    prefill, backend = at(made, "http://prefill0"), at(made, "http://decode0")
    failed = BackendFailed("KV load failed", status=500)
    made.failed(backend, failed, "decode", prefill)
    assert prefill.attention.is_set(), "its prober should look at once"
    made.take_out(prefill, "dead")
    for _ in range(20):
        made.failed(backend, failed, "decode", prefill)
    assert not made.outlier_detector.ejections
    made.failed(backend, BackendUnreachable("refused"), "decode", prefill)
    assert not backend.up, "but it answers for itself when it cannot be reached"


def test_legs_that_wait_are_given_up_when_nothing_gets_through() -> None:
    made = fleet(decode=2)
    backend = at(made, "http://decode0")
    told: list[BackendError] = []
    with Lease(backend, 1) as lease:
        lease.on_lost = told.append
        fail(made, backend, 5)
    assert [str(error) for error in told] == ["http://decode0 was ejected"]


def test_an_engine_at_its_limit_has_not_failed_and_rests_if_it_says_how_long() -> None:
    clock = Clock()
    made = fleet(clock=clock, decode=2)
    first, second = made.pool("decode")
    fail(made, first, 20, BackendBusy("full", status=503))
    assert not first.attention.is_set()
    assert len(made.candidates("decode", None)) == 2
    fail(made, first, 1, BackendBusy("full", status=429, retry_after=3))
    assert made.candidates("decode", None) == [second]
    fail(made, second, 1, BackendBusy("full", status=429, retry_after=2))
    assert made.candidates("decode", None) == [first, second], "when all rest, all are asked"
    clock.now += 2
    assert made.candidates("decode", None) == [second]
    clock.now += 1
    assert made.candidates("decode", None) == [first, second]
    fail(made, first, 1, BackendBusy("full", status=429, retry_after=3600))
    clock.now += 10
    assert len(made.candidates("decode", None)) == 2
    assert not made.outlier_detector.ejections


def test_those_that_a_gateway_began_with_need_no_slow_start_and_newcomers_do() -> None:
    made = fleet(decode=2)
    assert [made.state(backend) for backend in made] == ["up", "up"]
    newcomer = made.add("http://new", "decode")
    made.bring_in(newcomer)
    assert made.state(newcomer) == "slow_start"


def test_a_backend_that_is_the_odd_one_of_three_is_ejected_for_slowness() -> None:
    made = fleet(decode=3)
    for _ in range(12):
        for number, seconds in enumerate((0.02, 0.02, 0.2)):
            made.timed(at(made, f"http://decode{number}"), "decode", seconds, 100)
    assert made.outlier_detector.ejections == {("decode", "http://decode2", "decode", "slow"): 1}
    assert made.state(at(made, "http://decode2")) == "ejected"


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


# Membership


def test_a_backend_that_comes_back_has_perhaps_lost_its_cache_and_one_that_comes_has_not() -> None:
    made, lost = fleet(up=False, decode=1), list[Backend]()
    made.subscribe(on_lost_cache=lost.append)
    backend = at(made, "http://decode0")
    made.bring_in(backend)
    assert not lost, "other workers may have sent it prompts"
    made.take_out(backend, "refused")
    made.bring_in(backend)
    assert lost == [backend]


def test_a_backend_that_joins_is_told_of_and_begins_down() -> None:
    made, joined = fleet(), list[Backend]()
    made.subscribe(on_join=joined.append)
    backend = made.add("http://new", "decode")
    assert joined == [backend]
    assert not backend.up
    assert made.find("http://new", "decode") is backend
    assert made.find("http://new", "prefill") is None


def test_a_backend_that_is_there_already_is_not_added_again() -> None:
    made = fleet(decode=1)
    made.subscribe(on_join=lambda backend: pytest.fail("joined"))
    assert made.add("http://decode0", "decode") is at(made, "http://decode0")
    assert len(made.pool("decode")) == 1


def test_an_idle_backend_that_is_removed_is_forgotten_at_once() -> None:
    made, left = fleet(decode=2), list[Backend]()
    made.subscribe(on_leave=left.append)
    assert made.remove("http://decode0", "decode")
    assert urls(left) == ["http://decode0"]
    assert urls(made) == ["http://decode1"]


def test_a_busy_backend_that_is_removed_finishes_what_it_has_and_gets_nothing_new() -> None:
    made, left = fleet(decode=1), list[Backend]()
    made.subscribe(on_leave=left.append)
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


def test_a_prefill_backend_that_is_removed_is_kept_while_decode_may_still_read_from_it() -> None:
    made, left = fleet(prefill=1), list[Backend]()
    made.subscribe(on_leave=left.append)
    backend = at(made, "http://prefill0")
    pending = PendingHandoff(made, backend, Handoff({}), 10.0)
    made.remove("http://prefill0", "prefill")
    made.forget_idle()
    assert (left, backend.drained) == ([], False)
    pending.settle()
    assert backend.attention.is_set()
    made.forget_idle()
    assert left == [backend]
    pending.settle()
    assert (backend.open_handoffs, made.handoffs_pending) == (0, 0)


def test_a_backend_is_drained_and_given_requests_again() -> None:
    made = fleet(decode=2)
    backend = at(made, "http://decode0")
    made.drain(backend)
    assert urls(made.candidates("decode", None)) == ["http://decode1"]
    assert made.state(backend) == "draining"
    made.forget_idle()
    assert len(made.pool("decode")) == 2, "to be drained is not to be removed"
    made.undrain(backend)
    assert made.state(backend) == "up"
    with Lease(backend, 1):
        made.remove("http://decode0", "decode")
        made.undrain(backend)
    made.forget_idle()
    assert len(made.candidates("decode", None)) == 2


def test_a_backend_that_has_left_leaves_no_count_behind() -> None:
    made = fleet(decode=2)
    fail(made, at(made, "http://decode0"), 5)
    made.remove("http://decode0", "decode")
    assert not made.outlier_detector.ejections
    assert not made.outlier_detector.watches


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
    assert not_ready(made) == says


def test_a_fleet_whose_backends_are_all_leaving_could_not_serve() -> None:
    made = fleet(mixed=1)
    made.drain(at(made, "http://mixed0"))
    assert not_ready(made) == "no prefill and no decode backend is up (1 draining)"


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


def test_a_connection_that_does_not_come_about_while_the_event_loop_stands_still_is_no_death() -> None:
    now = 100.0
    made = Fleet(Settings(decode=["http://decode0", "http://decode1"]), clock=lambda: now)
    for backend in made:
        made.bring_in(backend)
    first, second = made.pool("decode")
    made.delays.note(6.0, now)
    made.failed(first, BackendUnreachable("no connection within 5 s"), "decode")
    assert first.up
    assert first.attention.is_set()  # its prober finds out
    now += 11.0
    made.failed(second, BackendUnreachable("no connection within 5 s"), "decode")
    assert not second.up
