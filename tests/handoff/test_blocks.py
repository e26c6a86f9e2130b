"""The block ids of a hand-off, short and long."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pd_proxy.decoding import Undecodable
from pd_proxy.errors import HandoffInvalid
from pd_proxy.handoff.blocks import block_counts, check_blocks

LONG = list(range(1000, 2000))


def raw(value: object, separators: tuple[str, str] = (",", ":")) -> msgspec.Raw:
    return msgspec.Raw(json.dumps(value, separators=separators).encode())


@pytest.mark.parametrize(
    ("ids", "counts"),
    [
        ([[1]], [1]),
        ([[1, 2], [], [3]], [2, 0, 1]),
        ([LONG], [1000]),
        ([LONG, LONG[:7], []], [1000, 7, 0]),
        ([[], LONG], [0, 1000]),
    ],
)
def test_block_ids_are_counted_by_group(ids: object, counts: list[int]) -> None:
    assert block_counts(raw(ids)) == counts
    assert block_counts(raw(ids, (", ", ": "))) == counts
    check_blocks(raw(ids))


@pytest.mark.parametrize("ids", [[1, 2, 3], LONG])
def test_block_ids_of_older_engines_have_no_groups(ids: object) -> None:
    check_blocks(raw(ids))
    with pytest.raises(Undecodable):
        block_counts(raw(ids))


@pytest.mark.parametrize("ids", [[], [[]], [[], []]])
def test_an_empty_list_of_block_ids_is_refused(ids: object) -> None:
    with pytest.raises(HandoffInvalid, match="no block"):
        check_blocks(raw(ids))


@pytest.mark.parametrize(
    "ids",
    [
        None,
        7,
        "ids",
        {},
        [[-1]],
        [[1.5]],
        [["1"]],
        [[None]],
        [1, [2]],
        [[1], 2],
        [[[1]]],
        [[*LONG, -1]],
        [[*LONG, 1.5]],
        [[*LONG, None]],
        [[*LONG, [1]]],
        [LONG, 7, [1]],
        [LONG, 7],
        [7, LONG],
        [[LONG]],
        [[1], [LONG]],
    ],
)
def test_invalid_block_ids_are_refused(ids: object) -> None:
    with pytest.raises(HandoffInvalid, match="not usable"):
        check_blocks(raw(ids))


_ids = st.integers(0, 10**6)
_odd = st.one_of(
    st.integers(-3, 3), st.floats(allow_nan=False, allow_infinity=False), st.none(), st.lists(_ids, max_size=2)
)


@given(st.lists(st.lists(_ids, max_size=3), max_size=3), st.lists(_odd, max_size=2), st.lists(_odd, max_size=2))
def test_long_and_short_are_judged_alike(groups: list[list[int]], inner: list[object], outer: list[object]) -> None:
    """Long lists are checked by other code than short ones."""
    value = [[1000, *inner], *groups, *outer]
    long = [[*LONG, *inner], *groups, *outer]
    try:
        counts: list[int] | None = block_counts(raw(value))
    except Undecodable:
        counts = None
    if counts is None:
        with pytest.raises(Undecodable):
            block_counts(raw(long))
    else:
        assert block_counts(raw(long)) == [counts[0] + 999, *counts[1:]]
