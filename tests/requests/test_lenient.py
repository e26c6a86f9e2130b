"""Numbers and flags are read as pydantic reads them, by which engines read the same request."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pd_proxy.requests.lenient import as_bool, as_int
from pydantic import TypeAdapter, ValidationError

SPELT = st.from_regex(r"[ +-]?[0-9_]{0,4}(\.0{0,2})?[ ]?", fullmatch=True)
WORDS = st.sampled_from(
    ["true", "TRUE", "False", "yes", "no", "on", "OFF", "t", "f", "y", "n", "1", "0", "2", "", " on"]
)
NUMBERS = st.integers(-(2**53) + 1, 2**53 - 1)
VALUES = NUMBERS | NUMBERS.map(float) | st.floats(-1e6, 1e6) | st.booleans() | SPELT | WORDS | st.just([]) | st.just({})


def engine(kind: Any, value: Any) -> Any:
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError:
        return None


@given(VALUES)
def test_any_value_is_read_as_pydantic_reads_it(value: Any) -> None:
    raw = json.dumps(value).encode()
    assert as_int(raw) == engine(int, value)
    assert as_bool(raw) is engine(bool, value)


@pytest.mark.parametrize(
    "raw",
    [b"9007199254740993.0", b"1e300", b'"%b"' % (b"9" * 25), b'"\xff"', b"1" * 5000, b"[" * 100_000, b"", b"nope"],
)
def test_inexact_and_invalid_values_are_none(raw: bytes) -> None:
    assert as_int(raw) is None
    assert as_bool(raw) is None
