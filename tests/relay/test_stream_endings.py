"""How a stream ends, well or not, and errors in place of one."""

from __future__ import annotations

import asyncio
import json
from functools import partialmethod

import pytest
from pd_proxy.dialects.sse import EventReader
from pd_proxy.errors import (
    BackendBusy,
    BackendCut,
    BackendError,
    BackendFailed,
    BackendGarbled,
    BackendLost,
    BackendRejected,
)
from pd_proxy.relay import stream as relay_stream

from .streams import (
    DONE,
    END,
    FIRST,
    PING,
    ROLE,
    SECOND,
    THIRD,
    USAGE,
    chunk,
    opened,
    text,
)


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
