"""The stages of a request's life, and their table of transitions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pd_proxy.telemetry.records import TRANSITIONS, RequestRecord, Stage
from pd_proxy.transitions import ImpossibleTransition

WORDS = {"admission", "encode", "prefill", "decode", "stream"}
"""Those of docs/logs.md."""


@given(st.lists(st.sampled_from(Stage)))
def test_transitions_of_the_table_are_made_and_all_others_raise(stages: list[Stage]) -> None:
    record = RequestRecord("chat")
    for stage in stages:
        before = record.stage, record.where
        if stage in TRANSITIONS[record.stage]:
            record.reach(stage)
            assert record.stage is stage
        else:
            with pytest.raises(ImpossibleTransition):
                record.reach(stage)
            assert (record.stage, record.where) == before
        assert record.where in WORDS


@given(st.lists(st.sampled_from([stage for stage in Stage if stage is not Stage.DONE])))
def test_the_stage_shown_of_an_ended_request_is_the_one_before_its_end(stages: list[Stage]) -> None:
    record = RequestRecord("chat")
    for stage in stages:
        before = record.where
        if stage not in TRANSITIONS[record.stage]:
            continue
        if stage is Stage.PLACED:
            record.placed("decode", "http://backend")
            assert record.where == before
        else:
            record.reach(stage)
    before = record.where
    record.end(1.0)
    assert (record.stage, record.where, record.ended) == (Stage.DONE, before, 1.0)


@given(st.lists(st.sampled_from(Stage)), st.sampled_from(["prefill", "decode", "mixed"]))
def test_another_try_of_a_broken_stream_keeps_the_request_resuming(stages: list[Stage], pool: str) -> None:
    record = RequestRecord("chat")
    for stage in stages:
        if stage in TRANSITIONS[record.stage]:
            record.reach(stage)
    before = record.stage
    if before is Stage.RESUMING or Stage.PLACED in TRANSITIONS[before]:
        record.placed(pool, "http://backend")
        assert record.stage is (before if before is Stage.RESUMING else Stage.PLACED)
    else:
        with pytest.raises(ImpossibleTransition):
            record.placed(pool, "http://backend")
