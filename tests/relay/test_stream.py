"""The relay of a stream, from an engine's reads to a client's writes, without a socket between."""

from __future__ import annotations

import asyncio
import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from proxy.errors import (
    BackendBusy,
    BackendCut,
    BackendError,
    BackendFailed,
    BackendGarbled,
    BackendLost,
    BackendRejected,
    BackendTimedOut,
)
from proxy.relay import stream as relay_stream
from proxy.relay.http1 import Connection, Origin
from proxy.relay.stream import StreamRelay
from proxy.telemetry.records import ITL_BOUNDS, Distribution

from .helpers import PATIENCE, FakeTransport, RecordingClient

URL = "http://engine:80"
CRLF = "a block without LF LF and without choices counts 0 of each, and so is not looked at"
DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"


def event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


def chat(delta: dict[str, Any], **more: Any) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None, **more}
    return event({"id": "chatcmpl-1", "object": "chat.completion.chunk", "choices": [choice]})


def text(token: str, **more: Any) -> bytes:
    return event({"id": "cmpl-1", "choices": [{"index": 0, "text": token, "finish_reason": None}], **more})


ROLE = chat({"role": "assistant", "content": ""})
FIRST, SECOND, THIRD = (chat({"content": token}) for token in ("Hel", "lo", " you"))
END = chat({}, finish_reason="stop")
COUNTS = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10, "prompt_tokens_details": {"cached_tokens": 4}}
USAGE = event({"id": "chatcmpl-1", "choices": [], "usage": COUNTS})
FAILURE = event({"error": {"message": "Internal server error", "type": "InternalServerError", "code": 500}})


class Stream:
    """One relayed stream, from both its ends."""

    def __init__(
        self,
        *,
        drop_usage: bool = True,
        idle: float | None = None,
        first_token: float | None = None,
        status: int = 200,
        chunks: bool = True,
    ) -> None:
        self.client = RecordingClient(chunks)
        self.gaps = Distribution(ITL_BOUNDS)
        self.begun = 0
        self.relay = StreamRelay(URL, self.client, self._begin, self.gaps, drop_usage=drop_usage, idle=idle)
        self.connection = Connection(Origin(URL))
        self.transport = FakeTransport()
        self.connection.connection_made(self.transport)
        self.connection.begin(self.relay, b"", b"")
        self.connection.data_received(b"HTTP/1.1 %d X\r\ntransfer-encoding: chunked\r\n\r\n" % status)
        self.running = asyncio.ensure_future(self.relay.run(self.connection, first_token))

    def _begin(self) -> None:
        self.begun += 1
        self.client.start(200, ())

    def read(self, *reads: bytes) -> None:
        """Each of these is one chunk, and one read."""
        for data in reads:
            if self.connection._receiver is not None:
                self.connection.data_received(b"%x\r\n%b\r\n" % (len(data), data))

    def end(self) -> None:
        if self.connection._receiver is not None:
            self.connection.data_received(b"0\r\n\r\n")

    async def outcome(self) -> BackendError | None:
        """How it ended."""
        try:
            async with asyncio.timeout(PATIENCE):
                await self.running
        except BackendError as error:
            return error
        return None


async def opened(**options: Any) -> Stream:
    """A stream whose relay waits for its first event."""
    stream = Stream(**options)
    await asyncio.sleep(0)
    return stream


async def relayed(*reads: bytes, **options: Any) -> Stream:
    """A stream that ended well after these reads."""
    stream = await opened(**options)
    stream.read(*reads)
    stream.end()
    assert await stream.outcome() is None
    assert stream.client.ended
    return stream


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
        text(""),  # a token of half a character has no text yet
        chat({"content": ""}),
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
        [FIRST + SECOND + FAILURE + DONE],
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
    assert stream.relay.events == 2


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
    assert stream.relay.events == 5
    assert sum(stream.gaps.counts) == 4  # four gaps between five tokens
    assert stream.gaps.sum < PATIENCE
    assert stream.relay.first_token is not None
    assert stream.relay.first_token <= stream.relay.last_token


async def test_tokens_that_came_together_have_no_gap() -> None:
    stream = await relayed(FIRST, SECOND + SECOND + SECOND, DONE)
    assert stream.relay.events == 4
    assert stream.gaps.counts[0] >= 2


async def test_the_word_choices_in_a_text_is_no_token() -> None:
    tricky = text('"choices":[{ \n\n data: [DONE] "error": {} kv_transfer_params')
    stream = await relayed(FIRST, tricky, tricky + tricky, DONE)
    assert stream.client.body == FIRST + tricky * 3 + DONE
    assert stream.relay.events == 4


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
        assert stream.relay.events == 3


async def test_an_event_that_is_no_json_is_passed_on_once_the_stream_has_begun() -> None:
    stream = await relayed(FIRST, b"data: {nope\n\n", b"event: ping\ndata: {}\n\n", DONE)
    assert stream.client.body == FIRST + b"data: {nope\n\n" + b"event: ping\ndata: {}\n\n" + DONE


@pytest.mark.parametrize("end", [b"\r\n", b"\r"])
async def test_other_line_ends_are_understood(end: bytes) -> None:
    reads = [part.replace(b"\n", end) for part in (ROLE, FIRST, SECOND, USAGE, DONE)]
    stream = await opened()
    stream.read(*reads, b": bye\n\n")
    stream.end()
    assert await stream.outcome() is None
    assert stream.client.body == b"".join([*reads[:3], reads[4]]) + b": bye\n\n"
    assert stream.relay.events == 2


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


