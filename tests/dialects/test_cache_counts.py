"""Prefill's counts in the usage of decode's answer, with the names of each API."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pd_proxy.dialects.cache_counts import CacheCounts
from pd_proxy.dialects.usage import read_usage


def details(**told: Any) -> dict[str, Any]:
    return {"prompt_tokens": 64, "completion_tokens": 5, "total_tokens": 69, "prompt_tokens_details": told}


def turns(cached: int, **told: Any) -> dict[str, Any]:
    return {"input_tokens": 64, "input_tokens_details": {"cached_tokens": cached, **told}, "output_tokens": 5}


@pytest.mark.parametrize(
    ("cached", "written", "usage", "expected"),
    [
        (7, None, details(cached_tokens=63), details(cached_tokens=7)),
        (0, None, details(cached_tokens=63), details(cached_tokens=0)),
        (99, None, details(cached_tokens=63), details(cached_tokens=64)),
        (7, 57, details(cached_tokens=63, created_cache_tokens=1), details(cached_tokens=7, created_cache_tokens=57)),
        (7, 99, details(cached_tokens=63, created_cache_tokens=1), details(cached_tokens=7, created_cache_tokens=57)),
        (7, None, details(cached_tokens=63, cache_write_tokens=1), details(cached_tokens=7, cache_write_tokens=None)),
        (7, 57, details(cached_tokens=63, cache_write_tokens=1), details(cached_tokens=7, cache_write_tokens=57)),
        (7, 57, details(cached_tokens=63), details(cached_tokens=7, created_cache_tokens=57)),
        (None, None, details(cached_tokens=63, audio_tokens=0), details(audio_tokens=0)),
        (None, None, {**details(), "prompt_tokens_details": None}, {**details(), "prompt_tokens_details": None}),
        (7, None, {**details(), "prompt_tokens_details": None}, details(cached_tokens=7)),
        (7, None, {"completion_tokens": 5}, {"completion_tokens": 5}),
        (7, None, details(cached_tokens=63) | {"prompt_tokens": -1}, details(cached_tokens=63) | {"prompt_tokens": -1}),
        (7, None, turns(63, cached_tokens_per_turn=[63]), turns(7, cached_tokens_per_turn=[7])),
        (7, None, turns(63, cached_tokens_per_turn=[60, 3]), turns(7, cached_tokens_per_turn=[60, 3])),
        (7, 57, turns(63, cache_write_tokens=0), turns(7, cache_write_tokens=57)),
        (None, None, turns(63), turns(0)),
        (7, None, {"input_tokens": 64, "output_tokens": 5},
         {"input_tokens": 57, "output_tokens": 5, "cache_read_input_tokens": 7}),
        (7, 50, {"input_tokens": 1, "cache_read_input_tokens": 62, "cache_creation_input_tokens": 1},
         {"input_tokens": 7, "cache_read_input_tokens": 7, "cache_creation_input_tokens": 50}),
        (7, None, {"input_tokens": 1, "cache_read_input_tokens": 62, "cache_creation_input_tokens": 1},
         {"input_tokens": 57, "cache_read_input_tokens": 7}),
        (None, None, {"input_tokens": 1, "cache_read_input_tokens": 63}, {"input_tokens": 64}),
    ],
)  # fmt: skip
def test_counts_have_the_names_of_each_api(
    cached: int | None, written: int | None, usage: dict[str, Any], expected: dict[str, Any]
) -> None:
    answer = {"id": "a", "usage": usage, "choices": []}
    told = CacheCounts(cached, written).into(json.dumps(answer).encode())
    assert json.loads(told) == {**answer, "usage": expected}
    inside = CacheCounts(cached, written).into(json.dumps({"response": answer}).encode(), "response")
    assert json.loads(inside) == {"response": {**answer, "usage": expected}}


@pytest.mark.parametrize(
    "payload",
    [b"", b"{", b"[]", b"{}", b'{"usage":null}', b'{"usage":5}', b'{"usage":[]}', b'{"usage":{"a":1}}', b"\xff"],
)
def test_an_answer_without_usage_is_not_changed(payload: bytes) -> None:
    assert CacheCounts(7, 57).into(payload) is payload
    assert CacheCounts(7, 57).into(payload, "response") is payload


def test_counts_that_are_right_are_not_written_again() -> None:
    payload = b'{"usage": {"prompt_tokens": 64, "prompt_tokens_details": {"cached_tokens": 7}}}'
    assert CacheCounts(7).into(payload) is payload


@pytest.mark.parametrize(
    ("usage", "told", "counts"),
    [
        (details(cached_tokens=7), None, CacheCounts(7)),
        (details(cached_tokens=7), 9, CacheCounts(7)),
        (details(), 9, CacheCounts(9, private=True)),
        ({"prompt_tokens": 64}, 9, CacheCounts(9, private=True)),
        ({"prompt_tokens": 64}, None, CacheCounts()),
        (details(cached_tokens=7, created_cache_tokens=57), None, CacheCounts(7, 57)),
        (turns(7, cache_write_tokens=57), None, CacheCounts(7, 57)),
        (
            {"input_tokens": 7, "cache_read_input_tokens": 7, "cache_creation_input_tokens": 50},
            None,
            CacheCounts(7, 50),
        ),
    ],
)
def test_prefills_counts_are_read_in_each_apis_words(
    usage: dict[str, Any], told: int | None, counts: CacheCounts
) -> None:
    assert CacheCounts.of(read_usage(json.dumps(usage).encode()), told) == counts


def test_without_a_usage_the_hand_offs_number_is_known() -> None:
    assert CacheCounts.of(None, 3) == CacheCounts(3, private=True)


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        (details(cached_tokens=63), details(cached_tokens=7)),
        (details(), details()),
        ({"prompt_tokens": 64}, {"prompt_tokens": 64}),
        ({"input_tokens": 1, "cache_read_input_tokens": 63}, {"input_tokens": 57, "cache_read_input_tokens": 7}),
        ({"input_tokens": 64, "output_tokens": 5}, {"input_tokens": 64, "output_tokens": 5}),
    ],
)
def test_counts_from_the_hand_off_alone_are_not_shown_where_engines_show_none(
    usage: dict[str, Any], expected: dict[str, Any]
) -> None:
    told = CacheCounts(7, private=True).into(json.dumps({"usage": usage}).encode())
    assert json.loads(told) == {"usage": expected}
