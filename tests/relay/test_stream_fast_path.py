"""Which reads of a stream are parsed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pd_proxy.errors import (
    BackendFailed,
    BackendLost,
)
from pd_proxy.telemetry.records import ITL_BOUNDS

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
    chunk,
    event,
    opened,
    relayed,
    text,
)


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


async def test_a_client_without_chunked_coding_gets_parsed_events() -> None:
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
