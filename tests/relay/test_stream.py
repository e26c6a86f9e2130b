"""The relay of a stream, from an engine's reads to a client's writes, without a socket between."""

from __future__ import annotations

import asyncio

import pytest
from pd_proxy.dialects.edit import Edit
from pd_proxy.errors import (
    BackendBusy,
    BackendCut,
    BackendError,
    BackendFailed,
    BackendGarbled,
    BackendPreempted,
    BackendRejected,
)

from tests.http.helpers import TIMEOUT

from .streams import (
    COUNTS,
    DONE,
    END,
    FAILURE,
    FIRST,
    PING,
    ROLE,
    SECOND,
    THIRD,
    USAGE,
    Clock,
    chat,
    event,
    identity,
    opened,
    relayed,
    text,
)


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
async def test_an_error_event_is_the_error_of_its_code(code: object, kind: type[BackendError]) -> None:
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


@pytest.mark.parametrize("edit", [Edit(), Edit(hide_ids=True), Edit(identity=identity(id="x"), earlier_tokens=3)])
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
    assert stream.client.body == b"".join(
        part.replace(b"chatcmpl-1", b"x") if edit.earlier_tokens else part for part in OPENING
    )
    assert not stream.client.ended
    assert not stream.transcript.finished
    assert stream.relay.given()[0] == 2


async def test_the_word_recomputed_in_a_text_is_no_preemption() -> None:
    said = chat({"content": '"stop_reason":"recomputed"'})
    stream = await relayed(FIRST, said, said + said, DONE)
    assert stream.client.body == FIRST + said * 3 + DONE


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
    assert stream.gaps.sum < TIMEOUT
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
