"""An engine's answer that is passed through to the client."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from pd_proxy.errors import BackendAborted, BackendCut, BackendError, BackendFailed, BackendGarbled, BackendTimedOut
from pd_proxy.http.deadlines import Deadlines
from pd_proxy.relay.passthrough import Passthrough

from tests.http.helpers import RecordingClient

JSON = {b"content-type": b"application/json"}
EVENTS = {b"content-type": b"text/event-stream; charset=utf-8"}
NEVER = Deadlines(None)


class FakeConnection:
    def __init__(self) -> None:
        self.calls: list[str] = []

    def pause(self) -> None:
        self.calls.append("pause")

    def resume(self) -> None:
        self.calls.append("resume")

    def abort(self) -> None:
        self.calls.append("abort")


def passing(**limits: Any) -> tuple[Passthrough, RecordingClient, FakeConnection]:
    client, connection = RecordingClient(), FakeConnection()
    kept = {"limit": 1000, "first": NEVER, "idle": NEVER, **limits}
    made = Passthrough("http://engine", client, lambda: client.start(200, [(b"x-a", b"b")]), **kept)
    made.connection = connection  # type: ignore[assignment]
    return made, client, connection


async def answered(*reads: bytes, headers: dict[bytes, bytes] = JSON, end: bool = True, **limits: Any) -> Passthrough:
    made, _, _ = passing(**limits)
    made.head(200, headers)
    for read in reads:
        made.data(read, False)
    if end:
        made.end()
    await made.answered
    return made


async def test_an_answer_in_one_piece_is_whole_before_it_is_anything() -> None:
    made = await answered(b'{"data":[],', b'"usage":{"prompt_tokens":3}}')
    body, usage = made.whole()
    assert body == b'{"data":[],"usage":{"prompt_tokens":3}}' and bytes(usage) == b'{"prompt_tokens":3}'
    assert not made.streamed


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (b"", BackendGarbled),
        (b'{"data":[', BackendGarbled),
        (b"<html>", BackendGarbled),
        (b'{"kv_transfer_params":1,"caf\xe9":1}', BackendGarbled),
        (b'{"error":{"message":"m","code":500}}', BackendFailed),
        (b'{"x":1,"error":"text"}', BackendFailed),
    ],
)
async def test_a_body_that_is_not_an_answer_is_an_error(body: bytes, error: type[BackendError]) -> None:
    made = await answered(body) if body else await answered()
    with pytest.raises(error):
        made.whole()


async def test_a_list_is_rid_of_hand_offs_too() -> None:
    made = await answered(rb'[{"a":1,"kv\u005ftransfer_params":{"remote_host":"10.0.0.1"}}]')
    assert made.whole()[0] == b'[{"a":1}]'


@pytest.mark.parametrize("body", [b"[1,2]", b'{"error":null,"a":1}', b'{"a":1}'])
async def test_other_json_is_the_clients(body: bytes) -> None:
    assert (await answered(body)).whole()[0] == body


async def test_a_hand_off_is_taken_out() -> None:
    made = await answered(b'{"a":1,"kv_transfer_params":{"remote_host":"10.0.0.1"}}')
    assert made.whole()[0] == b'{"a":1}'


async def test_bytes_are_passed_on_with_the_headers_that_describe_them() -> None:
    headers = {b"content-type": b"application/octet-stream", b"metadata": b"{}", b"server": b"uvicorn"}
    made = await answered(b"\x00{not json", headers=headers)
    assert made.whole()[0] == b"\x00{not json"
    assert made.passed_headers() == [(b"content-type", b"application/octet-stream"), (b"metadata", b"{}")]


async def test_too_much_and_too_odd_is_garbled() -> None:
    with pytest.raises(BackendGarbled, match="more than 1000 bytes"):
        await answered(b"x" * 600, b"x" * 600)
    with pytest.raises(BackendGarbled, match="no engine's answer"):
        await answered(headers={b"content-type": b"text/html"})
    with pytest.raises(BackendGarbled, match="no engine's answer"):
        await answered(headers={})


async def test_events_are_given_whole_however_they_are_cut() -> None:
    made, client, _ = passing()
    made.head(200, EVENTS)
    made.data(b"data: 1\n", False)
    assert not client.started
    made.data(b"\ndata: 2\n\ndata", False)
    assert client.writes == [b"data: 1\n\ndata: 2\n\n"] and client.status == 200
    made.data(b": 3\n\n", True)
    made.end()
    await made.answered
    assert made.streamed and client.body == b"data: 1\n\ndata: 2\n\ndata: 3\n\n"


@pytest.mark.parametrize("rest", [b"", b"data: 1\n\ndata: 2"])
async def test_events_that_end_in_the_middle_or_before_they_began_are_cut(rest: bytes) -> None:
    made, _, _ = passing()
    made.head(200, EVENTS)
    if rest:
        made.data(rest, True)
    made.end()
    with pytest.raises(BackendCut):
        await made.answered


async def test_an_error_event_is_an_error_and_the_events_before_it_are_sent() -> None:
    made, client, connection = passing()
    made.head(200, EVENTS)
    made.data(b'data: 1\n\ndata: {"error":{"message":"m","code":500}}\n\ndata: [DONE]\n\n', False)
    with pytest.raises(BackendFailed):
        await made.answered
    assert client.body == b"data: 1\n\n" and connection.calls == ["abort"]
    made, client, _ = passing()
    made.head(200, EVENTS)
    made.data(b'data: {"error":{"message":"m","code":500}}\n\n', False)
    with pytest.raises(BackendFailed):
        await made.answered
    assert not client.started


@pytest.mark.parametrize("end", ['"finish_reason":"abort"', '"finish_reason" : "abort"', '"finish_reason":"error"'])
async def test_an_event_by_which_the_engine_gives_the_request_up_is_an_error(end: str) -> None:
    """As of a transcription under way on an engine that is stopped."""
    said = b'data: {"choices":[{"delta":{"content":"a"},"finish_reason":null}]}\n\n'
    last = b'data: {"choices":[{"delta":{"content":"b"},%b}]}\n\ndata: [DONE]\n\n' % end.encode()
    made, client, _ = passing()
    made.head(200, EVENTS)
    made.data(said, False)
    made.data(said + last, False)
    with pytest.raises(BackendAborted):
        await made.answered
    assert client.body == said + said
    again, client, _ = passing()
    again.head(200, EVENTS)
    again.data(last, False)
    with pytest.raises(BackendAborted):
        await again.answered
    assert not client.started
    good, client, _ = passing()
    good.head(200, EVENTS)
    good.data(said + last.replace(end.encode(), b'"finish_reason":"stop"'), False)
    assert client.body.endswith(b"[DONE]\n\n")


async def test_a_whole_answer_that_the_engine_gave_up_is_none() -> None:
    made = await answered(b'{"choices":[{"message":{"content":"a"},"finish_reason":"abort"}],"usage":{}}')
    with pytest.raises(BackendAborted):
        made.whole()


async def test_a_hand_off_in_an_event_is_taken_out_or_the_event_is_garbled() -> None:
    made, client, _ = passing()
    made.head(200, EVENTS)
    made.data(b'data: {"a":1,"ec_transfer_params":{}}\n\n', False)
    assert client.body == b'data: {"a":1}\n\n'
    made.data(b'data: {"a":1,"ec_transfer_params":{\n\n', False)
    with pytest.raises(BackendGarbled):
        await made.answered


async def test_a_slow_client_pauses_the_engine_and_its_silence_is_not_the_engines() -> None:
    made, client, connection = passing(idle=Deadlines(0.01))
    made.head(200, EVENTS)
    made.data(b"data: 1\n\n", False)
    assert client.flow is made
    made.pause()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await asyncio.shield(made.answered)
    made.resume()
    with pytest.raises(BackendTimedOut, match=r"was silent for 0\.01 s"):
        await made.answered
    assert connection.calls == ["pause", "resume", "abort"]


async def test_a_client_that_leaves_ends_the_exchange() -> None:
    made, client, connection = passing()
    made.head(200, EVENTS)
    made.data(b"data: 1\n\n", False)
    made.stop()
    assert connection.calls == ["abort"] and client.flow is None


async def test_an_answer_has_its_time_from_when_the_request_was_sent() -> None:
    made, _, _ = passing(first=Deadlines(0.01))
    made.sent()
    with pytest.raises(BackendTimedOut, match=r"did not answer within 0\.01 s"):
        await made.answered


async def test_an_answer_in_one_piece_that_trickles_is_given_up() -> None:
    made, _, _ = passing(idle=Deadlines(0.1))
    made.head(200, JSON)
    async with asyncio.timeout(5):
        while not made.answered.done():
            made.data(b" ", False)
            await asyncio.sleep(0.005)
    with pytest.raises(BackendTimedOut):
        await made.answered


@pytest.mark.parametrize("status", [200, 500])
@pytest.mark.parametrize("kind", [b"application/json", b"application/octet-stream", b"text/event-stream"])
async def test_an_answer_in_an_encoding_that_was_not_asked_for_is_an_error(kind: bytes, status: int) -> None:
    made, client, _ = passing()
    made.head(status, {b"content-type": kind, b"content-encoding": b"gzip"})
    with pytest.raises(BackendGarbled, match="encoding"):
        await made.answered
    assert not client.started