@pytest.mark.parametrize("broken", [ConnectionResetError(), None])
async def test_a_connection_that_breaks_within_an_event_shows_no_half_of_it(broken: Exception | None) -> None:
    stream = await opened()
    stream.read(ROLE + FIRST, SECOND + THIRD[:20])
    stream.connection.connection_lost(broken)
    assert type(await stream.outcome()) is BackendCut
    assert stream.client.body == ROLE + FIRST + SECOND


async def test_a_connection_that_breaks_before_the_first_token_leaves_the_client_untouched() -> None:
    stream = await opened()
    stream.read(ROLE)
    stream.connection.connection_lost(None)
    assert type(await stream.outcome()) is BackendCut
    assert not stream.client.started


@pytest.mark.parametrize("together", [False, True])
async def test_a_connection_that_breaks_after_the_last_word_broke_nothing(together: bool) -> None:
    stream = await opened()
    stream.read(*([FIRST + DONE] if together else [FIRST, DONE]))
    stream.connection.connection_lost(ConnectionResetError())
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
    stream.connection.data_received(b"%x\r\n%b\r\n0\r\n\r\n" % (len(last), last))
    assert await stream.outcome() is None
    assert stream.client.writes == [FIRST, last]


async def test_a_whole_answer_in_one_read_is_passed_on() -> None:
    stream = await opened()
    whole = ROLE + FIRST + END + USAGE + DONE
    stream.connection.data_received(b"%x\r\n%b\r\n0\r\n\r\n" % (len(whole), whole))
    assert await stream.outcome() is None
    assert stream.client.writes == [ROLE + FIRST + END + DONE]


async def test_an_event_before_the_first_token_that_is_no_json_is_garbled() -> None:
    stream = await opened()
    stream.read(b"data: <html>\n\n")
    assert type(await stream.outcome()) is BackendGarbled
    assert not stream.client.started


@pytest.mark.parametrize("live", [False, True])
async def test_an_event_without_end_is_garbled(live: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = await opened()
    monkeypatch.setattr(stream.relay._reader, "_limit", 1000)
    if live:
        stream.read(FIRST)
    stream.read(b"data: " + b"x" * 1000)
    assert type(await stream.outcome()) is BackendGarbled
    assert stream.transport.aborted


async def test_a_megabyte_without_a_token_is_garbled() -> None:
    stream = await opened()
    for _ in range(1030):
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


class Clock:
    """A clock that a test turns by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(relay_stream, "monotonic", clock)
    return clock


async def test_a_stream_that_speaks_now_and_then_is_not_silent(clock: Clock) -> None:
    stream = await opened(idle=10.0)
    stream.read(FIRST)
    for said in (SECOND, PING, THIRD, USAGE, PING):
        clock.now += 9.0
        stream.relay._check_idle()  # as its timer would
        stream.read(said)
    assert stream.connection._receiver is stream.relay
    clock.now += 11.0
    stream.relay._check_idle()
    assert type(await stream.outcome()) is BackendTimedOut


async def test_half_an_event_now_and_then_is_silence(clock: Clock) -> None:
    stream = await opened(idle=10.0)
    stream.read(FIRST)
    for byte in SECOND[:3]:
        clock.now += 4.0
        stream.read(bytes([byte]))
    stream.relay._check_idle()
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
    assert stream.gaps.counts[ITL_BOUNDS.index(1.0)] == 1
    assert sum(stream.gaps.counts) == 2
    assert stream.gaps.sum == pytest.approx(1.02)
    assert stream.relay.last_token == pytest.approx(1001.02)
    stream.running.cancel()


async def test_time_spent_paused_is_not_the_engines_silence(clock: Clock) -> None:
    stream = await opened(idle=10.0)
    stream.read(FIRST)
    clock.now += 4.0
    stream.relay.pause()
    clock.now += 9.0
    stream.relay._check_idle()
    stream.relay.resume()
    clock.now += 9.0
    stream.relay._check_idle()
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
    assert stream.relay.events == 4
    assert stream.relay.usage is not None
    assert sum(stream.gaps.counts) <= 3


@example(cuts=[])
@given(cuts=CUTS)
def test_any_split_of_an_answer_that_fails_gives_the_client_the_same_bytes(cuts: list[int]) -> None:
    error, stream = relayed_in_pieces(b"".join(FAILING), cuts)
    assert type(error) is BackendFailed
    assert stream.client.body == ROLE + FIRST + SECOND
    assert not stream.client.ended
    assert stream.relay.events == 2


@example(cuts=[len(b"".join(WITH_CRLF[:3])), len(b"".join(WITH_CRLF[:4]))])
@given(cuts=CUTS)
def test_any_split_of_an_answer_with_other_line_ends_gives_the_client_the_same_bytes(cuts: list[int]) -> None:
    error, stream = relayed_in_pieces(b"".join(WITH_CRLF), cuts)
    assert error is None
    assert stream.client.body == b"".join(WITH_CRLF[:3]) + b"data: [DONE]\r\n\r\n"
    assert stream.relay.events == 2
