"""SGLang's own events: what ends a stream, what fails it, and what waits for prefill's log probabilities."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from pd_proxy.decoding import Undecodable
from pd_proxy.dialects.prompt_logprobs import PromptLogprobs
from pd_proxy.dialects.sglang import SGLANG
from pd_proxy.errors import (
    BackendAborted,
    BackendBusy,
    BackendCut,
    BackendError,
    BackendFailed,
    BackendGarbled,
    BackendRejected,
)
from pd_proxy.relay import stream as relay_stream

from tests.relay.streams import DONE, PING, Stream, event, opened, relayed

LENGTH = {"type": "length", "length": 2}


def said(text: str, tokens: int, finish: Any = None, index: int | None = None, **meta: Any) -> bytes:
    meta_counts = {
        "id": "r",
        "finish_reason": finish,
        "prompt_tokens": 7,
        "completion_tokens": tokens,
        "cached_tokens": 4,
    }
    more = {} if index is None else {"index": index}
    return event({"text": text, "output_ids": [1] * tokens, "meta_info": {**meta_counts, **meta}, **more})


ANSWER = [said("Hel", 1), said("Hello", 2, LENGTH), DONE]
ABORT = {"type": "abort", "message": "no KV cache", "status_code": 500, "err_type": "InternalServerError"}


async def failed(*events: bytes, prompts: int = 0, end: bool = True) -> tuple[Stream, BackendError]:
    stream = await opened(dialect=SGLANG, prompts=prompts, finished=False)
    stream.read(*events)
    if end:
        stream.end()
    error = await stream.outcome()
    assert error is not None and not stream.client.ended
    return stream, error


async def test_a_stream_is_passed_on_as_it_came_and_counted() -> None:
    stream = await relayed(PING, *ANSWER, dialect=SGLANG, finished=False, drop_usage=False)
    assert stream.client.body == PING + b"".join(ANSWER)
    assert stream.relay.given()[0] == 2
    usage = stream.relay.usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (7, 2, 4)


async def test_the_usage_of_a_batch_is_that_of_all() -> None:
    batch = [
        said("a", 1, index=1),
        said("b", 1, index=0),
        said("ab", 2, LENGTH, index=1),
        said("bc", 2, LENGTH, index=0),
    ]
    stream = await relayed(*batch, DONE, dialect=SGLANG, prompts=2, finished=False, drop_usage=False)
    usage = stream.relay.usage
    assert usage is not None and (usage.prompt_tokens, usage.completion_tokens) == (14, 4)


@pytest.mark.parametrize(
    ("events", "prompts"),
    [
        ([DONE], 0),
        ([said("a", 1), DONE], 0),
        ([said("a", 1, LENGTH, index=0), DONE], 2),
        ([said("a", 1, LENGTH, index=0), said("b", 1, index=1), DONE], 2),
        ([event({"text": "a"})], 0),
        ([event({"meta_info": 5})], 0),
        ([b"data: [5]\n\n"], 0),
        ([b"data: {\n\n"], 0),
    ],
)
async def test_a_stream_that_is_not_a_whole_answer_is_an_error(events: list[bytes], prompts: int) -> None:
    _, error = await failed(*events, prompts=prompts)
    assert isinstance(error, BackendGarbled)


async def test_a_stream_that_ends_without_its_last_word_was_cut() -> None:
    stream, error = await failed(*ANSWER[:-1])
    assert isinstance(error, BackendCut) and stream.client.body == b"".join(ANSWER[:-1])


@pytest.mark.parametrize(
    ("last", "kind", "status"),
    [
        (said("", 0, ABORT), BackendFailed, 500),
        (said("", 0, {**ABORT, "status_code": 503}), BackendBusy, 503),
        (said("", 0, {"type": "abort", "message": "x", "status_code": 503}), BackendBusy, 503),
        (said("", 0, {**ABORT, "status_code": 400}), BackendRejected, 400),
        (event({"error": {"message": "too long"}}), BackendRejected, 400),
        (event({"error": "too long"}), BackendRejected, 400),
        (event({"error": {"message": "x", "code": 500}}), BackendFailed, 500),
    ],
)
@pytest.mark.parametrize("first", [[], ANSWER[:1]], ids=["before", "after"])
async def test_an_engine_that_gives_up_has_failed(
    last: bytes, kind: type[BackendError], status: int, first: list[bytes]
) -> None:
    stream, error = await failed(*first, last, DONE)
    assert type(error) is kind and error.status == status
    assert not error.unread, "it was read, so that its room is used"
    assert stream.client.body == b"".join(first)
    whole = SGLANG.decode_whole(last.removeprefix(b"data: "))
    assert json.loads(bytes(whole.error))["code"] == status


async def test_a_failure_that_names_rooms_or_addresses_is_not_quoted() -> None:
    for where in ("bootstrap_room=81", "10.0.0.7:8998"):
        _, error = await failed(said("", 0, {**ABORT, "message": f"Decode handshake failed for {where}"}))
        assert where.encode() not in error.body() and where not in error.public_message


async def test_an_abort_without_a_status_is_its_engines_failure() -> None:
    stream = await opened(dialect=SGLANG, finished=False)
    stream.read(said("a", 1), said("a", 1, {"type": "abort", "message": "Aborted"}), DONE)
    assert type(await stream.outcome()) is BackendAborted
    assert stream.client.body == said("a", 1)


async def test_members_that_name_engines_are_taken_out() -> None:
    evil = event({"text": "a", "meta_info": {"finish_reason": None}, "kv_transfer_params": {"remote_host": "10.0.0.7"}})
    stream = await relayed(evil, *ANSWER, dialect=SGLANG, finished=False)
    assert b"10.0.0.7" not in stream.client.body and stream.client.body.endswith(b"".join(ANSWER))


def test_a_whole_answer_has_its_usage() -> None:
    one = ANSWER[1].removeprefix(b"data: ")
    assert json.loads(bytes(SGLANG.decode_whole(one).usage))["completion_tokens"] == 2
    assert json.loads(bytes(SGLANG.decode_whole(b"[%b,%b]" % (one, one)).usage))["completion_tokens"] == 4
    for garbage in (b"{}", b"[]", b"5", b'{"text":"a"}', b'[{"meta_info":{}},{}]'):
        with pytest.raises(Undecodable):
            SGLANG.decode_whole(garbage)


# With log probabilities of the prompt

GIVEN = [[None, 5, None], [-0.5, 6, None]]
PREFILLS = json.dumps({"meta_info": {"input_token_logprobs": GIVEN}}).encode()
OWN = {"input_token_logprobs": [], "output_token_logprobs": [[-0.1, 1, None]]}
SCORED = [said("Hel", 1, **OWN), said("Hello", 2, LENGTH, **OWN), DONE]


async def scored(*events: bytes) -> tuple[Stream, PromptLogprobs]:
    logprobs = PromptLogprobs(asyncio.get_running_loop())
    stream = await opened(dialect=SGLANG, logprobs=logprobs, finished=False)
    stream.read(*events)
    return stream, logprobs


def shown(stream: Stream) -> list[Any]:
    payloads = stream.client.body.decode().strip().split("\n\n")
    return [json.loads(payload[6:])["meta_info"] for payload in payloads if payload != "data: [DONE]"]


@pytest.mark.parametrize("early", [0, 1, 2, 3])
async def test_nothing_goes_out_before_prefills_are_here(early: int) -> None:
    stream, logprobs = await scored(*SCORED[:early])
    if early == 3:
        stream.end()
    await asyncio.sleep(0)
    assert not stream.client.started and not stream.relay.live and not stream.running.done()
    logprobs.take(PREFILLS)
    await asyncio.sleep(0)
    assert stream.relay.live is (early > 0)
    stream.read(*SCORED[early:])
    if early < 3:
        stream.end()
    assert await stream.outcome() is None
    assert [meta["input_token_logprobs"] for meta in shown(stream)] == [GIVEN, GIVEN]
    assert [meta["output_token_logprobs"] for meta in shown(stream)] == [OWN["output_token_logprobs"]] * 2
    assert stream.client.body.endswith(DONE) and stream.client.ended


@pytest.mark.parametrize("last", [said("", 0, ABORT), event({"error": {"message": "x", "code": 500}}), event({})])
async def test_an_engine_that_fails_meanwhile_is_noticed_at_once(last: bytes) -> None:
    stream, _ = await scored(SCORED[0], last)
    error = await stream.outcome()
    assert isinstance(error, BackendFailed | BackendGarbled) and not stream.client.started


async def test_a_connection_that_breaks_meanwhile_is_noticed_at_once() -> None:
    stream, logprobs = await scored(SCORED[0])
    stream.connection.connection_lost(None)
    assert isinstance(await stream.outcome(), BackendError)
    logprobs.take(PREFILLS)  # comes too late, and does nothing
    await asyncio.sleep(0)
    assert not stream.client.started


async def test_an_engine_that_sends_much_meanwhile_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_stream, "_WAITING_LIMIT", 100)
    stream, logprobs = await scored(*SCORED[:1])
    assert not stream.transport.reading
    logprobs.take(PREFILLS)
    await asyncio.sleep(0)
    assert stream.transport.reading
    stream.read(*SCORED[1:])
    stream.end()
    assert await stream.outcome() is None


async def test_a_try_that_was_given_up_does_not_begin_the_clients_answer() -> None:
    stream = await opened(dialect=SGLANG, finished=False)
    stream.running.cancel()
    stream.read(*ANSWER)  # in the same turn of the loop
    with pytest.raises(asyncio.CancelledError):
        await stream.running
    assert not stream.client.started and stream.begun == 0
