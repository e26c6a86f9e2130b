"""Streams whose bytes are split at any place, and many events in one read."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pd_proxy.dialects.edit import Edit
from pd_proxy.errors import (
    BackendError,
    BackendFailed,
    BackendLost,
)

from tests.http.helpers import TIMEOUT

from .streams import (
    DONE,
    END,
    FAILURE,
    FIRST,
    PING,
    ROLE,
    SECOND,
    THIRD,
    USAGE,
    Stream,
    chat,
    chunk,
    opened,
    text,
)

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
    # Where the failure is read together with the first text, none of it goes out: the request can be tried elsewhere.
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
    assert stream.transcript.truncate() == b"1,2,3," + b",".join(b"%d" % token for token in range(301, 331))
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
    async with asyncio.timeout(TIMEOUT):
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
