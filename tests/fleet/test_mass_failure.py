from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from pd_proxy.fleet.health.mass_failure import LATE, MOST_LATE, OVERDUE, Checks, Delays, Run

TIMEOUT = 2.0
ENGINES = [f"engine{number}" for number in range(8)]


def checks(failing: int = 0, *, of: int = len(ENGINES)) -> tuple[Checks, list[str]]:
    """The checks of eight engines, and all of them but the first; `failing` of these others fail."""
    made, others = Checks(TIMEOUT), ENGINES[1:of]
    for number, other in enumerate(others):
        made.began(other, 0.0)
        made.ended(other, number >= failing)
    return made, others


def rounds(made: Checks, others: list[str], *, needed: int = 2, delay: float = 0.0, most: int = 50) -> int:
    """The number of failed checks after which the first engine is taken out; each check takes its time limit."""
    run, now = Run(needed, 0.0), 0.0
    for count in range(1, most + 1):
        now += TIMEOUT
        made.delays.note(delay, now)
        if run.failed(made, others, now):
            return count
    return 0


@given(needed=st.integers(1, 5), failing=st.integers(0, 7), of=st.integers(1, 8))
def test_an_engine_is_taken_out_after_its_checks_and_one_more_if_most_fail(needed: int, failing: int, of: int) -> None:
    failing = min(failing, of - 1)
    made, others = checks(failing, of=of)
    mass = failing >= 1 and (1 + failing) * 2 > of
    assert rounds(made, others, needed=needed) == needed + mass


@given(needed=st.integers(1, 5), delay=st.floats(LATE * TIMEOUT, 10 * TIMEOUT))
def test_a_dead_engine_is_taken_out_at_last_however_late_the_event_loop_is(needed: int, delay: float) -> None:
    made, others = checks(0)
    assert rounds(made, others, needed=needed, delay=delay) == needed + MOST_LATE


@given(needed=st.integers(1, 5), delay=st.floats(0, LATE * TIMEOUT / 5, exclude_max=True))
def test_small_delays_excuse_nothing(needed: int, delay: float) -> None:
    made, others = checks(0)
    assert rounds(made, others, needed=needed, delay=delay) == needed


def test_a_delay_before_the_first_failed_check_excuses_nothing() -> None:
    made, others = checks(0)
    made.delays.note(5.0, 10.0)
    assert made.excuse(others, 10.0, 12.0) is None
    assert made.excuse(others, 9.0, 12.0) == "late"


def test_checks_that_are_overdue_fail_with_the_others() -> None:
    made, others = checks(0)
    for other in others:
        made.began(other, 0.0)
    assert made.excuse(others, 0.0, OVERDUE * TIMEOUT) is None
    assert made.excuse(others, 0.0, OVERDUE * TIMEOUT + 0.01) == "mass"
    for other in others:
        made.ended(other, True)
    assert made.excuse(others, 0.0, 100.0) is None


def test_the_failed_checks_of_a_backend_that_has_left_are_forgotten() -> None:
    made, _ = checks(7)
    assert made.fails(ENGINES[1], 0.0)
    made.forget(ENGINES[1])
    assert not made.fails(ENGINES[1], 1000.0)


@given(st.lists(st.tuples(st.floats(0.02, 5), st.floats(0, 5)), max_size=30), st.floats(0, 100))
def test_delays_are_counted_from_a_given_time_on(gaps: list[tuple[float, float]], began: float) -> None:
    delays, now, parts = Delays(), 0.0, []
    for late, quiet in gaps:
        now += quiet + late
        delays.note(late, now)
        parts.append((now - late, now))
    assert all(before[1] <= after[0] + 1e-9 for before, after in pairwise(parts))
    expected = sum(max(0.0, end - max(start, began)) for start, end in parts)
    assert abs(delays.since(began) - expected) < 1e-6
