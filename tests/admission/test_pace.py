"""The pace at which the queue empties."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pd_proxy.admission.pace import Pace


def steady(rate: float, requests: int, start: float = 0.0) -> tuple[Pace, float]:
    """A pace after a number of requests a second, and the time by then."""
    pace, now = Pace(), start
    pace.note_waiting(True, now)
    for _ in range(requests):
        now += 1 / rate
        pace.note_admitted(now)
    return pace, now


def test_without_enough_observations_there_is_no_rate_and_retry_after_is_the_minimum() -> None:
    pace, now = steady(1.0, 4)
    assert pace.seconds(10, now) is None
    assert pace.retry_after(1000, now) == 1


@settings(deadline=None)
@given(st.floats(0.2, 1000), st.integers(5, 500), st.integers(1, 1000))
def test_a_steady_rate_is_measured(rate: float, requests: int, waiting: int) -> None:
    pace, now = steady(rate, requests)
    assert pace.seconds(waiting, now) == pytest.approx(waiting / rate, rel=1e-6)


def test_retry_after_is_the_time_in_which_the_queue_empties_between_1_and_60_seconds() -> None:
    pace, now = steady(4.0, 100)
    assert pace.retry_after(0, now) == 1
    assert pace.retry_after(1, now) == 1
    assert pace.retry_after(42, now) == 11
    assert pace.retry_after(100_000, now) == 60


def test_time_without_a_queue_does_not_count() -> None:
    pace, now = steady(10.0, 50)
    pace.note_waiting(False, now)
    now += 3600
    pace.note_waiting(True, now)
    assert pace.seconds(10, now) == pytest.approx(1.0)


def test_batches_do_not_make_the_rate_jump() -> None:
    pace, now = Pace(), 0.0
    pace.note_waiting(True, now)
    for _ in range(20):  # 16 requests end together every second
        now += 1
        for _ in range(16):
            pace.note_admitted(now)
            seconds = pace.seconds(16, now)
    assert seconds == pytest.approx(1.0, rel=0.1)


def test_the_rate_follows_a_pool_that_shrinks() -> None:
    pace, now = steady(100.0, 3000)
    for _ in range(200):
        now += 0.1
        pace.note_admitted(now)
    assert pace.seconds(10, now) == pytest.approx(1.0, rel=0.25)


def test_the_rate_falls_while_the_queue_stands_still_and_recovers_soon_after() -> None:
    pace, now = steady(10.0, 200)
    pace.note_waiting(True, now)
    for longer in (20, 100):
        now += longer
        assert (pace.seconds(1, now) or 0) >= longer / 100
    assert (pace.seconds(1, now) or 0) >= 30, "nothing at all for two minutes"
    for _ in range(200):
        now += 0.1
        pace.note_admitted(now)
    assert pace.seconds(1, now) == pytest.approx(0.1, rel=0.01)


def test_a_slow_service_has_a_rate_after_half_a_minute() -> None:
    pace, now = steady(0.1, 2)
    assert pace.seconds(1, now) is None
    pace.note_admitted(now + 10.0)
    assert pace.seconds(1, now + 10.0) == pytest.approx(10.0)
