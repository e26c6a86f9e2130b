"""The usage that engines report."""

from __future__ import annotations

import msgspec
import pytest
from pd_proxy.dialects.usage import read_usage


@pytest.mark.parametrize(
    ("raw", "numbers"),
    [
        (b'{"prompt_tokens":5,"completion_tokens":2}', (5, 2, 0)),
        (b'{"prompt_tokens":5,"completion_tokens":2,"prompt_tokens_details":null}', (5, 2, 0)),
        (b'{"prompt_tokens_details":{"cached_tokens":3,"audio_tokens":0},"total_tokens":7}', (None, None, 3)),
        (b'{"prompt_tokens_details":{"cached_tokens":null}}', (None, None, 0)),
        (b"{}", (None, None, 0)),
    ],
)
def test_usage_is_read_as_far_as_it_is_there(raw: bytes, numbers: tuple[int | None, int | None, int]) -> None:
    usage = read_usage(raw)
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == numbers


@pytest.mark.parametrize("raw", [b"", b"null", b"[]", b'"x"', b'{"prompt_tokens":"5"}', b'{"completion_tokens":1.5}'])
def test_usage_that_is_none_is_none(raw: bytes) -> None:
    assert read_usage(msgspec.Raw(raw)) is None


HUGE = b"1" + b"0" * 400


@pytest.mark.parametrize(
    "number", [HUGE, b"-1", b"-" + HUGE, b"9007199254740992", b"1.5", b"1e3", b"true", b'"7"', b"[7]"]
)
@pytest.mark.parametrize(
    "usage",
    [
        b'{"prompt_tokens":%b,"completion_tokens":2}',
        b'{"prompt_tokens":5,"completion_tokens":%b}',
        b'{"prompt_tokens":5,"prompt_tokens_details":{"cached_tokens":%b}}',
        b'{"input_tokens":%b,"output_tokens":2}',
        b'{"input_tokens":5,"output_tokens":%b}',
        b'{"input_tokens":5,"input_tokens_details":{"cached_tokens":%b}}',
        b'{"input_tokens":5,"output_tokens":2,"cache_read_input_tokens":%b}',
        b'{"input_tokens":5,"output_tokens":2,"cache_creation_input_tokens":%b}',
    ],
)
def test_usage_with_a_number_that_counts_no_tokens_is_none(usage: bytes, number: bytes) -> None:
    assert read_usage(msgspec.Raw(usage % number)) is None


def test_usage_whose_sum_counts_no_tokens_is_none() -> None:
    most = b"9007199254740991"
    assert read_usage(b'{"prompt_tokens":%b}' % most) is not None
    assert read_usage(b'{"input_tokens":%b,"cache_read_input_tokens":%b}' % (most, most)) is None


@pytest.mark.parametrize(
    "raw",
    [
        b'{"prompt_tokens":5,"prompt_tokens_details":{"cached_tokens":9}}',
        b'{"input_tokens":5,"input_tokens_details":{"cached_tokens":9}}',
    ],
)
def test_no_more_of_a_prompt_is_cached_than_there_is(raw: bytes) -> None:
    usage = read_usage(raw)
    assert usage is not None
    assert usage.cached_tokens == 5
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == 5


# What others say of a refusal
