"""Streams that an engine aborts under status 200: no client sees the reason, or the text in the same event."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from pd_proxy.dialects.aborts import abort_in, aborted, ends_well, is_abort
from pd_proxy.dialects.dialect import Dialect
from pd_proxy.dialects.edit import Edit
from pd_proxy.dialects.registry import DIALECTS
from pd_proxy.errors import BackendAborted, BackendBusy, BackendError, BackendFailed, BackendRejected
from pd_proxy.relay.transcript import Transcript

from tests.relay.streams import COUNTS, DONE, URL, Stream, chat, event, identity, opened, relayed, text

ROLE = chat({"role": "assistant", "content": ""})
FIRST, SECOND = chat({"content": "Hel"}), chat({"content": "lo"})
USAGE = event({"id": "chatcmpl-1", "choices": [], "usage": COUNTS})
EMPTY = chat({"content": ""}, finish_reason="abort", stop_reason=None)
WORDS: list[Any] = ["abort", "error", "cancelled", "canceled", "aborted", "ABORT", {"type": "abort", "message": "x"}]


def two(*reasons: str | None, said: str = "x") -> bytes:
    """One event with several choices."""
    choices = [
        {"index": index, "delta": {"content": said}, "finish_reason": reason} for index, reason in enumerate(reasons)
    ]
    return event({"id": "chatcmpl-1", "object": "chat.completion.chunk", "choices": choices})


ENDS = [
    EMPTY,
    text("", finish_reason=None).replace(b'"finish_reason":null', b'"finish_reason":"abort"'),
    chat({}, finish_reason="abort"),
    chat({"content": "<held>"}, finish_reason="abort"),
    chat({"role": "assistant", "content": "<held>"}, finish_reason="abort"),
    chat({"content": "<held>"}, finish_reason="abort", token_ids=[7]),
    text("<held>").replace(b'"finish_reason":null', b'"finish_reason":"abort"'),
    EMPTY.replace(b'"abort"', b'"\\u0061bort"'),
    EMPTY.replace(b'"finish_reason":', b'"finish_reason" : '),
    EMPTY.replace(b'"finish_reason"', b'"finish\\u005freason"'),
    EMPTY.replace(b"\n\n", b"\r\n\r\n"),
    b'data: {"id":"c",\ndata: "choices":[{"index":0,"delta":{"content":"<held>"},"finish_reason":"abort"}]}\n\n',
    two(None, "abort", said="<held>"),
    two("abort", None, said="<held>"),
    two("stop", "abort", said="<held>"),
    *[chat({"content": "<held>"}, finish_reason=word) for word in WORDS],
]
EDITS = [Edit(), Edit(hide_ids=True), Edit(identity=identity(id="x"), earlier_tokens=3)]


async def failed(*reads: bytes, **options: Any) -> tuple[Stream, BackendError]:
    stream = await opened(finished=False, **options)
    stream.read(*reads)
    stream.end()
    error = await stream.outcome()
    assert error is not None and not stream.client.ended
    return stream, error


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("end", ENDS)
async def test_an_abort_before_any_text_gives_the_client_nothing(end: bytes, edit: Edit) -> None:
    for reads in ([end], [end + USAGE + DONE], [ROLE, end, USAGE, DONE], [ROLE + end + USAGE + DONE]):
        stream, error = await failed(*reads, edit=edit)
        assert type(error) is BackendAborted and error.retryable and error.leaves
        assert not stream.client.started and not stream.relay.live


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("end", ENDS)
async def test_an_abort_in_mid_stream_ends_it_before_that_event(end: bytes, edit: Edit) -> None:
    shown = ROLE + FIRST + SECOND
    if edit.identity:
        shown = shown.replace(b"chatcmpl-1", b"x")
        shown = shown.replace(ROLE.replace(b"chatcmpl-1", b"x"), b"")  # the answer has begun with another leg
    for reads in ([end, USAGE, DONE], [end + USAGE + DONE], [SECOND + end, DONE], [SECOND + end + USAGE + DONE]):
        stream, error = await failed(ROLE, FIRST, *([] if SECOND in reads[0] else [SECOND]), *reads, edit=edit)
        assert type(error) is BackendAborted
        assert stream.client.body == shown
        assert not stream.transcript.finished


async def test_several_choices_on_the_fast_way_are_looked_at() -> None:
    """Two choices in one event, of which one is null as an ordinary event's is."""
    stream = await opened(finished=False, inexact="n")
    stream.read(two(None, None), two(None, None))
    stream.read(two(None, "abort"))
    assert type(await stream.outcome()) is BackendAborted
    assert stream.client.body == two(None, None) * 2


