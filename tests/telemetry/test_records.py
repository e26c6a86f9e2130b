"""Distributions, and the durations in a request's record."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pd_proxy.telemetry.records import ITL_BOUNDS, Distribution, RequestRecord

BOUNDS = (0.25, 0.5, 1.0)
SECONDS = st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.5, 0.75, 1.0, 1.5, 9.0]) | st.floats(0, 10)


def test_a_value_counts_in_the_first_bucket_whose_bound_it_does_not_exceed() -> None:
    seen = Distribution(BOUNDS)
    for value in (0.0, 0.25, 0.26, 0.5, 1.0, 1.01):
        seen.observe(value)
    assert seen.counts == [2, 2, 1, 1]
    assert seen.sum == pytest.approx(3.02)


def test_no_values_change_nothing() -> None:
    seen = Distribution(BOUNDS)
    seen.observe_all([])
    assert seen.counts == [0, 0, 0, 0]
    assert seen.sum == 0.0


@pytest.mark.parametrize("many", [1, 2, 3, 4, 10])
def test_values_on_a_bound_count_in_its_bucket_however_many_there_are(many: int) -> None:
    for place, bound in enumerate(BOUNDS):
        seen = Distribution(BOUNDS)
        seen.observe_all([bound] * many)
        assert seen.counts[place] == many
        assert sum(seen.counts) == many


@pytest.mark.parametrize("bounds", [BOUNDS, ITL_BOUNDS, (0.5,)])
@settings(deadline=None)
@given(batches=st.lists(st.lists(SECONDS, max_size=400), max_size=4))
def test_several_values_at_once_count_as_each_alone(bounds: tuple[float, ...], batches: list[list[float]]) -> None:
    together, alone = Distribution(bounds), Distribution(bounds)
    for batch in batches:
        for value in batch:
            alone.observe(value)
        together.observe_all(list(batch))
    assert together.counts == alone.counts
    assert together.sum == pytest.approx(alone.sum)


def test_a_record_without_tokens_has_no_token_times() -> None:
    record = RequestRecord(endpoint="chat", started=10.0)
    assert record.ttft is None
    assert record.tpot is None


@pytest.mark.parametrize(("tokens", "tpot"), [(0, None), (1, None), (2, 2.0), (5, 0.5)])
def test_the_time_per_token_is_the_mean_of_the_gaps(tokens: int, tpot: float | None) -> None:
    record = RequestRecord(endpoint="chat", started=10.0, first_token=11.0, last_token=13.0, tokens=tokens)
    assert record.ttft == 1.0
    assert record.tpot == tpot
