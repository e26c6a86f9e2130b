"""The relay of a stream, from an engine's reads to a client's writes, without a socket between."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from functools import partialmethod
from itertools import pairwise
from time import sleep

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pd_proxy.dialects.edit import Edit
from pd_proxy.dialects.sse import EventReader
from pd_proxy.errors import (
    BackendBusy,
    BackendCut,
    BackendError,
    BackendFailed,
    BackendGarbled,
    BackendLost,
    BackendPreempted,
    BackendRejected,
    BackendTimedOut,
)
from pd_proxy.relay import fast_path as relay_fast_path
from pd_proxy.relay import idle as relay_idle
from pd_proxy.relay import stream as relay_stream
from pd_proxy.telemetry.records import ITL_BOUNDS

from tests.http.helpers import PATIENCE

from .streams import COUNTS, DONE, PING, Stream, chat, chunk, event, identity, opened, relayed, text

ROLE = chat({"role": "assistant", "content": ""})
FIRST, SECOND, THIRD = (chat({"content": token}) for token in ("Hel", "lo", " you"))
END = chat({}, finish_reason="stop")
USAGE = event({"id": "chatcmpl-1", "choices": [], "usage": COUNTS})
FAILURE = event({"error": {"message": "Internal server error", "type": "InternalServerError", "code": 500}})


class Clock:
    """A clock that a test turns by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (relay_stream, relay_idle, relay_fast_path):
        monkeypatch.setattr(module, "monotonic", clock)
    return clock


@pytest.mark.parametrize("chunks", [True, False])
async def test_a_stream_is_passed_on_as_it_came(chunks: bool) -> None:
    stream = await relayed(ROLE, FIRST, SECOND, THIRD, END, DONE, chunks=chunks)
    assert stream.client.body == ROLE + FIRST + SECOND + THIRD + END + DONE


async def test_each_read_is_one_write() -> None:
    stream = await opened()
    stream.read(ROLE + FIRST, SECOND, THIRD + END)
    assert stream.client.writes == [ROLE + FIRST, SECOND, THIRD + END]
    stream.running.cancel()


@pytest.mark.parametrize("opening", [[ROLE], [PING], [PING, ROLE, PING], [ROLE[:-10]], [b"\n"], [USAGE], [b""]])
async def test_nothing_goes_out_before_the_first_token(opening: list[bytes]) -> None:
    stream = await opened(drop_usage=False)
    stream.read(*filter(None, opening))
    assert not stream.client.started
    assert stream.begun == 0
    assert not stream.relay.live
    assert stream.relay.first_token is None
    rest = ROLE[-10:] if opening == [ROLE[:-10]] else b""
    stream.read(rest + FIRST)
    assert stream.begun == 1
    assert stream.relay.live
    assert stream.client.body == b"".join(opening) + rest + FIRST
    stream.running.cancel()


@pytest.mark.parametrize(
    "token",
    [
        FIRST,
        text("a"),
        chat({"reasoning_content": "hm"}),
        chat({"tool_calls": [{"index": 0, "function": {"name": "f"}}]}),
        chat({"role": "assistant", "content": "at once"}),
        END,
        chat({"role": "assistant", "content": ""}, finish_reason="length"),
    ],
)
async def test_a_token_is_anything_beyond_the_role(token: bytes) -> None:
    stream = await opened()
    stream.read(token)
    assert stream.client.body == token
    stream.running.cancel()


@pytest.mark.parametrize("token", [text(""), chat({"content": ""}), chat({}), chat({"content": ""}, token_ids=[5])])
async def test_a_token_without_anything_to_read_waits_for_one_with(token: bytes) -> None:
    """Half a character has no text yet, nor has what could be the beginning of a stop string."""
    stream = await opened(finished=False)
    stream.read(ROLE, token, token)
    assert not stream.client.started and not stream.relay.live
    stream.read(FIRST, token)
    assert stream.client.body.startswith(ROLE + token + token + FIRST)
    stream.read(END, DONE)
    stream.end()
    assert await stream.outcome() is None
    assert stream.client.body == ROLE + token + token + FIRST + token + END + DONE


async def test_an_answer_without_text_goes_out_with_its_end() -> None:
    stream = await opened(finished=False)
    stream.read(ROLE, chat({"content": ""}))
    assert not stream.client.started
    stream.read(END, DONE)
    stream.end()
    assert await stream.outcome() is None
    assert stream.client.body == ROLE + chat({"content": ""}) + END + DONE


async def test_a_stream_without_text_does_not_wait_for_ever(clock: Clock) -> None:
    """An engine that hides its reasoning says nothing for minutes: the client is to know that it is at work."""
    hidden = chat({"content": ""})
    stream = await opened(finished=False)
    stream.read(ROLE, hidden)
    clock.now += 4.9
    stream.read(hidden)
    assert not stream.client.started
    clock.now += 0.2
    stream.read(hidden)
    assert stream.client.body == ROLE + hidden * 3
    stream.running.cancel()


async def test_the_first_token_is_in_time_even_if_it_gives_nothing_to_read() -> None:
    stream = await opened(first_token=0.02, finished=False)
    stream.read(ROLE, chat({"content": ""}))
    await asyncio.sleep(0.06)
    assert not stream.running.done()
    stream.read(FIRST)
    assert stream.relay.live
    stream.running.cancel()


async def test_tokens_without_text_that_fail_give_the_client_nothing() -> None:
    stream = await opened(finished=False)
    stream.read(ROLE, chat({"content": ""}))
    stream.lose(ConnectionResetError())
    assert type(await stream.outcome()) is BackendCut
    assert not stream.client.started and not stream.relay.live
    assert not stream.transcript.first