async def test_text_that_comes_with_an_abort_is_made_again() -> None:
    transcript = Transcript()
    opening = chat({"role": "assistant", "content": ""}).replace(b"}\n", b',"prompt_token_ids":[1,2]}\n')
    said = [chat({"content": word}, token_ids=[number]) for number, word in enumerate("abc", 5)]
    end = chat({"content": "\ufffd"}, token_ids=[8], finish_reason="abort")
    stream, error = await failed(opening, *said, end, USAGE, DONE, edit=Edit(hide_ids=True), transcript=transcript)
    assert type(error) is BackendAborted
    assert b"\\ufffd" not in stream.client.body and "\ufffd".encode() not in stream.client.body
    assert transcript.truncate() == b"1,2,5,6,7"


async def test_an_abort_in_the_read_of_the_first_text_leaves_nothing_behind() -> None:
    transcript = Transcript()
    opening = chat({"role": "assistant", "content": ""}).replace(b"}\n", b',"prompt_token_ids":[1,2]}\n')
    said = chat({"content": "a"}, token_ids=[5])
    stream, error = await failed(opening + said + EMPTY + DONE, edit=Edit(hide_ids=True), transcript=transcript)
    assert type(error) is BackendAborted and not stream.client.started
    assert (transcript.first, transcript.continuable, transcript.total) == (b"", False, 0)
    again = await opened(finished=False, edit=Edit(hide_ids=True), transcript=transcript)
    again.read(opening, said, chat({"content": "b"}, token_ids=[6]))
    assert transcript.truncate() == b"1,2,5,6"
    again.running.cancel()


async def test_the_word_in_a_text_is_no_abort() -> None:
    said = chat({"content": '"finish_reason":"abort"'})
    end = chat({}, finish_reason="stop")
    stream = await relayed(ROLE, said, said + said, end, DONE, finished=False)
    assert stream.client.body == ROLE + said * 3 + end + DONE


@pytest.mark.parametrize("reason", ["stop", "length", "tool_calls", "content_filter", "repetition", "function_call"])
async def test_other_ends_are_the_clients(reason: str) -> None:
    end = chat({}, finish_reason=reason)
    stream = await relayed(ROLE, FIRST, end, DONE, finished=False)
    assert stream.client.body == ROLE + FIRST + end + DONE


@pytest.mark.parametrize(
    ("status", "kind"), [(400, BackendRejected), (503, BackendBusy), (500, BackendFailed), (None, BackendAborted)]
)
async def test_a_status_beside_the_word_is_the_errors(status: int | None, kind: type[BackendError]) -> None:
    reason = {"type": "abort", "message": "too long", "status_code": status, "err_type": "BadRequestError"}
    _, error = await failed(chat({"content": ""}, finish_reason=reason), DONE)
    assert type(error) is kind


@pytest.mark.parametrize("word", WORDS)
def test_a_whole_answer_of_which_one_choice_was_given_up_is_none(word: Any) -> None:
    choices = [{"finish_reason": "stop"}, {"finish_reason": word, "message": {"content": "x"}}]
    assert abort_in(msgspec.Raw(json.dumps(choices, indent=1).encode())) == word
    assert is_abort(word) and isinstance(aborted(URL, word), BackendAborted)


@pytest.mark.parametrize("raw", [b"", b"null", b"[]", b"{}", b"5", b'[{"finish_reason":"stop"}]', b"[5]", b"[{}]"])
def test_other_reasons_are_not_aborts(raw: bytes) -> None:
    assert abort_in(msgspec.Raw(raw)) is None


# Named events


WHOLE = b'{"choices":[{"index":0,"message":{"content":"%b"},"finish_reason":"%b"}],"usage":{}}'


def test_an_answer_with_one_end_by_its_bound_need_not_be_read() -> None:
    assert ends_well(WHOLE % (b"x", b"length"))


@pytest.mark.parametrize(
    "answer",
    [
        WHOLE % (b"x", b"abort"),
        WHOLE % (rb"\"finish_reason\":\"length\"", b"abort"),
        (WHOLE % (b"x", b"abort")).replace(b'"finish', b'"finish_reason":"length","finish'),
        (WHOLE % (b"x", b"abort")).replace(b'"finish', b'"finish_reason":"length","f\\u0069nish'),
        (WHOLE % (b"x", b"length")).replace(b"[{", b'[{"finish_reason":"abort"},{'),
        b"",
    ],
)
def test_any_other_answer_is_read(answer: bytes) -> None:
    assert not ends_well(answer)


