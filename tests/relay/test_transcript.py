"""What a transcript keeps of an answer, and where the answer may be continued."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pd_proxy.relay.transcript import Transcript

from .streams import event

CHAT = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 5, "model": "m"}
TEXT = {"id": "cmpl-1", "object": "text_completion", "created": 5, "model": "m"}
FIRST = event({**CHAT, "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})


def opened(prompt: bytes = b"1,2,3", limit: int = 1 << 20) -> Transcript:
    transcript = Transcript(limit=limit)
    transcript.open(FIRST, prompt)
    return transcript


def events_of(events: bytes) -> list[dict[str, Any]]:
    """What events carry, `[DONE]` aside, which must be the last."""
    *found, done, nothing = events.split(b"\n\n")
    assert (done, nothing) == (b"data: [DONE]", b"")
    return [json.loads(one.removeprefix(b"data: ")) for one in found]


# Where it may be cut


def test_an_answer_without_tokens_is_cut_behind_its_prompt() -> None:
    transcript = opened()
    assert transcript.continuable
    assert (transcript.said, transcript.total, transcript.prompt_tokens) == (0, 0, 3)
    assert transcript.truncate() == b"1,2,3"


def test_a_prompt_of_one_token_is_one_token() -> None:
    assert opened(b"7").prompt_tokens == 1
    assert opened(b"7").truncate() == b"7"


def test_an_answer_is_cut_behind_the_last_token_with_text() -> None:
    transcript = opened()
    for ids, has_text in ((b"5", True), (b"6", False), (b"7", True), (b"8", False), (b"9", False)):
        transcript.note(ids, "x" if has_text else "")
    assert (transcript.said, transcript.total) == (3, 5)
    assert transcript.truncate() == b"1,2,3,5,6,7"
    assert (transcript.said, transcript.total) == (3, 3)


def test_tokens_noted_after_a_cut_come_behind_it() -> None:
    transcript = opened()
    transcript.note(b"5", "x")
    transcript.note(b"6", None)
    transcript.truncate()
    transcript.note(b"6", None)
    transcript.note(b"7", "x")
    assert transcript.truncate() == b"1,2,3,5,6,7"


def test_fresh_ids_have_text_and_follow_the_ids_noted_before() -> None:
    transcript = opened()
    transcript.note(b"5", None)
    transcript.fresh += [b"6", b"7"]
    transcript.note(b"8", None)
    assert transcript.fresh == []
    assert transcript.truncate() == b"1,2,3,5,6,7"


@pytest.mark.parametrize("look", ["said", "total"])
def test_fresh_ids_count(look: str) -> None:
    transcript = opened()
    transcript.fresh += [b"6", b"7,8"]
    assert getattr(transcript, look) == 3


def test_fresh_stays_the_same_list() -> None:
    """Others hold it."""
    transcript = opened()
    fresh = transcript.fresh
    fresh.append(b"5")
    transcript.fold()
    fresh.append(b"6")
    assert transcript.fresh is fresh
    assert transcript.truncate() == b"1,2,3,5,6"


@pytest.mark.parametrize(
    ("events", "unsure"),
    [
        ([(b"5", True)], False),
        ([(b"5,6", True)], True),
        ([(b"5,6", True), (b"7", False)], True),
        ([(b"5,6", True), (b"7", True)], False),
        ([(b"5", True), (b"6,7", False)], False),
    ],
)
@pytest.mark.parametrize("fresh", [False, True])
def test_several_tokens_with_the_latest_text_make_it_unsure(
    events: list[tuple[bytes, bool]], unsure: bool, fresh: bool
) -> None:
    transcript = opened()
    for ids, has_text in events:
        if fresh and has_text:
            transcript.fresh.append(ids)
        else:
            transcript.note(ids, "x" if has_text else "")
    transcript.fold()
    assert transcript.unsure is unsure


def test_the_last_token_can_be_dropped_after_all() -> None:
    transcript = opened()
    transcript.note(b"5", "x")
    transcript.note(b"6,17", "x")
    transcript.note(b"8", None)
    transcript.drop_last()
    assert transcript.said == 2
    assert transcript.truncate() == b"1,2,3,5,6"
    transcript.drop_last()
    assert transcript.truncate() == b"1,2,3,5"
    for _ in range(2):  # there is nothing left to drop in the end
        transcript.drop_last()
        assert transcript.truncate() == b"1,2,3"
        assert transcript.said == 0


def test_dropping_the_last_token_counts_fresh_ones() -> None:
    transcript = opened()
    transcript.fresh += [b"5", b"6"]
    transcript.drop_last()
    assert transcript.truncate() == b"1,2,3,5"


def test_the_end_is_the_last_tokens_whose_text_was_sent() -> None:
    transcript = opened()
    assert transcript.end() == b""
    transcript.note(b"5", "x")
    transcript.note(b"6", None)
    assert transcript.end() == b"5"
    transcript.fresh += [b"%d" % number for number in range(100, 200)]
    found = transcript.end().split(b",")
    assert found == [b"%d" % number for number in range(200 - len(found), 200)]
    assert 4 <= len(found) <= 100


EVENTS = st.lists(
    st.tuples(
        st.lists(st.integers(0, 200_000), max_size=3).map(lambda ids: ",".join(map(str, ids)).encode()),
        st.sampled_from(["empty", "text", "fresh", "cut", "fold"]),
    ),
    max_size=40,
)


@given(prompt=st.lists(st.integers(0, 200_000), min_size=1, max_size=5), events=EVENTS)
def test_the_cut_is_behind_the_last_text_whatever_came_before(
    prompt: list[int], events: list[tuple[bytes, str]]
) -> None:
    start = ",".join(map(str, prompt)).encode()
    transcript = opened(start)
    ids: list[bytes] = []
    sent = 0
    for said, kind in events:
        if kind == "cut":
            transcript.truncate()
            del ids[sent:]
        elif kind == "fold":
            transcript.fold()
        elif kind == "empty":
            transcript.note(said, "")
            ids += said.split(b",") if said else []
        elif said:
            ids += said.split(b",")
            sent = len(ids)
            if kind == "fresh":
                transcript.fresh.append(said)
            else:
                transcript.note(said, "x")
    assert transcript.total == len(ids)
    assert transcript.said == sent
    assert transcript.truncate() == b",".join([start, *ids[:sent]])
    assert transcript.inexact == ""


# Reasons why an answer cannot be continued exactly


def test_text_without_ids_leaves_nothing_to_continue() -> None:
    transcript = opened()
    transcript.note(b"5", "x")
    transcript.note(b"", None)
    assert transcript.inexact == ""
    transcript.note(b"", "x")
    assert transcript.inexact == "no_token_ids"
    assert not transcript.continuable
    assert (transcript.said, transcript.total, transcript.prompt_tokens) == (0, 0, 0)


def test_an_answer_whose_prompt_has_no_ids_cannot_be_continued() -> None:
    transcript = opened(b"")
    assert transcript.inexact == "no_token_ids"
    assert not transcript.continuable
    transcript.fresh.append(b"5")
    transcript.fold()
    assert transcript.fresh == []
    assert transcript.truncate() == b""


@pytest.mark.parametrize("reason", ["tool_calls", "reasoning", "penalties"])
def test_only_the_first_reason_is_kept_and_most_leave_something_to_go_on_from(reason: str) -> None:
    transcript = opened()
    transcript.note(b"5", "x")
    transcript.mark_inexact(reason)
    transcript.mark_inexact("seed")
    assert transcript.inexact == reason
    assert transcript.continuable
    assert transcript.truncate() == b"1,2,3,5"
    transcript.mark_inexact("too_long")
    assert transcript.inexact == reason
    assert not transcript.continuable


def test_a_reason_in_the_request_stays() -> None:
    transcript = Transcript("penalties")
    transcript.open(FIRST, b"1,2")
    assert transcript.inexact == "penalties"
    assert transcript.continuable


def test_fresh_ids_are_dropped_with_the_rest() -> None:
    transcript = opened()
    transcript.fresh += [b"5", b"6"]
    transcript.mark_inexact("no_token_ids")
    transcript.fold()
    assert transcript.truncate() == b""
    assert transcript.total == 0


@pytest.mark.parametrize("fresh", [False, True])
def test_an_answer_of_just_the_limit_is_kept_and_a_longer_one_is_not(fresh: bool) -> None:
    transcript = opened(b"1,2,3", limit=9)  # 1,2,3,5,6
    for ids in (b"5", b"6"):
        if fresh:
            transcript.fresh.append(ids)
        else:
            transcript.note(ids, "x")
    assert transcript.truncate() == b"1,2,3,5,6"
    assert transcript.inexact == ""
    if fresh:
        transcript.fresh.append(b"7")
        transcript.fold()
    else:
        transcript.note(b"7", None)
    assert transcript.inexact == "too_long"
    assert not transcript.continuable
    assert transcript.total == 0


@pytest.mark.parametrize(("limit", "reason"), [(5, ""), (4, "too_long")])
def test_a_prompt_longer_than_the_limit_is_not_kept(limit: int, reason: str) -> None:
    transcript = opened(b"1,2,3", limit=limit)
    assert transcript.inexact == reason
    assert transcript.continuable is not bool(reason)


# Text


TOKENS = st.text(min_size=1, max_size=6) | st.sampled_from(['"', "\\", "\n", "\U0001f600", "\x00", "</"])


@given(st.lists(st.tuples(TOKENS, st.sampled_from(["fresh", "noted", "empty", "fold", "cut"])), max_size=20))
def test_the_text_is_what_was_read_however_it_came(events: list[tuple[str, str]]) -> None:
    transcript = Transcript(with_text=True)
    transcript.open(FIRST, b"1")
    expected = ""
    for said, kind in events:
        if kind == "fresh":
            assert transcript.fresh_text is not None
            transcript.fresh.append(b"5")
            transcript.fresh_text.append(json.dumps(said).encode()[1:-1])
        elif kind == "noted":
            transcript.note(b"5", said)
        elif kind == "empty":
            transcript.note(b"5", "")
        elif kind == "fold":
            transcript.fold()
        else:
            transcript.truncate()
        expected += said if kind in ("fresh", "noted") else ""
    assert transcript.text == expected
    assert transcript.truncate() == b"1" + b",5" * transcript.said


def test_the_text_is_not_kept_unless_it_was_wanted() -> None:
    transcript = opened()
    transcript.note(b"5", "a")
    assert transcript.fresh_text is None
    assert transcript.text is None


@pytest.mark.parametrize("fresh", [False, True])
def test_the_text_counts_for_the_limit(fresh: bool) -> None:
    transcript = Transcript(limit=20, with_text=True)
    transcript.open(FIRST, b"1")
    for _ in range(2):
        assert transcript.inexact == ""
        if fresh:
            assert transcript.fresh_text is not None
            transcript.fresh.append(b"5")
            transcript.fresh_text.append(b"x" * 15)
        else:
            transcript.note(b"5", "x" * 15)
        transcript.fold()
    transcript.note(b"5", "")
    assert transcript.inexact == "too_long"
    assert not transcript.continuable


def test_text_is_not_kept_once_nothing_is_left() -> None:
    transcript = Transcript(with_text=True)
    transcript.open(FIRST, b"1")
    transcript.note(b"5", "a")
    transcript.mark_inexact("too_long")
    assert transcript.fresh_text is not None
    transcript.fresh.append(b"6")
    transcript.fresh_text.append(b"b")
    transcript.fold()
    assert transcript.fresh_text == []
    assert transcript.text == ""


def test_the_answer_is_its_ids_up_to_the_last_token_whose_text_was_sent() -> None:
    transcript = opened()
    assert transcript.answer() == b""
    transcript.note(b"5", "x")
    transcript.fresh.append(b"6,7")
    transcript.note(b"8", "")
    assert transcript.answer() == b"5,6,7"


# The last words


def test_the_identity_is_what_all_events_share() -> None:
    transcript = Transcript()
    transcript.open(
        event({**CHAT, "system_fingerprint": None, "prompt_token_ids": [1], "choices": [], "usage": None}), b"1"
    )
    assert {name: json.loads(bytes(value)) for name, value in transcript.identity.items()} == {
        **CHAT,
        "system_fingerprint": None,
    }


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_the_identity_is_found_whatever_the_line_ends(end: bytes) -> None:
    transcript = Transcript()
    transcript.open((b"event: x\n" + FIRST).replace(b"\n", end), b"1")
    assert json.loads(bytes(transcript.identity["id"])) == "chatcmpl-1"


def test_the_last_word_alone_when_nothing_else_is_wanted() -> None:
    assert opened().closing(usage=False) == b"data: [DONE]\n\n"


def test_usage_counts_every_token_of_prompt_and_answer() -> None:
    transcript = opened()
    transcript.note(b"5", "x")
    transcript.fresh += [b"6,7"]
    transcript.fold()
    transcript.note(b"8", None)  # the end of sequence
    (usage,) = events_of(transcript.closing(usage=True))
    counts = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    assert usage == {**CHAT, "choices": [], "usage": counts}


@pytest.mark.parametrize(("head", "said"), [(CHAT, {"delta": {}}), (TEXT, {"text": ""})])
@pytest.mark.parametrize("usage", [True, False])
def test_a_finish_reason_is_given_in_the_answers_own_form(
    head: dict[str, Any], said: dict[str, Any], usage: bool
) -> None:
    transcript = Transcript()
    transcript.open(event({**head, "choices": []}), b"1")
    transcript.note(b"5", "x")
    first, *rest = events_of(transcript.closing(finish="length", usage=usage))
    assert first == {**head, "choices": [{"index": 0, **said, "logprobs": None, "finish_reason": "length"}]}
    assert len(rest) == usage


@pytest.mark.parametrize("prompt", [b'1,"a"', b"1,[2]", b"1],2"])
def test_a_prompt_that_is_not_all_numbers_leaves_nothing_to_go_on_from(prompt: bytes) -> None:
    transcript = opened(prompt)
    transcript.note(b"5", "x")
    transcript.verify()
    assert transcript.inexact == "no_token_ids"
    assert not transcript.continuable


def test_tokens_that_are_not_all_numbers_leave_nothing_to_go_on_from() -> None:
    transcript = opened()
    transcript.note(b"5,{}", "x")
    transcript.verify()
    assert transcript.inexact == "no_token_ids"


def test_numbers_stay_what_they_are() -> None:
    transcript = opened()
    transcript.note(b"5, 6", "x")
    transcript.verify()
    assert transcript.inexact == ""
    assert transcript.continuable