async def test_an_error_after_the_role_is_an_error_and_the_client_has_seen_nothing() -> None:
    stream = await opened()
    stream.read(ROLE, FAILURE, DONE)
    error = await stream.outcome()
    assert isinstance(error, BackendFailed)
    assert error.status == 500
    assert error.retryable
    assert not stream.client.started
    assert stream.transport.aborted


async def test_an_error_in_the_first_tokens_read_but_before_it_is_an_error_and_the_client_has_seen_nothing() -> None:
    stream = await opened()
    stream.read(ROLE + FAILURE + FIRST)
    assert isinstance(await stream.outcome(), BackendFailed)
    assert not stream.client.started


@pytest.mark.parametrize(
    "reads",
    [
        [FIRST, SECOND, FAILURE, DONE],
        [FIRST, SECOND + FAILURE, DONE],
    ],
)
async def test_an_error_after_tokens_comes_after_those_tokens(reads: list[bytes]) -> None:
    stream = await opened()
    stream.read(*reads)
    error = await stream.outcome()
    assert isinstance(error, BackendFailed)
    assert stream.client.body == FIRST + SECOND
    assert not stream.client.ended  # its last word is the flow's
    assert stream.transport.aborted


@pytest.mark.parametrize(
    ("code", "kind"),
    [(400, BackendRejected), (429, BackendBusy), (503, BackendBusy), (500, BackendFailed), ("oops", BackendFailed)],
)
async def test_an_error_event_is_the_error_its_code_says(code: object, kind: type[BackendError]) -> None:
    stream = await opened()
    stream.read(ROLE, event({"error": {"message": "no", "type": "T", "code": code}}))
    error = await stream.outcome()
    assert type(error) is kind
    assert error.status == (code if isinstance(code, int) else 500)


# Preemption (vllm-ascend's recompute scheduler)

OPENING = [FIRST, SECOND]
GIVEN_UP = chat({"content": ""}, finish_reason="stop", stop_reason="recomputed")


@pytest.mark.parametrize(
    "reads", [[GIVEN_UP], [ROLE, GIVEN_UP, DONE], [ROLE + GIVEN_UP + DONE], [ROLE + GIVEN_UP + FIRST]]
)
async def test_a_stream_given_up_before_its_first_token_is_preempted_and_the_client_has_seen_nothing(
    reads: list[bytes],
) -> None:
    stream = await opened()
    stream.read(*reads)
    assert type(await stream.outcome()) is BackendPreempted
    assert not stream.client.started
    assert stream.transport.aborted


@pytest.mark.parametrize("edit", [Edit(), Edit(hide_ids=True), Edit(identity=identity(id="x"), said=3)])
@pytest.mark.parametrize(
    "reads",
    [
        [FIRST, SECOND, GIVEN_UP, DONE],
        [FIRST, SECOND + GIVEN_UP, DONE],
    ],
)
async def test_a_stream_given_up_after_tokens_is_preempted_and_the_client_never_sees_that_event(
    reads: list[bytes], edit: Edit
) -> None:
    stream = await opened(edit=edit, finished=False)
    stream.read(*reads)
    assert type(await stream.outcome()) is BackendPreempted
    assert stream.client.body == b"".join(part.replace(b"chatcmpl-1", b"x") if edit.said else part for part in OPENING)
    assert not stream.client.ended
    assert not stream.transcript.finished
    assert stream.relay.given()[0] == 2


async def test_the_word_recomputed_in_a_text_is_no_preemption() -> None:
    said = chat({"content": '"stop_reason":"recomputed"'})
    stream = await relayed(FIRST, said, said + said, DONE)
    assert stream.client.body == FIRST + said * 3 + DONE


# The fast path: which reads the parser sees


@pytest.mark.parametrize("make", [text, lambda token: chat({"content": token})], ids=["completions", "chat"])
async def test_ordinary_tokens_are_not_parsed_once_the_first_was(make: Callable[[str], bytes]) -> None:
    tokens = [make(token) for token in ("Hel", "lo", " you", " é \U0001f600 {}[]\\,", "x" * 5000)]
    stream = await opened()
    assert stream.parsed(*tokens[:1]) == tokens[:1]
    assert stream.parsed(*tokens[1:]) == []
    assert stream.client.writes == tokens
    assert stream.relay.given()[0] == len(tokens)
    stream.running.cancel()


async def test_everything_that_is_no_ordinary_token_is_parsed_and_the_next_token_is_not() -> None:
    stream = await opened()
    stream.read(ROLE, FIRST)
    others = [
        PING,
        chat({"content": ""}),
        chat({"content": 'a "quote"'}),
        chat({"content": "x"}, logprobs={"content": []}),
        chat({"tool_calls": [{"index": 0, "function": {"arguments": "x"}}]}),
        chat({"content": "x", "reasoning_content": "y"}),
        chat({"content": "x"}, index=1),
        chat({"content": "x"}, stop_reason=5),
        chat({"role": "assistant", "content": "x"}),
        event({"id": "chatcmpl-1", "choices": [], "usage": COUNTS}),
        SECOND + THIRD,
        SECOND.replace(b"\n", b"\r\n"),
        b"event: ping\ndata: {}\n\n",
    ]
    for other in others:
        assert stream.parsed(other) == [other]
        stream.read(SECOND)  # it may have taught another form
        assert stream.parsed(THIRD) == [], other
    assert stream.parsed(END) == [END]
    assert stream.parsed(DONE) == [DONE]
    stream.end()
    assert await stream.outcome() is None
    dropped = others.index(USAGE)
    expected = b"".join(part + SECOND + THIRD for part in [*others[:dropped], b"", *others[dropped + 1 :]])
    assert stream.client.body == ROLE + FIRST + expected + END + DONE


