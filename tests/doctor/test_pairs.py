"""The pairs that the doctor tries."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pd_proxy.doctor.pairs import choose_pairs


def anything(prefill: str, decode: str) -> bool:
    return True


def names(prefix: str, count: int) -> list[str]:
    return [f"{prefix}{number}" for number in range(count)]


@given(st.integers(0, 7), st.integers(0, 7), st.integers(0, 60))
def test_each_engine_is_in_a_pair_before_any_is_in_more_pairs_than_needed(p: int, d: int, most: int) -> None:
    prefills, decodes = names("p", p), names("d", d)
    pairs = choose_pairs(prefills, decodes, anything, most)
    assert len(pairs) == len(set(pairs)) == min(most, p * d)
    if p and d and most >= max(p, d):
        assert {one for pair in pairs[: max(p, d)] for one in pair} == {*prefills, *decodes}


def test_the_same_engines_make_the_same_pairs() -> None:
    assert choose_pairs(names("p", 2), names("d", 3), anything, 4) == [
        ("p0", "d0"),
        ("p1", "d1"),
        ("p0", "d2"),
        ("p0", "d1"),
    ]


@pytest.mark.parametrize("allowed", [{("p0", "d2"), ("p1", "d0")}, {("p1", "d1")}, set()])
def test_only_allowed_pairs_are_chosen(allowed: set[tuple[str, str]]) -> None:
    pairs = choose_pairs(names("p", 2), names("d", 3), lambda p, d: (p, d) in allowed, 9)
    assert set(pairs) == allowed
