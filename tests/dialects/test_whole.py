"""Answers in one piece, and bodies that are not answers."""

from __future__ import annotations

import pytest
from pd_proxy.dialects.whole import decode_whole, what_is_missing


@pytest.mark.parametrize(
    "choices",
    [
        b'[{"message":{"content":"a"}}]',
        b'[{"message":{"content":null,"tool_calls":[]}}]',
        b'[{"text":""}]',
        b'[{"index":0,"token_ids":[1,2]}]',
    ],
)
def test_nothing_is_missing_in_choices_with_an_answer(choices: bytes) -> None:
    assert what_is_missing(decode_whole(b'{"choices":' + choices + b"}"), "choices") == ""


@pytest.mark.parametrize(
    "answer",
    [
        b"{}",
        b'{"choices":[]}',
        b'{"choices":null}',
        b'{"choices":{}}',
        b'{"choices":"x"}',
        b'{"choices":[1]}',
        b'{"choices":[null]}',
        b'{"choices":[{}]}',
        b'{"choices":[{"message":null}]}',
        b'{"choices":[{"message":"a"}]}',
        b'{"choices":[{"text":null}]}',
        b'{"choices":[{"text":"a"},{}]}',
        b'{"content":[]}',
    ],
)
def test_choices_without_an_answer_are_not_one(answer: bytes) -> None:
    assert what_is_missing(decode_whole(answer), "choices")


@pytest.mark.parametrize("member", ["content", "output"])
def test_answers_of_other_apis_have_a_list(member: str) -> None:
    assert what_is_missing(decode_whole(b'{"%b":[]}' % member.encode()), member) == ""
    for value in (b"null", b'"a"', b"{}"):
        assert what_is_missing(decode_whole(b'{"%b":%b}' % (member.encode(), value)), member)
    assert what_is_missing(decode_whole(b"{}"), member)