async def test_after_half_an_event_or_half_a_chunk_the_rest_is_parsed() -> None:
    stream = await opened()
    stream.read(FIRST)
    assert stream.parsed(SECOND) == []
    stream.feed(b"%x\r\n" % len(THIRD))
    assert stream.protocol is not stream.connection
    stream.feed(THIRD)  # between its size and its end
    stream.feed(b"\r\n")
    assert stream.client.writes == [FIRST, SECOND, THIRD]
    assert stream.parsed(SECOND[:30]) == [SECOND[:30]]
    assert stream.parsed(SECOND[30:]) == [SECOND[30:]]
    assert stream.parsed(SECOND) == []
    assert stream.client.body == FIRST + SECOND + THIRD + SECOND + SECOND
    assert stream.relay.given()[0] == 5
    stream.running.cancel()


async def test_an_event_that_ends_inside_a_chunk_does_not_open_the_fast_path() -> None:
    """A chunk that looks like a token event may be the text of an event that has begun."""
    stream = await opened()
    stream.read(FIRST, SECOND)
    assert stream.parsed(b": a comment ", SECOND, THIRD) == [b": a comment ", SECOND]
    assert stream.client.body == FIRST + SECOND + b": a comment " + SECOND + THIRD
    stream.running.cancel()


async def test_bytes_inside_a_chunk_that_look_like_a_chunk_are_a_part_of_it() -> None:
    stream = await opened()
    assert stream.parsed(FIRST, SECOND) == [FIRST]
    inside = SECOND + chunk(THIRD) + b"\n\n"
    stream.feed(b"%x\r\n%b" % (len(inside), SECOND), chunk(THIRD), b"\n\n\r\n")
    assert stream.client.body == FIRST + SECOND + inside
    assert stream.parsed(THIRD) == []
    stream.running.cancel()


async def test_an_error_after_tokens_of_the_fast_path_comes_after_them() -> None:
    stream = await opened()
    stream.read(FIRST, SECOND, THIRD, FAILURE, SECOND)
    assert type(await stream.outcome()) is BackendFailed
    assert stream.client.body == FIRST + SECOND + THIRD


async def test_a_client_that_speaks_no_chunks_is_given_what_was_parsed() -> None:
    stream = await opened(chunks=False)
    assert stream.parsed(FIRST, SECOND, THIRD) == [FIRST, SECOND, THIRD]
    assert stream.protocol is stream.connection
    assert stream.client.writes == [FIRST, SECOND, THIRD]
    stream.running.cancel()


async def test_an_engine_that_speaks_no_chunks_is_parsed() -> None:
    body = FIRST + SECOND + THIRD + DONE
    stream = await opened(framing=b"content-length: %d" % len(body))
    connection = stream.connection
    stream.feed(FIRST, SECOND, THIRD, DONE)
    assert await stream.outcome() is None
    assert connection.reads[1:] == [FIRST, SECOND, THIRD, DONE]
    assert stream.client.body == body


async def test_nothing_is_passed_to_a_client_that_has_gone() -> None:
    stream = await opened()
    stream.read(FIRST, SECOND)
    fast_path = stream.protocol
    assert fast_path is not stream.connection
    stream.relay.stop()
    fast_path.data_received(chunk(THIRD))
    assert stream.client.body == FIRST + SECOND
    stream.running.cancel()


async def test_a_stream_that_failed_from_outside_passes_no_more() -> None:
    stream = await opened()
    stream.read(FIRST, SECOND)
    fast_path = stream.protocol
    stream.relay.fail(BackendLost("gone"))
    fast_path.data_received(chunk(THIRD))
    assert stream.client.body == FIRST + SECOND
    assert type(await stream.outcome()) is BackendLost


@pytest.mark.parametrize("tokens", [1, 2, 32, 33, 34, 100])
async def test_counts_are_right_however_many_tokens_took_the_fast_path(tokens: int, clock: Clock) -> None:
    stream = await opened()
    for number in range(tokens):
        stream.read(chat({"content": f"t{number}"}))
        assert stream.relay.given()[0] == number + 1
        assert stream.relay.given()[1] == clock.now
        clock.now += 0.25
    assert len(stream.connection.reads) == 2  # the head, and the first of them
    stream.read(DONE)
    stream.end()
    assert await stream.outcome() is None
    assert stream.relay.given()[0] == tokens
    assert sum(stream.gaps.counts) == stream.gaps.counts[ITL_BOUNDS.index(0.25)] == tokens - 1
    assert stream.gaps.sum == pytest.approx(0.25 * (tokens - 1))


async def test_a_connection_serves_again_after_a_stream_that_the_parser_hardly_saw() -> None:
    stream = await relayed(ROLE, FIRST, *[SECOND] * 50, END, DONE)
    assert len(stream.connection.reads) == 6
    assert stream.origin._take() is stream.connection


# Usage and tokens


async def test_usage_that_only_the_gateway_wanted_is_read_and_taken_out() -> None:
    stream = await relayed(ROLE, FIRST, END, USAGE, DONE)
    assert stream.client.body == ROLE + FIRST + END + DONE
    usage = stream.relay.usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (7, 3, 4)


async def test_usage_that_the_client_wanted_is_read_and_kept() -> None:
    stream = await relayed(ROLE, FIRST, END, USAGE, DONE, drop_usage=False)
    assert stream.client.body == ROLE + FIRST + END + USAGE + DONE
    assert stream.relay.usage is not None


async def test_usage_in_one_read_with_the_tokens_and_the_end_is_taken_out() -> None:
    stream = await relayed(ROLE + FIRST + END + USAGE + DONE)
    assert stream.client.body == ROLE + FIRST + END + DONE
    assert stream.relay.given()[0] == 2


