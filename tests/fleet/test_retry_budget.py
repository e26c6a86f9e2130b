"""How many retries a pool may have in progress."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pd_proxy.errors import (
    BackendBusy,
    BackendCut,
    BackendError,
    BackendFailed,
    BackendLost,
    BackendTimedOut,
    BackendUnreachable,
)
from pd_proxy.fleet.backend import Lease
from pd_proxy.fleet.fleet import Fleet
from pd_proxy.fleet.retry_budget import Budgets, amplifies
from pd_proxy.settings.tree import Settings


def fleet(share: float, floor: int) -> Fleet:
    retries = {"share": share, "floor": floor}
    return Fleet(Settings(prefill=["p:1"], decode=["d:1", "d:2"], retries=retries))  # type: ignore[arg-type]


def take_all(budgets: Budgets) -> int:
    """How many permits the decode pool gives until it refuses one."""
    count = 0
    while budgets.take("decode") is not None:
        count += 1
    return count


@settings(deadline=None)  # it makes a fleet each time
@given(live=st.integers(0, 60), share=st.floats(0, 1), floor=st.integers(0, 10))
def test_retries_are_a_share_of_the_live_requests_or_the_floor(live: int, share: float, floor: int) -> None:
    made = fleet(share, floor)
    with ExitStack() as stack:
        for number in range(live):
            stack.enter_context(Lease(made.pool("decode")[number % 2], 1))
        assert take_all(made.budgets) == int(max(floor, share * live))
        assert made.budgets.refusals == {"decode": 1}


def test_pools_have_budgets_of_their_own() -> None:
    made = fleet(0.5, 1)
    with ExitStack() as stack:
        for _ in range(10):
            stack.enter_context(Lease(made.pool("decode")[0], 1))
        assert take_all(made.budgets) == 5
        assert made.budgets.take("prefill") is not None
        assert made.budgets.take("prefill") is None


def test_a_permit_comes_back_once_however_its_retry_ends() -> None:
    budgets = fleet(0, 1).budgets
    permit = budgets.take("decode")
    assert permit is not None
    with permit:
        assert budgets.take("decode") is None
        permit.release()
        permit.release()
    assert budgets.in_progress["decode"] == 0
    failing = budgets.take("decode")
    assert failing is not None
    with pytest.raises(ZeroDivisionError), failing:
        raise ZeroDivisionError
    assert budgets.in_progress["decode"] == 0
    assert budgets.refusals["decode"] == 1


@pytest.mark.parametrize(
    ("error", "does"),
    [
        (BackendUnreachable("x"), False),
        (BackendLost("x"), False),
        (BackendCut("x"), False),
        (BackendTimedOut("x"), True),
        (BackendFailed("x", status=500), True),
        (BackendBusy("x", status=503), True),
    ],
)
def test_what_died_took_its_load_with_it_and_what_failed_may_be_overloaded(error: BackendError, does: bool) -> None:
    assert amplifies(error) is does