def named(name: str, **members: Any) -> bytes:
    return f"event: {name}\n".encode() + event({"type": name, **members})


START = named("message_start", message={"id": "m", "stop_reason": None, "usage": {"input_tokens": 3}})
BLOCK = named("content_block_start", index=0, content_block={"type": "text", "text": ""})
WORD = named("content_block_delta", index=0, delta={"type": "text_delta", "text": "Hel"})
NO_WORD = named("content_block_delta", index=0, delta={"type": "text_delta", "text": ""})
CLOSE = named("content_block_stop", index=0)
STOP = named("message_stop")
RESPONSE = named("response.created", response={"id": "r", "status": "in_progress"})
ITEM = named("response.output_item.added", item={"type": "message"})
SAID = named("response.output_text.delta", delta="Hel")
NOT_SAID = named("response.output_text.delta", delta="")
DONES = named("response.output_text.done", text="") + named("response.output_item.done", item={})


def message_end(reason: Any) -> bytes:
    return named("message_delta", delta={"stop_reason": reason, "stop_sequence": None}, usage={"output_tokens": 2})


def response_end(name: str = "completed", **members: Any) -> bytes:
    return named(f"response.{name}", response={"id": "r", **members})


MESSAGE = (DIALECTS["messages"], [START, BLOCK, NO_WORD, CLOSE], [START, BLOCK, WORD])
RESPONSES = (DIALECTS["responses"], [RESPONSE, ITEM, NOT_SAID, DONES], [RESPONSE, ITEM, SAID])
CASES = [
    *[(*MESSAGE, message_end(reason) + STOP) for reason in (None, "abort", "error", "cancelled")],
    (*RESPONSES, response_end(status="cancelled")),
    (*RESPONSES, response_end("cancelled", status="cancelled")),
    (*RESPONSES, response_end("incomplete", status="incomplete", incomplete_details={"reason": "abort"})),
]


@pytest.mark.parametrize(("dialect", "opening", "begun", "end"), CASES)
async def test_a_named_stream_that_was_given_up_is_none(
    dialect: Dialect, opening: list[bytes], begun: list[bytes], end: bytes
) -> None:
    for reads in ([*opening, end], [b"".join(opening) + end], [b"".join(begun) + end], [opening[0], end]):
        stream, error = await failed(*reads, dialect=dialect)
        assert type(error) is BackendAborted
        assert not stream.client.started
    stream, error = await failed(*begun, end, dialect=dialect)
    assert type(error) is BackendAborted
    assert stream.client.body == b"".join(begun)


@pytest.mark.parametrize(
    ("dialect", "events"),
    [
        (DIALECTS["messages"], [START, message_end("end_turn"), STOP]),
        (DIALECTS["messages"], [START, BLOCK, NO_WORD, CLOSE, message_end("stop_sequence"), STOP]),
        (DIALECTS["responses"], [RESPONSE, response_end(status="completed")]),
        (DIALECTS["responses"], [RESPONSE, ITEM, NOT_SAID, DONES, response_end("incomplete", status="incomplete")]),
        (
            DIALECTS["responses"],
            [
                RESPONSE,
                response_end("incomplete", status="incomplete", incomplete_details={"reason": "max_output_tokens"}),
            ],
        ),
    ],
)
async def test_an_empty_answer_that_ended_well_is_passed_on(dialect: Dialect, events: list[bytes]) -> None:
    stream = await relayed(*events, dialect=dialect, finished=False)
    assert stream.client.body == b"".join(events)


@pytest.mark.parametrize(("dialect", "opening", "begun", "end"), CASES)
async def test_opening_events_wait_for_something_to_read(
    dialect: Dialect, opening: list[bytes], begun: list[bytes], end: bytes
) -> None:
    stream = await opened(dialect=dialect, finished=False)
    stream.read(*opening)
    assert not stream.client.started
    stream.read(begun[-1])
    assert stream.client.body == b"".join(opening) + begun[-1]
    stream.running.cancel()


async def test_a_hand_off_is_settled_by_the_first_token_whatever_follows() -> None:
    """A leg that claims the blocks again would find another request's in them."""
    for reads in ([FIRST + EMPTY], [ROLE, chat({"content": ""}), EMPTY], [ROLE + chat({"content": ""}) + EMPTY]):
        stream = await opened(finished=False)
        stream.read(*reads)
        assert type(await stream.outcome()) is BackendAborted
        assert stream.first_tokens == [stream.relay] and not stream.relay.live
    stream = await opened(finished=False)
    stream.read(ROLE + EMPTY)
    assert type(await stream.outcome()) is BackendAborted
    assert not stream.first_tokens