async def test_a_token_that_carries_usage_is_kept() -> None:
    token = text("a", usage=COUNTS)
    stream = await relayed(text("b") + token + PING, DONE)
    assert stream.client.body == text("b") + token + PING + DONE
    assert stream.relay.usage is not None


async def test_usage_of_an_unknown_shape_is_no_error() -> None:
    stream = await relayed(FIRST, event({"choices": [], "usage": "much"}), DONE)
    assert stream.relay.usage is None


async def test_tokens_are_counted_and_their_gaps_noted() -> None:
    stream = await relayed(ROLE, FIRST, SECOND, PING, SECOND + THIRD, END, USAGE, DONE)
    assert stream.relay.given()[0] == 5
    assert sum(stream.gaps.counts) == 4  # four gaps between five tokens
    assert stream.gaps.sum < PATIENCE
    assert stream.relay.first_token is not None
    assert stream.relay.first_token <= stream.relay.given()[1]


async def test_tokens_that_came_together_have_no_gap() -> None:
    stream = await relayed(FIRST, SECOND + SECOND + SECOND, DONE)
    assert stream.relay.given()[0] == 4
    assert stream.gaps.counts[0] >= 2


async def test_the_word_choices_in_a_text_is_no_token() -> None:
    tricky = text('"choices":[{ \n\n data: [DONE] "error": {} kv_transfer_params')
    stream = await relayed(FIRST, tricky, tricky + tricky, DONE)
    assert stream.client.body == FIRST + tricky * 3 + DONE
    assert stream.relay.given()[0] == 4


# What stays inside


@pytest.mark.parametrize("position", range(3))
@pytest.mark.parametrize("field", ["kv_transfer_params", "ec_transfer_params"])
async def test_the_hand_off_never_reaches_the_client(position: int, field: str) -> None:
    reads = [FIRST, SECOND, THIRD]
    reads[position] = text("secret", **{field: {"remote_host": "10.0.0.1"}})
    for together in (False, True):
        stream = await relayed(*([b"".join(reads)] if together else reads), DONE)
        assert b"10.0.0.1" not in stream.client.body
        assert b"secret" in stream.client.body
        assert stream.relay.given()[0] == 3


@pytest.mark.parametrize("bad", [b"data: {nope\n\n", chat([]), text(5), event({"choices": 5})])  # type: ignore[arg-type]
@pytest.mark.parametrize("together", [False, True])
async def test_an_event_that_is_no_answer_is_garbled_and_comes_not_to_the_client(bad: bytes, together: bool) -> None:
    reads = [FIRST, SECOND, bad, THIRD]
    stream = await opened(edit=Edit(hide_ids=True))
    stream.read(*([FIRST, b"".join(reads[1:])] if together else reads))
    assert type(await stream.outcome()) is BackendGarbled
    assert stream.client.body == FIRST + SECOND
    assert not stream.client.ended


async def test_an_event_of_another_kind_is_passed_on() -> None:
    stream = await relayed(FIRST, b"event: ping\ndata: {}\n\n", SECOND, DONE)
    assert stream.client.body == FIRST + b"event: ping\ndata: {}\n\n" + SECOND + DONE


@pytest.mark.parametrize("end", [b"\r\n", b"\r"])
async def test_other_line_ends_are_understood(end: bytes) -> None:
    reads = [part.replace(b"\n", end) for part in (ROLE, FIRST, SECOND, USAGE, DONE)]
    stream = await opened()
    stream.read(*reads, b": bye\n\n")
    stream.end()
    assert await stream.outcome() is None
    assert stream.client.body == b"".join([*reads[:3], b": bye\n\n", reads[4]])
    assert stream.relay.given()[0] == 2


async def test_an_error_event_with_other_line_ends_never_reaches_the_client() -> None:
    stream = await opened()
    stream.read(FIRST, FAILURE.replace(b"\n", b"\r\n"))
    stream.end()
    assert type(await stream.outcome()) is BackendFailed
    assert stream.client.body == FIRST


# Endings


async def test_a_stream_without_its_last_word_is_cut() -> None:
    stream = await opened()
    stream.read(FIRST, END)
    stream.end()
    error = await stream.outcome()
    assert type(error) is BackendCut
    assert "[DONE]" in str(error)
    assert stream.client.body == FIRST + END
    assert not stream.client.ended


@pytest.mark.parametrize("reads", [[FIRST, SECOND, DONE], [FIRST + SECOND + DONE], [FIRST, SECOND + DONE]])
@pytest.mark.parametrize("breaks", [False, True])
async def test_a_last_word_without_a_finish_reason_is_none(reads: list[bytes], breaks: bool) -> None:
    stream = await opened(finished=False)
    stream.read(*reads)
    if breaks:
        stream.lose(ConnectionResetError())
    else:
        stream.end()
    assert type(await stream.outcome()) is BackendCut
    assert stream.client.body == FIRST + SECOND
    assert not stream.client.ended


@pytest.mark.parametrize("finish", [END, text("x").replace(b'finish_reason":null', b'finish_reason":"stop"')])
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("breaks", [False, True])
async def test_a_last_word_after_a_finish_reason_ends_the_answer(finish: bytes, together: bool, breaks: bool) -> None:
    reads = [FIRST, SECOND, finish, DONE]
    stream = await opened(finished=False)
    stream.read(*([b"".join(reads)] if together else reads))
    if breaks:
        stream.lose(ConnectionResetError())
    else:
        stream.end()
    assert await stream.outcome() is None
    assert stream.client.body == FIRST + SECOND + finish + DONE
    assert stream.client.ended


