"""The use of a pending hand-off: its table of transitions, and what is counted while it is pending."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pd_proxy.errors import BackendBusy, BackendCut, BackendError, BackendRejected, BackendUnreachable
from pd_proxy.fleet.backend import Backend
from pd_proxy.fleet.fleet import Fleet
from pd_proxy.flow.pending_handoff import TRANSITIONS, HandoffUse, PendingHandoff
from pd_proxy.handoff.connector import Handoff
from pd_proxy.settings.tree import Settings
from pd_proxy.transitions import ImpossibleTransition

REFUSED = BackendRejected("refused by the handler", status=400)
REFUSED.handled = True
ERRORS: list[BackendError] = [
    BackendUnreachable("no connection"),
    BackendBusy("busy", status=503, unread=True),
    REFUSED,
    BackendRejected("refused", status=400),
    BackendCut("cut"),
]


def pending() -> tuple[Fleet, Backend, PendingHandoff]:
    fleet = Fleet(Settings(decode=["http://decode"], prefill=["http://prefill"]))
    backend = fleet.find("http://prefill", "prefill")
    assert backend is not None
    return fleet, backend, PendingHandoff(fleet, backend, Handoff({}), 10.0)


@given(st.lists(st.one_of(st.just("sent"), st.just("settle"), st.tuples(st.sampled_from(ERRORS), st.booleans()))))
def test_every_step_is_one_of_the_table_and_it_is_counted_until_it_is_settled(
    steps: list[str | tuple[BackendError, bool]],
) -> None:
    fleet, backend, handoff = pending()
    for step in steps:
        before = handoff.use
        if step == "sent":
            handoff.sent()
        elif step == "settle":
            handoff.settle()
        else:
            assert not isinstance(step, str)
            error, frees = step
            handoff.leg_failed(error, refusal_frees=frees)
        assert handoff.use is before or handoff.use in TRANSITIONS[before]
        counted = int(handoff.use is not HandoffUse.SETTLED)
        assert (fleet.handoffs_pending, backend.open_handoffs) == (counted, counted)


@pytest.mark.parametrize(("use", "following"), [(use, other) for use in HandoffUse for other in HandoffUse])
def test_a_transition_that_the_table_lacks_raises(use: HandoffUse, following: HandoffUse) -> None:
    _, _, handoff = pending()
    handoff.use = use
    with nullcontext() if following in TRANSITIONS[use] else pytest.raises(ImpossibleTransition):
        handoff._becomes(following)


def test_a_refusal_that_frees_the_blocks_settles_it_at_once_and_no_other_engine_gets_it() -> None:
    fleet, backend, handoff = pending()
    fleet.remove("http://prefill", "prefill")
    backend.attention.clear()
    handoff.sent()
    handoff.leg_failed(REFUSED, refusal_frees=True)
    assert handoff.use is HandoffUse.SETTLED
    assert backend.attention.is_set(), "the backend need not stay for blocks that are free"
    assert not REFUSED.unread, "only what was not read goes to another decode engine"


def test_settled_is_the_end() -> None:
    for use, following in TRANSITIONS.items():
        assert HandoffUse.SETTLED in following
        assert (following == {use}) is (use is HandoffUse.SETTLED)
