"""Whether the backends have capacity, and how it is reserved."""

from __future__ import annotations

from typing import Any

import pytest
from pd_proxy.admission.clients import Client, Level
from pd_proxy.admission.ticket import Ticket
from pd_proxy.fleet.backend import Lease
from pd_proxy.fleet.fleet import Fleet
from pd_proxy.flow.capacity import FleetCapacity
from pd_proxy.settings.tree import build_settings


def fleet(prefill: int = 0, decode: int = 0, mixed: int = 0, **bounds: Any) -> Fleet:
    pools = {"prefill": prefill, "decode": decode, "mixed": mixed}
    urls = {role: [f"{role}{number}:1" for number in range(count)] for role, count in pools.items()}
    made = Fleet(build_settings({**urls, "admission": bounds}, {}))
    for backend in made:
        backend.mark_up()
    return made


def ticket(tokens: int = 100, *, split: bool = True, model: str | None = "m") -> Ticket:
    return Ticket(Client("a", Level(0)), model, split, tokens // 2, tokens, 0)


def test_a_pool_holds_what_its_backends_that_are_up_hold_together() -> None:
    made = fleet(1, 3, decode_requests=2)
    capacity = FleetCapacity(made)
    made.pool("decode")[0].mark_down("for the test")
    kept = []
    while capacity.has(ticket()):
        kept.append(capacity.reserve(ticket()))
    assert len(kept) == 4
    assert [b.inflight_requests for b in made.pool("decode")] == [0, 2, 2]
    made.pool("decode")[0].mark_up()
    assert capacity.has(ticket())
    for each in kept:
        each.release()
        each.release()
    assert [(b.inflight_requests, b.inflight_tokens) for b in made] == [(0, 0)] * 4


def test_a_split_request_needs_room_in_both_pools_and_another_only_in_one() -> None:
    made = fleet(1, 1, prefill_requests=1, decode_requests=2)
    capacity = FleetCapacity(made)
    [prefill], [decode] = made.pool("prefill"), made.pool("decode")
    with Lease(prefill, 10):
        assert not capacity.has(ticket())
        assert capacity.has(ticket(split=False))
        with Lease(decode, 10), Lease(decode, 10):
            assert not capacity.has(ticket(split=False))
    assert capacity.has(ticket())


def test_tokens_are_those_of_each_leg() -> None:
    made = fleet(1, 1, prefill_tokens=100, decode_tokens=200)
    capacity = FleetCapacity(made)
    [prefill], [decode] = made.pool("prefill"), made.pool("decode")
    with Lease(prefill, 60):
        assert capacity.has(ticket(80))
        assert not capacity.has(ticket(82))
    with Lease(decode, 100):
        assert capacity.has(ticket(100))
        assert not capacity.has(ticket(101))


def test_a_long_prompt_goes_to_an_idle_prefill_backend() -> None:
    made = fleet(2, 1, prefill_tokens=100)
    capacity = FleetCapacity(made)
    first, second = made.pool("prefill")
    with Lease(first, 1):
        assert capacity.has(ticket(10_000))
        with Lease(second, 1):
            assert not capacity.has(ticket(10_000))


def test_mixed_backends_count_where_no_pair_is_up_or_the_request_cannot_be_split() -> None:
    made = fleet(1, 1, 1, decode_requests=1)
    capacity = FleetCapacity(made)
    [prefill], [decode], [mixed] = (made.pool(role) for role in ("prefill", "decode", "mixed"))
    with Lease(mixed, 1):
        assert capacity.has(ticket())
        assert not capacity.has(ticket(split=False))
        prefill.mark_down("for the test")
        assert not capacity.has(ticket())
    with Lease(decode, 1):
        assert capacity.has(ticket())
        capacity.reserve(ticket()).release()
        mixed.mark_down("for the test")
        assert not capacity.has(ticket())


@pytest.mark.parametrize("split", [True, False])
def test_where_no_backend_is_up_it_is_not_capacity_that_is_missing(split: bool) -> None:
    made = fleet(1, 1, 1, decode_requests=1, prefill_requests=1)
    for backend in made:
        backend.mark_down("for the test")
    capacity = FleetCapacity(made)
    assert capacity.has(ticket(split=split))
    capacity.reserve(ticket(split=split)).release()


def test_backends_that_do_not_serve_the_model_have_no_room_for_it() -> None:
    made = fleet(0, 2, decode_requests=1)
    first, second = made.pool("decode")
    first.models, second.models = {"m": {}}, {"n": {}}
    capacity = FleetCapacity(made)
    with Lease(first, 1):
        assert not capacity.has(ticket(model="m"))
        assert capacity.has(ticket(model="n"))


def test_full_backends_are_no_candidates_while_others_have_room() -> None:
    made = fleet(0, 3, decode_requests=1, decode_tokens=100)
    first, second, third = made.pool("decode")
    with Lease(first, 10):
        assert made.candidates("decode", "m", 50) == [second, third]
        assert made.candidates("decode", "m") == [first, second, third]
        with Lease(second, 10), Lease(third, 10):
            assert made.candidates("decode", "m", 50) == [first, second, third], "for those that are in already"


def test_requests_that_wait_for_capacity_are_notified_of_every_change() -> None:
    made = fleet(0, 1, decode_requests=1)
    heard: list[int] = []
    made.watch_capacity(lambda: heard.append(1))
    [backend] = made.pool("decode")
    changes = [
        Lease(backend, 1).release,
        lambda: made.take_out(backend, "for the test"),
        lambda: made.bring_in(backend),
        lambda: Lease(made.add("new:1", "decode"), 1).release(),
        lambda: made.remove("new:1", "decode"),
    ]
    for number, change in enumerate(changes, 1):
        change()
        assert len(heard) == number