@pytest.mark.parametrize("broken", [ConnectionResetError(), None])
async def test_a_connection_that_breaks_within_an_event_shows_no_half_of_it(broken: Exception | None) -> None:
    stream = await opened()
    stream.read(ROLE + FIRST, SECOND + THIRD[:20])
    stream.lose(broken)
    assert type(await stream.outcome()) is BackendCut
    assert stream.client.body == ROLE + FIRST + SECOND


async def test_a_connection_that_breaks_before_the_first_token_leaves_the_client_untouched() -> None:
    stream = await opened()
    stream.read(ROLE)
    stream.lose(None)
    assert type(await stream.outcome()) is BackendCut
    assert not stream.client.started


@pytest.mark.parametrize("together", [False, True])
async def test_a_connection_that_breaks_after_the_last_word_broke_nothing(together: bool) -> None:
    stream = await opened()
    stream.read(*([FIRST + DONE] if together else [FIRST, DONE]))
    stream.lose(ConnectionResetError())
    assert await stream.outcome() is None
    assert stream.client.ended
    assert stream.client.body == FIRST + DONE


@pytest.mark.parametrize("reads", [[DONE], [ROLE, DONE], [PING, ROLE + DONE], [USAGE, DONE]])
async def test_a_stream_without_a_token_is_a_failure(reads: list[bytes]) -> None:
    stream = await opened()
    stream.read(*reads)
    stream.end()
    error = await stream.outcome()
    assert isinstance(error, BackendFailed)
    assert error.status == 502
    assert not stream.client.started


async def test_an_empty_answer_is_cut() -> None:
    stream = await opened()
    stream.end()
    assert type(await stream.outcome()) is BackendCut


async def test_the_last_events_and_the_end_go_out_in_one_write() -> None:
    stream = await opened()
    stream.read(FIRST)
    last = END + DONE
    stream.feed(chunk(last) + b"0\r\n\r\n")
    assert await stream.outcome() is None
    assert stream.client.writes == [FIRST, last]


async def test_a_whole_answer_in_one_read_is_passed_on() -> None:
    stream = await opened()
    whole = ROLE + FIRST + END + USAGE + DONE
    stream.feed(chunk(whole) + b"0\r\n\r\n")
    assert await stream.outcome() is None
    assert stream.client.writes == [ROLE + FIRST + END + DONE]


async def test_an_event_before_the_first_token_that_is_no_json_is_garbled() -> None:
    stream = await opened()
    stream.read(b"data: <html>\n\n")
    assert type(await stream.outcome()) is BackendGarbled
    assert not stream.client.started


@pytest.mark.parametrize("live", [False, True])
async def test_an_event_without_end_is_garbled(live: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EventReader, "__init__", partialmethod(EventReader.__init__, limit=1000))
    stream = await opened()
    if live:
        stream.read(FIRST)
    stream.read(b"data: " + b"x" * 1000)
    assert type(await stream.outcome()) is BackendGarbled
    assert stream.transport.aborted


async def test_too_much_without_a_token_is_garbled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_stream, "_HELD_LIMIT", 100_000)
    stream = await opened()
    for _ in range(97):
        stream.read(b": " + b"x" * 1020 + b"\n\n")
    assert not stream.running.done()
    stream.read(b": " + b"x" * 1020 + b"\n\n")
    assert type(await stream.outcome()) is BackendGarbled
    assert not stream.client.started


@pytest.mark.parametrize("live", [False, True])
async def test_the_fleet_can_give_a_stream_up(live: bool) -> None:
    stream = await opened()
    stream.read(FIRST if live else ROLE)
    stream.relay.fail(BackendLost("gone"))
    assert type(await stream.outcome()) is BackendLost
    assert stream.transport.aborted
    assert stream.client.started is live


async def test_a_cancelled_stream_closes_its_connection() -> None:
    stream = await opened()
    stream.read(FIRST)
    stream.running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stream.running
    assert stream.transport.aborted
    assert stream.client.flow is None


@pytest.mark.parametrize("live", [False, True])
async def test_a_stream_that_is_stopped_writes_no_more_and_closes_its_connection(live: bool) -> None:
    stream = await opened()
    stream.read(ROLE, *([FIRST, SECOND] if live else []))
    before = stream.client.body
    stream.relay.stop()
    assert stream.transport.aborted
    stream.read(THIRD)
    assert stream.client.body == before
    stream.running.cancel()


# Errors in place of a stream


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, BackendRejected),
        (401, BackendRejected),
        (404, BackendRejected),
        (422, BackendRejected),
        (429, BackendBusy),
        (500, BackendFailed),
        (502, BackendFailed),
        (503, BackendBusy),
    ],
)
async def test_an_error_status_is_its_error_with_the_engines_words(status: int, kind: type[BackendError]) -> None:
    said = json.dumps({"error": {"message": "no such thing", "type": "T", "param": "x", "code": status}}).encode()
    stream = await opened(status=status)
    stream.read(said[:10], said[10:])
    stream.end()
    error = await stream.outcome()
    assert type(error) is kind
    assert error.status == status
    assert error.body() == said
    assert not stream.client.started


async def test_an_endless_error_is_kept_only_in_part() -> None:
    stream = await opened(status=500)
    for _ in range(40):
        stream.read(b"x" * 65000)
    stream.end()
    error = await stream.outcome()
    assert isinstance(error, BackendFailed)
    assert len(stream.relay._error_body) <= 1024 * 1024


# Time


async def test_no_first_token_in_time_is_a_time_out() -> None:
    stream = await opened(first_token=0.02)
    stream.read(ROLE)
    error = await stream.outcome()
    assert type(error) is BackendTimedOut
    assert "no token within 0.02 s" in str(error)
    assert not stream.client.started
    assert stream.transport.aborted


