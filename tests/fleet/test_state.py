"""The states of a backend: every event in every state, and what `Backend` derives from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pd_proxy.fleet.backend import Backend
from pd_proxy.fleet.outlier.statistics import OutlierStats
from pd_proxy.fleet.state import DUTY, FITNESS, HEALTH, Duty, Event, Fitness, Health
from pd_proxy.transitions import ImpossibleTransition, after

TABLES: list[Mapping[Any, Mapping[Event, Any]]] = [HEALTH, DUTY, FITNESS]
DOWN_EVENTS = [event for event, state in HEALTH[Health.UP].items() if state is Health.DOWN]


@pytest.mark.parametrize("table", TABLES, ids=["health", "duty", "fitness"])
def test_each_table_has_every_state_and_leads_to_its_own_states_only(table: Mapping[Any, Mapping[Event, Any]]) -> None:
    states = set(type(next(iter(table))))
    assert table.keys() == states
    assert {then for row in table.values() for then in row.values()} <= states


@pytest.mark.parametrize("table", TABLES, ids=["health", "duty", "fitness"])
def test_an_event_that_a_state_does_not_know_raises(table: Mapping[Any, Mapping[Event, Any]]) -> None:
    for state, row in table.items():
        for event in Event:
            if event in row:
                assert after(table, state, event) is row[event]
            else:
                with pytest.raises(ImpossibleTransition, match=event.value):
                    after(table, state, event)


@given(st.lists(st.sampled_from(["up", *DOWN_EVENTS, Event.DRAIN, Event.UNDRAIN, Event.REMOVE]), max_size=20))
def test_what_others_read_of_a_backend_follows_from_its_states(events: list[Any]) -> None:
    backend = Backend("http://a", "decode")
    was_up = False
    for event in events:
        if event == "up":
            backend.mark_up()
            was_up = True
        elif event in DOWN_EVENTS:
            backend.mark_down("gone", event)
        else:
            backend.set_duty(event)
        assert backend.up is (backend.health is Health.UP)
        assert bool(backend.reason) is not backend.up
        assert backend.draining is (backend.duty in (Duty.DRAINING, Duty.LEAVING))
        assert backend.removed is (backend.duty is Duty.LEAVING)
        assert backend.was_up is was_up


def test_a_backend_that_is_gone_does_not_come_back() -> None:
    backend = Backend("http://a", "decode")
    backend.set_duty(Event.REMOVE)
    backend.set_duty(Event.FORGET)
    for event in (Event.DRAIN, Event.UNDRAIN, Event.REMOVE, Event.FORGET):
        with pytest.raises(ImpossibleTransition):
            backend.set_duty(event)


def test_a_backend_that_was_not_removed_is_not_forgotten() -> None:
    backend = Backend("http://a", "decode")
    for event in (None, Event.DRAIN):
        if event is not None:
            backend.set_duty(event)
        with pytest.raises(ImpossibleTransition):
            backend.set_duty(Event.FORGET)


@given(st.lists(st.sampled_from(["eject", "end", "restart"]), max_size=20))
def test_an_ejection_ends_once_and_has_a_reason_while_it_lasts(events: list[str]) -> None:
    stats, now = OutlierStats(10.0), 0.0
    for event in events:
        now += 1.0
        if event == "eject":
            stats.eject(now + 10, "slow")
        elif event == "restart":
            stats.lift(now)
        elif stats.fitness is Fitness.FIT:
            with pytest.raises(ImpossibleTransition):
                stats.end_ejection()
        else:
            stats.end_ejection()
        assert bool(stats.reason) is (stats.fitness is Fitness.EJECTED)
