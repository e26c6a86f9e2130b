"""Lists and objects split value by value."""

from __future__ import annotations

import json
from itertools import islice
from time import process_time
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pd_proxy.decoding import Undecodable
from pd_proxy.requests import json_scan as scan

BLANKS = st.text(" \t\r\n", max_size=3)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture
def nothing_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "_SHORT", -1)
    monkeypatch.setattr(scan, "_FEW", -1)


def written(values: list[bytes], blanks: list[str], brackets: bytes) -> bytes:
    """Values in brackets, with blanks in every place where JSON allows them."""
    gap = iter(text.encode() for text in blanks * (len(values) + 2))
    inner = b",".join(next(gap) + value + next(gap) for value in values)
    return next(gap) + brackets[:1] + inner + brackets[1:] + next(gap)


@given(st.lists(VALUES, max_size=6), st.lists(BLANKS, min_size=5, max_size=5), st.booleans())
def test_elements_are_those_of_the_list(values: list[Any], blanks: list[str], escaped: bool) -> None:
    texts = [json.dumps(value, ensure_ascii=escaped).encode() for value in values]
    assert [bytes(element) for element in scan.elements(written(texts, blanks, b"[]"))] == texts


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.text(max_size=6), VALUES), max_size=6),
    st.lists(BLANKS, min_size=5, max_size=5),
    st.booleans(),
)
def test_members_are_those_that_a_decoder_finds(items: list[tuple[str, Any]], blanks: list[str], escaped: bool) -> None:
    texts = [
        f"{json.dumps(name, ensure_ascii=escaped)}{blanks[0]}:{blanks[1]}{json.dumps(value)}".encode()
        for name, value in items
    ]
    raw = written(texts, blanks, b"{}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "_SHORT", -1)
        patch.setattr(scan, "_FEW", -1)
        found = scan.members(raw)
    expected = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
    assert {name: bytes(value) for name, value in found.items()} == {
        name: bytes(value) for name, value in expected.items()
    }


@pytest.mark.usefixtures("nothing_is_short")
@pytest.mark.parametrize(
    "raw",
    [
        *(b"", b" ", b"{", b'{"a"', b'{"a":', b'{"a":1', b'{"a":1,', b'{"a":1,}', b"{,}", b'{"a":1}x', b'{"a":1}{}'),
        *(b'{"a":1 2}', b'{"a":[}', b'{"a":{]}', b"{'a':1}", b"{a:1}", b'{"a":nope}', b'{"a":tru}', b'{"a":01}'),
        *(b'{"a":"b}', b'{"a\\":1}', b'{"\xff":1}', b'{"\\ud800":1}', b"[1]", b'"a"', b"1", b"\x00", b'{"a":1}\x00'),
        b'{"a":' + b"[" * 100_000,
    ],
)
def test_a_value_that_is_no_object_is_undecodable(raw: bytes) -> None:
    with pytest.raises(Undecodable):
        scan.members(raw)


@pytest.mark.parametrize("raw", [b"[", b"[1", b"[1,", b"[1,]", b"[,]", b"[1 2]", b"[nope]", b"[[}]", b'["a]', b"[1}"])
def test_a_value_that_is_no_list_is_undecodable(raw: bytes) -> None:
    with pytest.raises(Undecodable):
        list(scan.elements(raw))


@pytest.mark.parametrize("raw", [b"", b"{}", b"5", b'"[1]"', b"null", b"[]", b" [ ] "])
def test_a_value_of_another_type_has_no_elements(raw: bytes) -> None:
    assert list(scan.elements(raw)) == []


@pytest.mark.usefixtures("nothing_is_short")
def test_of_two_members_with_one_name_the_last_is_found() -> None:
    assert bytes(scan.members(b'{"a":1,"\\u0061":2}')["a"]) == b"2"


def test_an_object_with_more_members_than_the_bound_is_refused() -> None:
    for size in (10, 100_000):
        wide = b"{" + b",".join(b'"%d":0' % number for number in range(size)) + b"}"
        with pytest.raises(scan.TooMany):
            scan.members(wide, most=9)
    assert len(scan.members(b'{"a":0,"b":1}', most=2)) == 2


def test_a_reader_that_stops_early_does_not_scan_the_rest() -> None:
    wide = b"[" + b"{}," * 1_000_000 + b"{}]"
    start = process_time()
    assert len(list(islice(scan.elements(wide), 10))) == 10
    assert process_time() - start < 0.05
    padded = b'{"a":1%b,"b":2}' % (b" " * 1_000_000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "_FEW", -1)
        assert [bytes(value) for value in scan.members(padded).values()] == [b"1", b"2"]