async def test_the_first_token_ends_the_wait_for_it() -> None:
    stream = await opened(first_token=0.01)
    stream.read(FIRST)
    await asyncio.wait([stream.running], timeout=0.03)
    assert not stream.running.done()
    stream.read(DONE)
    stream.end()
    assert await stream.outcome() is None


async def test_silence_is_a_time_out() -> None:
    stream = await opened(idle=0.02)
    stream.read(FIRST)
    error = await stream.outcome()
    assert type(error) is BackendTimedOut
    assert "sent nothing for 0.02 s" in str(error)
    assert stream.client.body == FIRST


async def test_a_stream_that_speaks_now_and_then_is_not_silent(clock: Clock) -> None:
    stream = await opened(idle=10.0)
    stream.read(FIRST)
    for said in (SECOND, PING, THIRD, USAGE, PING):
        clock.now += 9.0
        stream.relay._idle_watch.check()  # as its timer would
        stream.read(said)
    assert stream.connection._receiver is stream.relay
    clock.now += 11.0
    stream.relay._idle_watch.check()
    assert type(await stream.outcome()) is BackendTimedOut


async def test_half_an_event_now_and_then_is_silence(clock: Clock) -> None:
    stream = await opened(idle=10.0)
    stream.read(FIRST)
    for byte in SECOND[:3]:
        clock.now += 4.0
        stream.read(bytes([byte]))
    stream.relay._idle_watch.check()
    assert type(await stream.outcome()) is BackendTimedOut


async def test_gaps_are_the_time_between_tokens(clock: Clock) -> None:
    stream = await opened()
    stream.read(ROLE + FIRST)
    assert stream.relay.first_token == 1000.0
    clock.now += 0.02
    stream.read(SECOND)
    clock.now += 0.5
    stream.read(PING)
    clock.now += 0.5
    stream.read(THIRD)
    assert stream.relay.given()[1] == pytest.approx(1001.02)
    stream.read(DONE)
    stream.end()
    assert await stream.outcome() is None
    assert stream.gaps.counts[ITL_BOUNDS.index(1.0)] == 1
    assert sum(stream.gaps.counts) == 2
    assert stream.gaps.sum == pytest.approx(1.02)
    assert stream.relay.given()[1] == pytest.approx(1001.02)


async def test_time_spent_paused_is_not_the_engines_silence(clock: Clock) -> None:
    stream = await opened(idle=10.0)
    stream.read(FIRST)
    clock.now += 4.0
    stream.relay.pause()
    clock.now += 9.0
    stream.relay._idle_watch.check()
    stream.relay.resume()
    clock.now += 9.0
    stream.relay._idle_watch.check()
    assert stream.connection._receiver is stream.relay
    assert not stream.client.was_cut
    stream.running.cancel()


async def test_a_client_that_stops_reading_is_cut() -> None:
    stream = await opened(idle=0.02)
    stream.read(FIRST)
    assert stream.client.flow is stream.relay
    stream.relay.pause()
    assert not stream.transport.reading
    await asyncio.wait([stream.running], timeout=0.06)
    assert stream.client.was_cut


@pytest.mark.parametrize("slow", [False, True])
async def test_a_slow_clients_stream_tells_no_pace(slow: bool) -> None:
    paces: list[float] = []
    stream = await opened(pace=paces.append)
    stream.read(FIRST)
    if slow:
        stream.relay.pause()
        stream.relay.resume()
    stream.read(*[FIRST] * 20, DONE)
    stream.end()
    assert await stream.outcome() is None
    assert len(paces) == (0 if slow else 1)


async def test_a_paused_stream_goes_on_where_it_stopped() -> None:
    stream = await opened(idle=PATIENCE)
    stream.read(FIRST)
    stream.relay.pause()
    assert not stream.transport.reading
    stream.relay.resume()
    assert stream.transport.reading
    stream.read(SECOND, DONE)
    stream.end()
    assert await stream.outcome() is None
    assert stream.client.body == FIRST + SECOND + DONE


# Doubt


async def test_a_suspected_stream_that_is_silent_fails_with_the_reason_for_the_suspicion(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(relay_idle, "_SUSPECTED", 0.02)
    stream = await opened()
    stream.read(FIRST)
    stream.relay.suspect(BackendLost("failed its checks"))
    assert not stream.running.done()  # it has a moment
    error = await stream.outcome()
    assert type(error) is BackendLost
    assert stream.transport.aborted
    assert stream.client.body == FIRST


def fire(stream: Stream) -> None:
    """The relay's timer, now."""
    timer = stream.relay._idle_watch._timer
    assert timer is not None
    assert not timer.cancelled()
    callback, arguments = timer._callback, timer._args  # type: ignore[attr-defined]
    timer.cancel()
    callback(*arguments)


async def test_silence_before_the_suspicion_counts_for_nothing(clock: Clock) -> None:
    """The gateway may have stood still itself: what came meanwhile is still to be read."""
    stream = await opened(idle=10.0)
    stream.read(FIRST)
    clock.now += 5.0
    stream.relay.suspect(BackendLost("failed its checks"))
    for _ in range(3):
        await asyncio.sleep(0)
    assert not stream.running.done()
    stream.read(SECOND)
    fire(stream)
    assert not stream.running.done()
    stream.running.cancel()


async def test_a_suspected_stream_is_listened_to_once_more_where_the_event_loop_was_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(relay_idle, "_SUSPECTED", 0.02)
    stream = await opened(idle=10.0)
    stream.read(FIRST)
    stream.relay.suspect(BackendLost("failed its checks"))
    sleep(0.05)  # the event loop stands still past the time
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not stream.running.done()
    assert type(await stream.outcome()) is BackendLost  # and it is silent after that


async def test_a_gateway_that_is_always_late_ends_a_silent_stream_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_idle, "_SUSPECTED", 0.002)
    stream = await opened(idle=10.0)
    stream.read(FIRST)
    stream.relay.suspect(BackendLost("failed its checks"))
    turns = 0
    while not stream.running.done():
        turns += 1
        assert turns < 50
        sleep(0.005)
        await asyncio.sleep(0)
    assert type(await stream.outcome()) is BackendLost


