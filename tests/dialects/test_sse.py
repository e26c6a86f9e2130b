"""Where events end, however their bytes arrive."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from time import process_time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pd_proxy.dialects.sse import EventReader, payload, read, split
from pd_proxy.errors import BackendGarbled

LINE_ENDS = st.sampled_from([b"\n", b"\r\n", b"\r"])
TEXTS = st.binary(max_size=12).map(lambda text: text.replace(b"\n", b"n").replace(b"\r", b"r"))
FIELDS = st.sampled_from([b"data: ", b"data:", b": ", b"event: ", b"id: ", b"data"])


def pieces(stream: bytes, cuts: Iterable[int]) -> list[bytes]:
    """The stream cut at the places given."""
    places = sorted({cut % (len(stream) + 1) for cut in cuts} | {0, len(stream)})
    return [stream[start:stop] for start, stop in pairwise(places)]


def payloads(blocks: Iterable[bytes]) -> list[bytes]:
    """What the events of some blocks carry, leaving out those that carry nothing."""
    return [carried for block in blocks for event in split(block) if (carried := payload(event))]


@st.composite
def streams(draw: st.DrawFn) -> tuple[bytes, list[bytes]]:
    """A stream of well-formed events, each with line ends of any kind, and what its events carry."""
    stream, carried = b"", []
    for _ in range(draw(st.integers(1, 5))):
        values = []
        end = draw(LINE_ENDS)
        for _ in range(draw(st.integers(1, 3))):
            name, text = draw(FIELDS), draw(TEXTS)
            if name == b"data":
                text = b""
            if name.startswith(b"data"):
                values.append(text.removeprefix(b" ") if name == b"data:" else text)
            stream += name + text + end
        stream += end
        if any(values):
            carried.append(b"\n".join(values))
        elif len(values) > 1:
            carried.append(b"\n" * (len(values) - 1))
    return stream, carried


@given(st.binary(max_size=80) | st.text("a\r\n:d", max_size=60).map(str.encode), st.lists(st.integers(0, 80)))
def test_blocks_and_the_rest_are_the_input(stream: bytes, cuts: list[int]) -> None:
    reader = EventReader()
    blocks = [reader.feed(piece) for piece in pieces(stream, cuts)]
    assert b"".join(blocks) + bytes(reader.partial) == stream


@given(streams(), st.lists(st.integers(0, 300), max_size=12))
def test_any_split_gives_the_same_events(made: tuple[bytes, list[bytes]], cuts: list[int]) -> None:
    stream, carried = made
    stream += b": end\n\n"  # a CR that is last of all waits for its LF
    whole, parts = EventReader(), EventReader()
    assert payloads([whole.feed(stream)]) == carried
    assert payloads([parts.feed(piece) for piece in pieces(stream, cuts)]) == carried
    assert whole.partial == parts.partial == b""


@given(streams(), st.lists(st.integers(0, 300), max_size=12))
def test_no_block_ends_within_an_event(made: tuple[bytes, list[bytes]], cuts: list[int]) -> None:
    stream, carried = made
    reader = EventReader()
    seen: list[bytes] = []
    for piece in pieces(stream, cuts):
        block = reader.feed(piece)
        assert not block or block.endswith((b"\n\n", b"\r\r", b"\n\r", b"\r\n")), block
        seen += payloads([block])
        assert seen == carried[: len(seen)]


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_an_event_is_given_as_soon_as_its_empty_line_is_there(end: bytes) -> None:
    reader = EventReader()
    event = b"data: 1" + end + end
    assert reader.feed(event[:-1]) == b""
    assert reader.feed(event[-1:]) == event
    assert bytes(reader.partial) == b""


@pytest.mark.parametrize(
    ("event", "expected"),
    [(b"data: [DONE]\r\n\n", b"[DONE]"), (b"data: a\rdata: b\n\n", b"a\nb"), (b"data: a\r\r\n\n", b"a")],
)
def test_line_ends_of_two_kinds_in_one_event_are_no_part_of_its_payload(event: bytes, expected: bytes) -> None:
    assert payload(event) == expected


def test_a_carriage_return_waits_for_what_follows() -> None:
    reader = EventReader()
    assert reader.feed(b"data: 1\r\n\r") == b""
    assert reader.feed(b"\ndata: 2\r\r") == b"data: 1\r\n\r\n"
    assert reader.feed(b"d") == b"data: 2\r\r"
    assert bytes(reader.partial) == b"d"


def test_an_event_without_an_end_is_garbled_once_it_passes_the_limit() -> None:
    reader = EventReader(limit=100)
    assert reader.feed(b"x" * 100) == b""
    with pytest.raises(BackendGarbled, match="100 bytes"):
        reader.feed(b"x")


def test_many_small_events_do_not_count_together() -> None:
    reader = EventReader(limit=20)
    for _ in range(50):
        assert reader.feed(b"data: 123456\n\n") == b"data: 123456\n\n"


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (b"data: {}\n\n", b"{}"),
        (b"data:{}\n\n", b"{}"),
        (b"data:  two spaces\n\n", b" two spaces"),
        (b"data: {}\r\n\r\n", b"{}"),
        (b"data: {}\r\r", b"{}"),
        (b"data: a\ndata: b\n\n", b"a\nb"),
        (b"data: a\r\ndata: b\r\n\r\n", b"a\nb"),
        (b"event: message\ndata: a\nid: 7\n\n", b"a"),
        (b": ping\n\n", b""),
        (b": ping\ndata: a\n\n", b"a"),
        (b"data\n\n", b""),
        (b"data: \n\n", b""),
        (b"database: no\n\n", b""),
        (b"data: a: b\n\n", b"a: b"),
        (b"\ndata: a\n\n", b"a"),
        (b"\n\n", b""),
    ],
)
def test_the_payload_is_the_data_lines(event: bytes, expected: bytes) -> None:
    assert payload(event) == expected


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_a_block_is_split_into_its_events(end: bytes) -> None:
    events = [b"data: 1" + end + end, b": ping" + end + end, b"data: 2" + end + b"data: 3" + end + end]
    assert split(b"".join(events)) == events


@given(streams())
def test_the_events_of_a_block_are_the_block(made: tuple[bytes, list[bytes]]) -> None:
    block = EventReader().feed(made[0])
    assert b"".join(split(block)) == block


@pytest.mark.parametrize("block", [b"data: 1\n\n\n", b"\n\ndata: 1\n\n"])
def test_spare_empty_lines_neither_grow_nor_vanish(block: bytes) -> None:
    assert b"".join(split(block)) == block


ODD_PIECES = [b"data: a", b"data: ", b"data:", b": hi", b"data: b\ndata: c", b"\n", b"\n\n", b"\r", b"\r\n", b"x"]


@given(st.lists(st.sampled_from(ODD_PIECES) | st.just(b"\n\n"), max_size=9).map(b"".join))
def test_a_block_is_read_as_its_events_and_what_they_carry(block: bytes) -> None:
    assert read(block) == [(event, payload(event)) for event in split(block)]


@pytest.mark.parametrize("piece", [b"x" * 1024, b"x" * 1022 + b"\r\n", b"x" * 1023 + b"\n"], ids=["bare", "CRLF", "LF"])
def test_an_event_without_an_end_costs_no_more_than_its_bytes(piece: bytes) -> None:
    """In 15,000 reads. Were each to copy what came before, a hundred gigabytes would be copied."""
    reader = EventReader()
    started = process_time()
    for _ in range(15_000):
        assert reader.feed(piece) == b""
    assert process_time() - started < 3
    assert len(reader.feed(b"\n\n")) == 15_000 * 1024 + 2
    assert not reader.partial


def test_an_event_that_ends_in_the_next_read_is_whole_then() -> None:
    for end in (b"\n\n", b"\r\n\r\n", b"\n\r\n", b"\r\n\n"):
        for cut in range(len(end)):
            reader = EventReader()
            first, second = b"data: x" + end[:cut], end[cut:] + b"data: y"
            assert reader.feed(first) + reader.feed(second) == b"data: x" + end
            assert reader.partial == b"data: y"
