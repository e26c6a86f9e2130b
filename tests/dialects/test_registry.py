"""Streams whose events have names: what is held, what is passed on, what is taken out, and how they end."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pd_proxy.dialects.dialect import Dialect
from pd_proxy.dialects.registry import DIALECTS
from pd_proxy.errors import BackendCut, BackendError, BackendFailed, BackendGarbled, BackendPreempted

from tests.relay.streams import PING, Stream, chunk, opened, relayed

MESSAGES, RESPONSES = DIALECTS["messages"], DIALECTS["responses"]
PARAMS = {"remote_host": "10.0.0.7", "remote_block_ids": [[1]]}


def named(kind: str, **members: Any) -> bytes:
    data = json.dumps({"type": kind, **members}, separators=(",", ":"))
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), data.encode())


def block(text: str) -> bytes:
    return named("content_block_delta", index=0, delta={"type": "text_delta", "text": text})


def delta(text: str, number: int) -> bytes:
    return named("response.output_text.delta", delta=text, sequence_number=number)


START = named("message_start", message={"id": "m", "usage": {"input_tokens": 4, "output_tokens": 0}})
OPEN = named("content_block_start", index=0, content_block={"type": "text", "text": ""})
USAGE = {"input_tokens": 3, "output_tokens": 2, "cache_read_input_tokens": 1}
ENDING = named("message_delta", delta={"stop_reason": "end_turn", "stop_sequence": None}, usage=USAGE)
STOP = named("message_stop")
MESSAGE = [START, OPEN, block("Hel"), block("lo"), named("content_block_stop", index=0), ENDING, STOP]

CREATED = named("response.created", response={"id": "r", "usage": None}, sequence_number=0)
ADDED = named("response.output_item.added", item={"type": "message"}, sequence_number=1)
TOTAL = {"input_tokens": 4, "output_tokens": 2, "input_tokens_details": {"cached_tokens": 1}}
COMPLETED = named("response.completed", response={"id": "r", "usage": TOTAL}, sequence_number=4)
RESPONSE = [CREATED, ADDED, delta("Hel", 2), delta("lo", 3), COMPLETED]

EVERY = pytest.mark.parametrize(
    ("dialect", "events"), [(MESSAGES, MESSAGE), (RESPONSES, RESPONSE)], ids=["messages", "responses"]
)


async def broken(dialect: Dialect, *events: bytes, end: bool = True) -> tuple[Stream, BackendError]:
    """A stream that failed after these reads."""
    stream = await opened(dialect=dialect, finished=False)
    stream.read(*events)
    if end:
        stream.end()
    error = await stream.outcome()
    assert error is not None and not stream.client.ended
    return stream, error


@EVERY
async def test_a_stream_is_passed_on_as_it_came_and_its_usage_is_read(dialect: Dialect, events: list[bytes]) -> None:
    stream = await relayed(*events, dialect=dialect, finished=False)
    assert stream.client.body == b"".join(events)
    assert (stream.begun, stream.relay.given()[0]) == (1, 2)
    usage = stream.relay.usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (4, 2, 1)


@pytest.mark.parametrize(("dialect", "events"), [(MESSAGES, MESSAGE), (RESPONSES, RESPONSE)])
@given(data=st.data())
async def test_however_it_is_cut_the_client_gets_the_same_bytes(
    dialect: Dialect, events: list[bytes], data: st.DataObject
) -> None:
    whole = b"".join(events)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(whole) - 1), max_size=8)))
    pieces = [whole[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    stream = await relayed(*pieces, dialect=dialect, finished=False)
    assert stream.client.body == whole and stream.relay.given()[0] == 2


@EVERY
async def test_nothing_is_sent_before_the_first_token(dialect: Dialect, events: list[bytes]) -> None:
    stream = await opened(dialect=dialect, finished=False)
    stream.read(*events[:2], PING)
    assert not stream.client.started and not stream.relay.live
    stream.read(events[2])
    assert stream.client.body == b"".join([*events[:2], PING, events[2]])
    stream.lose(None)
    assert isinstance(await stream.outcome(), BackendCut)


async def test_an_answer_without_a_token_is_one() -> None:
    stream = await relayed(START, ENDING, STOP, dialect=MESSAGES, finished=False)
    assert stream.client.body == START + ENDING + STOP
    stream = await relayed(CREATED, COMPLETED, dialect=RESPONSES, finished=False)
    assert stream.client.body == CREATED + COMPLETED


async def test_bytes_after_the_last_event_are_sent_with_it() -> None:
    tail = b"data: [DONE]\n\n"
    stream = await relayed(*MESSAGE, tail, dialect=MESSAGES, finished=False)
    assert stream.client.body == b"".join(MESSAGE) + tail
    stream = await opened(dialect=MESSAGES, finished=False)
    stream.read(*MESSAGE)
    stream.lose(None)  # a connection that breaks after it broke nothing
    assert await stream.outcome() is None and stream.client.body == b"".join(MESSAGE)


@EVERY
async def test_without_its_last_event_it_is_cut(dialect: Dialect, events: list[bytes]) -> None:
    stream, error = await broken(dialect, *events[:-1])
    assert isinstance(error, BackendCut) and "last event" in str(error)
    assert stream.client.body == b"".join(events[:-1])


ENGINE_ERROR = {"type": "internal_error", "message": "no luck"}
FAILURES = [
    (MESSAGES, named("error", error=ENGINE_ERROR), MESSAGE),
    (RESPONSES, named("response.failed", response={"error": {"code": "x", "message": "no luck"}}), RESPONSE),
    (RESPONSES, named("error", code="x", message="no luck", param=None, sequence_number=3), RESPONSE),
    (RESPONSES, b'data: {"error":{"message":"no luck","type":"InternalServerError","code":500}}\n\n', RESPONSE),
]


@pytest.mark.parametrize(("dialect", "failure", "events"), FAILURES)
@pytest.mark.parametrize("seen", [0, 2, 3])
async def test_an_error_of_the_engine_is_raised_to_the_flow_and_not_sent_to_the_client(
    dialect: Dialect, failure: bytes, events: list[bytes], seen: int
) -> None:
    stream, error = await broken(dialect, *events[:seen], failure, end=False)
    assert isinstance(error, BackendFailed) and error.public_message == "no luck"
    assert stream.relay.live is (seen == 3)
    assert stream.client.body == (b"".join(events[:3]) if seen == 3 else b"")


async def test_a_refusal_keeps_its_status() -> None:
    _, error = await broken(MESSAGES, named("error", error={**ENGINE_ERROR, "code": 404}), end=False)
    assert (error.status, error.retryable) == (404, False)


@pytest.mark.parametrize("garbage", [b'event: x\ndata: {"type": "mess\n\n', b"data: 5\n\n", b'data: {"type": 5}\n\n'])
async def test_data_that_is_not_an_event_is_not_passed_on(garbage: bytes) -> None:
    stream, error = await broken(MESSAGES, *MESSAGE[:3], garbage, end=False)
    assert isinstance(error, BackendGarbled) and stream.client.body == b"".join(MESSAGE[:3])


async def test_an_engine_that_wants_the_request_again_is_not_believed() -> None:
    ending = named("message_delta", delta={"stop_reason": "stop_sequence", "stop_sequence": "recomputed"})
    _, error = await broken(MESSAGES, *MESSAGE[:3], ending, end=False)
    assert isinstance(error, BackendPreempted)


async def test_the_engines_addresses_are_not_shown() -> None:
    hidden: dict[str, Any] = {"kv_transfer_params": PARAMS, "ec_transfer_params": {"peer_host": "10.0.0.8"}}
    start = named("message_start", message={"id": "m", **hidden}, **hidden)
    stream = await relayed(start, *MESSAGE[1:], dialect=MESSAGES, finished=False)
    shown = named("message_start", message={"id": "m"})
    assert stream.client.body == shown + b"".join(MESSAGE[1:])
    completed = named("response.completed", response={"id": "r", "usage": TOTAL, **hidden}, sequence_number=4)
    stream = await relayed(*RESPONSE[:-1], completed, dialect=RESPONSES, finished=False)
    assert stream.client.body == b"".join(RESPONSE)
    assert stream.relay.usage is not None and stream.relay.usage.completion_tokens == 2


async def test_a_clients_own_words_are_left_as_they_are() -> None:
    said = block('{"kv_transfer_params": 1}')
    tools = named("response.created", response={"tools": [{"parameters": {"kv_transfer_params": {}}}]})
    stream = await relayed(START, said, STOP, dialect=MESSAGES, finished=False)
    assert stream.client.body == START + said + STOP
    stream = await relayed(tools, *RESPONSE[2:], dialect=RESPONSES, finished=False)
    assert stream.client.body == tools + b"".join(RESPONSE[2:])


async def test_the_number_of_the_last_event_that_went_out_is_known() -> None:
    stream, _ = await broken(RESPONSES, *RESPONSE[:3])
    assert stream.relay.sequence == 2
    stream = await opened(dialect=RESPONSES, finished=False)
    failure = named("error", code="x", message="no luck", sequence_number=3)
    stream.feed(*map(chunk, (b"".join(RESPONSE[:3]), failure)))
    assert isinstance(await stream.outcome(), BackendFailed)
    assert stream.relay.sequence == 2 and stream.client.body == b"".join(RESPONSE[:3])