async def test_a_slow_stream_is_suspected_for_as_long_as_it_is_slow(clock: Clock) -> None:
    """One with a token each two seconds moves, though it is silent for more than one."""
    stream = await opened(idle=60.0)
    for token in (FIRST, SECOND, THIRD):
        stream.read(token)
        clock.now += 2.0
    before = asyncio.get_running_loop().time()
    stream.relay.suspect(BackendLost("failed its checks"))
    timer = stream.relay._idle_watch._timer
    assert timer is not None
    assert timer.when() - before == pytest.approx(8.0, abs=0.5)
    stream.running.cancel()


@pytest.mark.parametrize("said", [SECOND, PING, END, SECOND + THIRD], ids=["straight", "ping", "end", "two"])
async def test_a_suspected_stream_that_speaks_goes_on(said: bytes, clock: Clock) -> None:
    stream = await opened(idle=10.0)
    stream.read(FIRST)
    stream.relay.suspect(BackendLost("failed its checks"))
    clock.now += 0.9
    stream.read(said)
    clock.now += 0.2
    fire(stream)
    assert stream.connection._receiver is stream.relay
    # Silence is watched for again.
    clock.now += 9.0
    fire(stream)
    assert stream.connection._receiver is stream.relay
    clock.now += 1.0
    fire(stream)
    assert type(await stream.outcome()) is BackendTimedOut


@pytest.mark.parametrize("idle", [None, 10.0])
async def test_a_stream_suspected_twice_fails_in_its_second_silence(idle: float | None, clock: Clock) -> None:
    stream = await opened(idle=idle)
    stream.read(FIRST)
    for _ in range(2):
        stream.relay.suspect(BackendLost("failed its checks"))
        assert stream.connection._receiver is stream.relay
        clock.now += 0.5
        stream.read(SECOND)
    fire(stream)
    assert stream.connection._receiver is stream.relay
    stream.relay.suspect(BackendLost("failed them again"))
    clock.now += 1.0
    fire(stream)
    error = await stream.outcome()
    assert type(error) is BackendLost
    assert "again" in str(error)


async def test_a_suspicion_that_is_repeated_gives_no_new_time(clock: Clock) -> None:
    """A backend that is down is probed again and again."""
    stream = await opened(idle=10.0)
    stream.read(FIRST)
    stream.relay.suspect(BackendLost("failed its checks"))
    timer = stream.relay._idle_watch._timer
    clock.now += 0.5
    stream.relay.suspect(BackendLost("failed them again"))
    assert stream.relay._idle_watch._timer is timer
    stream.running.cancel()


@pytest.mark.parametrize("before", [True, False])
async def test_a_stream_whose_client_keeps_it_waiting_is_not_suspected(before: bool, clock: Clock) -> None:
    stream = await opened(idle=10.0)
    stream.read(FIRST)
    if before:
        stream.relay.pause()
    stream.relay.suspect(BackendLost("failed its checks"))
    if not before:
        stream.relay.pause()
    clock.now += 2.0
    fire(stream)
    assert stream.connection._receiver is stream.relay
    assert not stream.client.was_cut
    stream.running.cancel()


async def test_a_suspected_stream_that_ends_well_ended_well(clock: Clock) -> None:
    stream = await opened()
    stream.read(FIRST)
    stream.relay.suspect(BackendLost("failed its checks"))
    timer = stream.relay._idle_watch._timer
    stream.read(DONE)
    stream.end()
    assert await stream.outcome() is None
    assert timer is not None
    assert timer.cancelled()


# Any split

GOOD = [ROLE, FIRST, PING, SECOND, text("x", kv_transfer_params={"a": 1}), END, USAGE, DONE]
FAILING = [ROLE, FIRST, SECOND, FAILURE]
WITH_CRLF = [part.replace(b"\n", b"\r\n") for part in (ROLE, FIRST, SECOND, USAGE, DONE)]

CUTS = st.lists(st.integers(0, 2000), max_size=12)


def relayed_in_pieces(answer: bytes, cuts: list[int], chunks: bool = True) -> tuple[BackendError | None, Stream]:
    """How a stream ends that is read in the pieces that the cuts make of it."""

    async def relay() -> tuple[BackendError | None, Stream]:
        places = sorted({cut % len(answer) for cut in cuts} | {0, len(answer)})
        stream = await opened(chunks=chunks)
        stream.read(*(answer[a:b] for a, b in pairwise(places)))
        stream.end()
        return await stream.outcome(), stream

    return asyncio.run(relay())


@given(cuts=CUTS, chunks=st.booleans())
def test_any_split_of_a_good_answer_gives_the_client_the_same_bytes(cuts: list[int], chunks: bool) -> None:
    error, stream = relayed_in_pieces(b"".join(GOOD), cuts, chunks)
    assert error is None
    assert stream.client.body == ROLE + FIRST + PING + SECOND + text("x") + END + DONE
    assert stream.client.ended
    assert all(write.endswith(b"\n\n") for write in stream.client.writes)
    assert stream.relay.given()[0] == 4
    assert stream.relay.usage is not None
    assert sum(stream.gaps.counts) <= 3


@example(cuts=[])
@given(cuts=CUTS)
def test_any_split_of_an_answer_that_fails_gives_the_client_the_same_bytes(cuts: list[int]) -> None:
    answer = b"".join(FAILING)
    error, stream = relayed_in_pieces(answer, cuts)
    assert type(error) is BackendFailed
    # Where the failure is read together with the first text, none of it goes out: all can be begun anew elsewhere.
    together = not any(len(ROLE + FIRST) <= cut % len(answer) for cut in cuts)
    assert stream.client.body == (b"" if together else ROLE + FIRST + SECOND)
    assert not stream.client.ended
    assert stream.relay.given()[0] == 2


@example(cuts=[len(b"".join(WITH_CRLF[:3])), len(b"".join(WITH_CRLF[:4]))])
@given(cuts=CUTS)
def test_any_split_of_an_answer_with_other_line_ends_gives_the_client_the_same_bytes(cuts: list[int]) -> None:
    error, stream = relayed_in_pieces(b"".join(WITH_CRLF), cuts)
    assert error is None
    assert stream.client.body == b"".join(WITH_CRLF[:3]) + b"data: [DONE]\r\n\r\n"
    assert stream.relay.given()[0] == 2


# Many at once


def spoken(number: int, **more: object) -> bytes:
    return chat({"content": f" {number}" if number % 7 else "\\n"}, token_ids=[300 + number], **more)


FIRST_OF_LONG = chat({"role": "assistant", "content": ""}).replace(b"}\n", b',"prompt_token_ids":[1,2,3]}\n')
LONG = [
    FIRST_OF_LONG,
    *map(spoken, range(1, 12)),
    PING,
    *map(spoken, range(12, 15)),
    chat({"content": ""}, token_ids=[315]),  # half a character
    chat({"content": "é"}, token_ids=[316]),
    *map(spoken, range(17, 30)),
    spoken(30, finish_reason="length"),
    USAGE,
    DONE,
]
LONG_SHOWN = b"".join(Edit(hide_ids=True).event(part, part[6:-2]) for part in LONG if part not in (USAGE, DONE, PING))


@example(cuts=[])
@example(cuts=[len(chunk(FIRST_OF_LONG))])
@given(cuts=st.lists(st.integers(0, 10_000), max_size=20))
def test_any_split_of_a_long_answer_gives_the_same_bytes_counts_and_ids(cuts: list[int]) -> None:
    async def relay() -> Stream:
        stream = await opened(edit=Edit(hide_ids=True), finished=False)
        answer = b"".join(map(chunk, LONG)) + b"0\r\n\r\n"
        places = sorted({cut % len(answer) for cut in cuts} | {0, len(answer)})
        stream.feed(*(answer[a:b] for a, b in pairwise(places)))
        assert await stream.outcome() is None
        return stream

    stream = asyncio.run(relay())
    assert stream.client.body.replace(PING, b"") == LONG_SHOWN + DONE
    assert stream.client.body.count(PING) == 1
    assert stream.relay.given()[0] == 30
    assert sum(stream.gaps.counts) == 29
    assert stream.transcript.cut() == b"1,2,3," + b",".join(b"%d" % token for token in range(301, 331))
    assert stream.transcript.finished


@pytest.fixture
async def flooded() -> Stream:
    """A stream of which several tokens came in one read."""
    stream = await opened(finished=False)
    stream.read(ROLE + FIRST)
    assert stream.transport.reading
    stream.feed(b"".join(map(chunk, [SECOND, THIRD, SECOND, THIRD])))
    assert not stream.transport.reading
    return stream


async def rested(stream: Stream) -> None:
    """Wait until its connection has rested."""
    async with asyncio.timeout(PATIENCE):
        while stream.connection._resting:
            await asyncio.sleep(0)


async def test_a_stream_that_brings_many_tokens_at_once_is_read_again_a_little_later(flooded: Stream) -> None:
    await rested(flooded)
    assert flooded.transport.reading
    flooded.read(END, DONE)
    flooded.end()
    assert await flooded.outcome() is None


async def test_a_slow_client_is_not_overrun_when_its_stream_has_rested(flooded: Stream) -> None:
    flooded.relay.pause()
    await rested(flooded)
    assert not flooded.transport.reading
    flooded.relay.resume()
    assert flooded.transport.reading
    flooded.running.cancel()


async def test_a_connection_that_ends_while_it_rests_is_as_good_as_any_other(flooded: Stream) -> None:
    flooded.read(END, DONE)
    flooded.end()
    assert await flooded.outcome() is None
    assert flooded.transport.reading
    assert flooded.origin._take() is flooded.connection
    assert not flooded.connection._resting


async def test_a_connection_that_breaks_while_it_rests_is_left_alone(flooded: Stream) -> None:
    flooded.relay.fail(BackendLost("gone"))
    await rested(flooded)
    assert not flooded.transport.reading
    assert type(await flooded.outcome()) is BackendLost


async def test_a_stream_whose_tokens_come_one_by_one_does_not_rest() -> None:
    stream = await opened(finished=False)
    for part in (ROLE, FIRST, SECOND, THIRD, SECOND, THIRD, SECOND + THIRD):
        stream.read(part)
        assert stream.transport.reading
    stream.running.cancel()


async def test_the_end_of_an_answer_is_not_waited_for() -> None:
    stream = await opened(finished=False)
    stream.read(ROLE + FIRST)
    stream.feed(b"".join(map(chunk, [SECOND, THIRD, SECOND, END])))
    assert stream.transport.reading
    stream.running.cancel()
