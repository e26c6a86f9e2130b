"""The HTTP/1.1 client against an engine whose bytes the tests write."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from itertools import pairwise
from time import monotonic

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pd_proxy.errors import BackendCut, BackendError, BackendGarbled, BackendTimedOut, BackendUnreachable
from pd_proxy.http import origin as origin_module
from pd_proxy.http.collected import Collected
from pd_proxy.http.connection import HEAD_LIMIT, Connection
from pd_proxy.http.deadlines import Deadlines
from pd_proxy.http.origin import Origin

from .helpers import Engine, FakeTransport, Recorder

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    async with Engine() as engine:
        yield engine


@pytest.fixture
async def origin(engine: Engine) -> AsyncIterator[Origin]:
    origin = Origin(engine.url)
    yield origin
    origin.close()


async def ask(origin: Origin, body: bytes = b"{}", headers: bytes = b"") -> Recorder:
    """Send one request; returns the receiver of its answer."""
    recorder = Recorder()
    await origin.send("/v1/completions", headers, (body,), recorder)
    return recorder


async def answer(engine: Engine, origin: Origin, said: bytes, close: bool = True) -> Recorder:
    """The receiver of a first request that the engine answers with these bytes."""
    recorder = await ask(origin)
    peer = await engine.accept()
    await peer.request()
    peer.say(said)
    if close:
        peer.close()
    await recorder.ended()
    return recorder


# The request


async def test_a_request_is_one_post_with_its_length(engine: Engine, origin: Origin) -> None:
    await ask(origin, b'{"a":1}', b"x-request-id: 7\r\n")
    assert (
        await (await engine.accept()).request()
        == (
            b"POST /v1/completions HTTP/1.1\r\nhost: %b\r\ncontent-type: application/json\r\ncontent-length: 7\r\n"
            b'x-request-id: 7\r\n\r\n{"a":1}'
        )
        % engine.url.removeprefix("http://").encode()
    )


async def test_a_large_body_arrives_whole(engine: Engine, origin: Origin) -> None:
    body = bytes(range(256)) * 4096
    await ask(origin, body)
    assert (await (await engine.accept()).request()).endswith(b"\r\n\r\n" + body)


async def test_a_path_in_the_backends_url_stands_before_every_path(engine: Engine) -> None:
    origin = Origin(engine.url + "/engines/a")
    await ask(origin)
    assert (await (await engine.accept()).request()).startswith(b"POST /engines/a/v1/completions HTTP/1.1\r\n")
    origin.close()


# Reuse of connections


async def test_a_connection_is_kept_for_the_next_request(engine: Engine, origin: Origin) -> None:
    peer = None
    for number in range(3):
        recorder = await ask(origin, b"%d" % number)
        peer = peer or await engine.accept()
        assert (await peer.request()).endswith(b"\r\n\r\n%d" % number)
        peer.say(OK)
        assert await recorder.ended() == "end"
        assert recorder.body == b"ok"
    assert engine.waiting == 0


async def test_two_requests_at_once_have_two_connections(engine: Engine, origin: Origin) -> None:
    first, second = await ask(origin, b"1"), await ask(origin, b"2")
    one, two = await engine.accept(), await engine.accept()
    for peer in (two, one):
        said = (await peer.request())[-1:]
        peer.say(b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n" + said)
    await first.ended()
    await second.ended()
    assert (first.body, second.body) == (b"1", b"2")


@pytest.mark.parametrize(
    "said",
    [
        b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok",
        b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok",
    ],
)
async def test_a_connection_that_the_engine_will_not_keep_is_closed(
    engine: Engine, origin: Origin, said: bytes
) -> None:
    recorder = await answer(engine, origin, said, close=False)
    assert recorder.endings == ["end"]
    assert recorder.body == b"ok"
    assert await engine.peers[0].left()
    await ask(origin)
    await (await engine.accept()).request()


async def test_a_kept_connection_that_closes_as_a_request_arrives_is_not_the_engines_fault(
    engine: Engine, origin: Origin
) -> None:
    await answer(engine, origin, OK, close=False)
    recorder = await ask(origin)
    await engine.peers[0].request()
    engine.peers[0].close()
    assert await recorder.ended() == "lost"
    assert isinstance(recorder.error, BackendCut)
    assert not recorder.error.blame


async def test_a_kept_connection_that_closes_within_an_answer_is_the_engines_fault(
    engine: Engine, origin: Origin
) -> None:
    await answer(engine, origin, OK, close=False)
    recorder = await ask(origin)
    await engine.peers[0].request()
    engine.peers[0].say(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\no")
    engine.peers[0].close()
    assert await recorder.ended() == "lost"
    assert isinstance(recorder.error, BackendCut)
    assert recorder.error.blame


async def test_a_new_connection_that_closes_without_an_answer_is_the_engines_fault(
    engine: Engine, origin: Origin
) -> None:
    recorder = await answer(engine, origin, b"")
    assert isinstance(recorder.error, BackendCut)
    assert recorder.error.blame


async def test_a_kept_connection_seen_to_close_is_not_used(engine: Engine, origin: Origin) -> None:
    recorder = Recorder()
    connection = await origin.send("/", b"", (b"{}",), recorder)
    peer = await engine.accept()
    await peer.request()
    peer.say(OK)
    await recorder.ended()
    connection.connection_lost(None)
    await ask(origin)
    await (await engine.accept()).request()


async def test_a_connection_idle_for_too_long_is_not_used(
    engine: Engine, origin: Origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    await answer(engine, origin, OK, close=False)
    monkeypatch.setattr(origin_module, "KEEPALIVE", -1.0)
    await ask(origin)
    await (await engine.accept()).request()
    assert await engine.peers[0].left()


async def test_an_answer_without_a_request_ends_an_idle_connection(engine: Engine, origin: Origin) -> None:
    await answer(engine, origin, OK, close=False)
    engine.peers[0].say(b"HTTP/1.1 408 Request Timeout\r\n\r\n")
    assert await engine.peers[0].left()


async def test_closing_an_origin_closes_idle_connections_now_and_busy_ones_after_their_exchange(
    engine: Engine, origin: Origin
) -> None:
    busy = await ask(origin)
    peer = await engine.accept()
    await answer(engine, origin, OK, close=False)
    origin.close()
    assert await engine.peers[1].left()
    peer.say(OK)
    assert await busy.ended() == "end"
    assert await peer.left()


async def test_abort_closes_the_connection_and_ends_the_calls_of_the_receiver(engine: Engine, origin: Origin) -> None:
    recorder = Recorder()
    connection = await origin.send("/", b"", (b"{}",), recorder)
    peer = await engine.accept()
    await peer.request()
    peer.say(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
    connection.abort()
    assert await peer.left()
    assert recorder.endings == []


# Connections that cannot be made


async def test_a_refused_connection_is_an_unreachable_backend_that_has_read_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(BackendUnreachable, match=f"http://127.0.0.1:{port}: ") as caught:
        await ask(Origin(f"http://127.0.0.1:{port}"))
    assert caught.value.unread
    assert caught.value.blame


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a..b"], ids=["no such host", "no valid name"])
async def test_a_name_that_does_not_resolve_is_an_unreachable_backend(host: str) -> None:
    with pytest.raises(BackendUnreachable, match=host):
        await ask(Origin(f"http://{host}:80"))


@pytest.mark.parametrize(("connect_timeout", "within"), [(0.02, None), (30.0, 0.02)])
async def test_a_connection_that_is_not_made_in_time_is_an_unreachable_backend(
    connect_timeout: float, within: float | None
) -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        fillers = []
        for _ in range(4):  # more than its queue holds, so that the next one waits
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
            fillers.append(filler)
        origin = Origin(f"http://127.0.0.1:{full.getsockname()[1]}", connect_timeout=connect_timeout)
        with pytest.raises(BackendUnreachable, match=r"no connection within 0\.02 s"):
            await origin.send("/", b"", (b"{}",), Recorder(), within=within)
        for filler in fillers:
            filler.close()


# Answers


@pytest.mark.parametrize(
    ("said", "status", "body"),
    [
        (OK, 200, b"ok"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", 200, b""),
        (b"HTTP/1.1 500 Oh\r\nContent-Length: 3\r\n\r\nbad", 500, b"bad"),
        (b"HTTP/1.1 200 OK\r\n\r\nuntil the close", 200, b"until the close"),
        (b"HTTP/1.0 200 OK\r\n\r\nuntil the close", 200, b"until the close"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + OK, 200, b"ok"),
        (b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n" + OK, 200, b"ok"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", 204, b""),
        (
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n1A\r\n" + b"z" * 26 + b"\r\n0\r\n\r\n",
            200,
            b"ok" + b"z" * 26,
        ),
    ],
)
async def test_an_answer_is_received_whole(
    engine: Engine, origin: Origin, said: bytes, status: int, body: bytes
) -> None:
    recorder = await answer(engine, origin, said)
    assert recorder.endings == ["end"]
    assert recorder.heads == 1
    assert (recorder.status, recorder.body) == (status, body)


async def test_header_names_are_in_lower_case_and_of_repeated_ones_the_last_counts(
    engine: Engine, origin: Origin
) -> None:
    recorder = await answer(engine, origin, b"HTTP/1.1 200 OK\r\nX-A: 1\r\nX-a: 2\r\nContent-Length: 0\r\n\r\n")
    assert recorder.headers == {b"x-a": b"2", b"content-length": b"0"}


@pytest.mark.parametrize(
    "said",
    [
        b"HTTP/1.1 200 OK\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n",
    ],
)
async def test_an_answer_that_ends_too_early_is_cut(engine: Engine, origin: Origin, said: bytes) -> None:
    recorder = await answer(engine, origin, said)
    assert recorder.endings == ["lost"]
    assert type(recorder.error) is BackendCut
    assert engine.url in str(recorder.error)


@pytest.mark.parametrize(
    "said",
    [
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"\x00\x01\x02\x03",
        b"HTTP/1.1 200 OK\r\ncontent-length: two\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nokay\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n",
    ],
)
async def test_an_answer_that_is_not_http_is_garbled_and_ends_the_connection(
    engine: Engine, origin: Origin, said: bytes
) -> None:
    recorder = await answer(engine, origin, said, close=False)
    assert recorder.endings == ["lost"]
    assert type(recorder.error) is BackendGarbled
    assert await engine.peers[0].left()


async def test_endless_headers_are_garbled(engine: Engine, origin: Origin) -> None:
    recorder = await ask(origin)
    peer = await engine.accept()
    peer.say(b"HTTP/1.1 200 OK\r\n")
    line = b"x: " + b"x" * 1000 + b"\r\n"
    for _ in range(HEAD_LIMIT // len(line) + 2):
        peer.say(line)
    assert await recorder.ended() == "lost"
    assert isinstance(recorder.error, BackendGarbled)
    assert str(HEAD_LIMIT) in str(recorder.error)
    assert await peer.left()


# The collected answer


async def test_a_collected_answer_is_its_body(engine: Engine, origin: Origin) -> None:
    collected = Collected(engine.url, limit=100)
    collected.connection = await origin.send("/", b"", (b"{}",), collected)
    peer = await engine.accept()
    peer.say(b"HTTP/1.1 418 Tea\r\ntransfer-encoding: chunked\r\nx-a: b\r\n\r\n5\r\nhello\r\n")
    peer.say(b"6\r\n world\r\n0\r\n\r\n")
    assert await collected.wait(Deadlines(None)) == b"hello world"
    assert collected.status == 418
    assert collected.headers[b"x-a"] == b"b"


async def test_a_collected_answer_that_takes_too_long_ends_its_exchange(engine: Engine, origin: Origin) -> None:
    collected = Collected(engine.url, limit=100)
    collected.connection = await origin.send("/", b"", (b"{}",), collected)
    peer = await engine.accept()
    peer.say(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf")
    with pytest.raises(BackendTimedOut, match=r"did not answer within 0\.02 s"):
        await collected.wait(Deadlines(0.02))
    assert await peer.left()


@pytest.mark.parametrize("framing", [b"content-length: 101\r\n\r\n", b"transfer-encoding: chunked\r\n\r\n65\r\n"])
async def test_a_collected_answer_over_its_limit_is_garbled(engine: Engine, origin: Origin, framing: bytes) -> None:
    collected = Collected(engine.url, limit=100)
    collected.connection = await origin.send("/", b"", (b"{}",), collected)
    peer = await engine.accept()
    peer.say(b"HTTP/1.1 200 OK\r\n" + framing + b"x" * 101)
    with pytest.raises(BackendGarbled, match="more than 100 bytes"):
        await collected.wait(Deadlines(None))
    assert await peer.left()


async def test_a_collected_answer_of_exactly_its_limit_is_good(engine: Engine, origin: Origin) -> None:
    collected = Collected(engine.url, limit=100)
    collected.connection = await origin.send("/", b"", (b"{}",), collected)
    (await engine.accept()).say(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n" + b"x" * 100)
    assert await collected.wait(Deadlines(None)) == b"x" * 100


async def test_cancelling_the_wait_ends_the_exchange(engine: Engine, origin: Origin) -> None:
    collected = Collected(engine.url, limit=100)
    collected.connection = await origin.send("/", b"", (b"{}",), collected)
    peer = await engine.accept()
    waiting = asyncio.create_task(collected.wait(Deadlines(None)))
    await peer.request()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await peer.left()


async def test_a_collected_answer_can_be_failed_from_outside(engine: Engine, origin: Origin) -> None:
    collected = Collected(engine.url, limit=100)
    collected.connection = await origin.send("/", b"", (b"{}",), collected)
    peer = await engine.accept()
    collected.fail(BackendError("given up"))
    with pytest.raises(BackendError, match="given up"):
        await collected.wait(Deadlines(None))
    assert await peer.left()


# Requests that are sent together


async def posted(count: int = 1) -> tuple[Origin, list[FakeTransport], list[Recorder], list[Connection]]:
    """Requests that begin in this turn of the event loop."""
    origin = Origin("http://engine:80")
    connections = [Connection(origin) for _ in range(count)]
    transports = [FakeTransport() for _ in connections]
    for connection, transport in zip(connections, transports, strict=True):
        connection.connection_made(transport)
        connection.idle_since = monotonic()
        origin.give(connection)
    recorders = [await ask(origin, b"%d" % number) for number in range(count)]
    connections.reverse()  # the last connection that was given back is taken first
    transports.reverse()
    return origin, transports, recorders, connections


async def test_requests_of_one_turn_go_out_when_it_ends_in_their_order() -> None:
    _, transports, _, _ = await posted(3)
    assert [transport.written for transport in transports] == [b"", b"", b""]
    await asyncio.sleep(0)
    assert [transport.written[-1:] for transport in transports] == [b"0", b"1", b"2"]


async def test_a_request_that_is_given_up_at_once_is_not_sent() -> None:
    _, [given_up, other], recorders, [connection, _] = await posted(2)
    connection.abort()
    await asyncio.sleep(0)
    assert (given_up.written, given_up.aborted) == (b"", True)
    assert other.written and not recorders[0].endings


@pytest.mark.parametrize("closes", ["at once", "politely", "with an answer"])
async def test_a_connection_that_ends_before_its_request_is_sent_leaves_it_unread(closes: str) -> None:
    origin, [transport], [recorder], [connection] = await posted()
    if closes == "at once":
        connection.connection_lost(None)
    elif closes == "politely":
        transport.close()
    else:
        connection.data_received(b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\n\r\n")
    await asyncio.sleep(0)
    assert transport.written == b""
    assert recorder.endings == ["lost"]
    assert isinstance(recorder.error, BackendCut) and recorder.error.unread
    assert origin._take() is None


# Bytes in any split: no socket, so that each piece is one read


def asked() -> tuple[Recorder, Connection, Origin]:
    """A connection that waits for an answer, with the receiver and the origin."""
    origin = Origin("http://engine:80")
    connection = Connection(origin)
    connection.connection_made(FakeTransport())
    recorder = Recorder()
    connection.begin(recorder, b"POST / HTTP/1.1\r\n\r\n", (b"",))
    return recorder, connection, origin


def heard(reads: list[bytes]) -> tuple[Recorder, Connection, Origin]:
    """A connection that has read just these pieces, with the receiver and the origin."""
    recorder, connection, origin = asked()
    for read in reads:
        connection.data_received(read)
    return recorder, connection, origin


def chunked(parts: list[bytes]) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
PARTS = [b"data: 1\n\n", b"5\r\nhello\r\n", b"\r\n", b"x" * 17, b"0\r\n\r\n", b"ends as a chunk does\r\n"]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (chunked(PARTS), b"".join(PARTS)),
        (b"1A\r\n" + b"y" * 26 + b"\r\n5;name=value\r\nhello\r\n005\r\nagain\r\n0\r\n\r\n", b"y" * 26 + b"helloagain"),
        (b"2\r\nok\r\n3\r\nyes\r\n0\r\nx-trailer: 1\r\n\r\n", b"okyes"),
    ],
    ids=["plain", "odd sizes", "trailer"],
)
def test_a_chunked_answer_is_the_same_in_every_split_in_three(body: bytes, expected: bytes) -> None:
    for first in range(len(body) + 1):
        for second in range(first, len(body) + 1):
            reads = [HEAD, *filter(None, (body[:first], body[first:second], body[second:]))]
            recorder, _, _ = heard(reads)
            assert recorder.body == expected, reads
            assert recorder.endings == ["end"], reads


@pytest.mark.parametrize(
    "answer",
    [
        HEAD + chunked(PARTS),
        b"HTTP/1.1 100 Continue\r\n\r\n" + HEAD + chunked(PARTS),
        b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(b"".join(PARTS)), b"".join(PARTS)),
    ],
    ids=["chunked", "continue", "length"],
)
def test_an_answer_is_the_same_in_every_split_in_two_and_byte_by_byte(answer: bytes) -> None:
    splits = [[answer[:at], answer[at:]] for at in range(1, len(answer))]
    for reads in [*splits, [answer[at : at + 1] for at in range(len(answer))], [answer]]:
        recorder, _, _ = heard(reads)
        assert recorder.body == b"".join(PARTS), reads
        assert (recorder.heads, recorder.status, recorder.endings) == (1, 200, ["end"]), reads


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=6), st.lists(st.integers(0, 400), max_size=10))
def test_a_chunked_answer_is_the_same_in_any_split(parts: list[bytes], cuts: list[int]) -> None:
    stream = HEAD + chunked(parts)
    places = sorted({cut % len(stream) for cut in cuts} | {0, len(stream)})
    recorder, _, _ = heard([stream[a:b] for a, b in pairwise(places)])
    assert recorder.body == b"".join(parts)
    assert recorder.endings == ["end"]


@pytest.mark.parametrize("wrong", [b"4\r\nyes\r\n0\r\n\r\n", b"2\r\nyes\r\n", b"-3\r\nyes\r\n", b"g\r\nyes\r\n"])
def test_a_chunk_of_the_wrong_length_is_garbled(wrong: bytes) -> None:
    recorder, _, _ = heard([HEAD + b"1\r\n.\r\n", wrong])
    assert recorder.endings == ["lost"]
    assert isinstance(recorder.error, BackendGarbled)


@pytest.mark.parametrize("bad", [b"zz\r\n", b"3\r\nyes!\r\n"])
def test_the_receiver_gets_the_bytes_before_an_error_of_the_framing(bad: bytes) -> None:
    recorder, connection, _ = heard([HEAD + b"1\r\n.\r\n", b"2\r\nok\r\n" + bad])
    assert recorder.body.startswith(b".ok")
    assert recorder.endings == ["lost"]
    assert isinstance(recorder.error, BackendGarbled)
    assert connection._transport is not None and connection._transport.is_closing()


def test_a_receiver_that_aborts_on_these_bytes_does_not_get_the_error() -> None:
    recorder, connection, _ = asked()

    class Leaving(Recorder):
        def data(self, data: bytes, last: bool) -> None:
            super().data(data, last)
            connection.abort()

    leaving = connection._receiver = Leaving()
    connection.data_received(HEAD + b"2\r\nok\r\nzz\r\n")
    assert leaving.body == b"ok"
    assert leaving.endings == recorder.endings == []


@pytest.mark.parametrize(
    ("start", "piece"),
    [(b"0\r\n", b"x: %b\r\n" % (b"x" * 1000)), (b"2;", b"x" * 1000)],
    ids=["trailers", "an extension"],
)
def test_endless_framing_is_garbled(start: bytes, piece: bytes) -> None:
    pieces = HEAD_LIMIT // len(piece)
    recorder, connection, _ = heard([HEAD + b"2\r\nok\r\n", start, *[piece] * (pieces - 1)])
    assert (recorder.body, recorder.endings) == (b"ok", [])
    for _ in range(2):
        connection.data_received(piece)
    assert recorder.endings == ["lost"]
    assert isinstance(recorder.error, BackendGarbled)
    assert "framing" in str(recorder.error)
    assert recorder.headers == {b"transfer-encoding": b"chunked"}


def test_the_last_body_bytes_are_known_to_be_the_last() -> None:
    recorder, _, _ = heard([HEAD + b"1\r\na\r\n", b"1\r\nb\r\n0\r\n\r\n"])
    assert recorder.last


# Between chunks: which reads another protocol may take without the parser


class Diverted(asyncio.Protocol):
    """A protocol that takes some reads, and passes the others on."""

    def __init__(self, connection: Connection, *takes: bytes) -> None:
        self.connection = connection
        self.takes = set(takes)
        self.taken: list[bytes] = []
        self.lost: list[Exception | None] = []

    def data_received(self, data: bytes) -> None:
        if data in self.takes:
            self.taken.append(data)
        else:
            self.connection.data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.append(exc)
        self.connection.connection_lost(exc)


def reader(connection: Connection) -> asyncio.Protocol:
    """The protocol that gets the reads of a connection now."""
    transport = connection._transport
    assert isinstance(transport, FakeTransport)
    protocol = transport.protocol or connection
    assert isinstance(protocol, asyncio.Protocol)
    return protocol


SIZE_LINES = [b"%x\r\n", b"%X\r\n", b"00%x\r\n", b"%x;name=value\r\n", b'%x;a="b c"\r\n']


@st.composite
def coded(draw: st.DrawFn) -> tuple[list[bytes], list[bytes]]:
    """Chunks with their framing, and the data in them."""
    parts = draw(st.lists(st.binary(min_size=1, max_size=30) | st.sampled_from(PARTS), min_size=1, max_size=6))
    lines = [draw(st.sampled_from(SIZE_LINES)) % len(part) for part in parts]
    return [line + part + b"\r\n" for line, part in zip(lines, parts, strict=True)], parts


@given(coded(), st.lists(st.integers(0, 300), max_size=12))
def test_between_chunks_is_true_only_where_a_chunk_ends(
    answer: tuple[list[bytes], list[bytes]], cuts: list[int]
) -> None:
    chunks, _ = answer
    stream = b"".join(chunks)
    ends = {0} | {len(b"".join(chunks[:count])) for count in range(1, len(chunks) + 1)}
    places = sorted({cut % (len(stream) + 1) for cut in cuts} | {0, len(stream)})
    _, connection, _ = heard([HEAD])
    assert not connection.between_chunks
    for start, stop in pairwise(places):
        connection.data_received(stream[start:stop])
        if connection.between_chunks:
            assert stop in ends
        elif stop in ends:
            # It may be missed only if the read began within the chunk's last line end.
            assert stop - start == 1
    connection.data_received(b"0\r\n\r\n")
    assert not connection.between_chunks


@given(coded(), st.data())
def test_a_whole_chunk_between_chunks_that_the_parser_does_not_see_changes_nothing_for_the_rest(
    answer: tuple[list[bytes], list[bytes]], data: st.DataObject
) -> None:
    chunks, parts = answer
    expected = b""
    recorder, connection, origin = heard([HEAD])
    for chunk, part in zip(chunks, parts, strict=True):
        if connection.between_chunks and data.draw(st.booleans()):
            continue  # another protocol has taken it
        at = data.draw(st.integers(0, len(chunk)))
        for read in filter(None, (chunk[:at], chunk[at:])):
            connection.data_received(read)
        expected += part
    connection.data_received(b"0\r\n\r\n")
    assert recorder.body == expected
    assert recorder.endings == ["end"]
    assert origin._take() is connection


@pytest.mark.parametrize(
    "reads",
    [
        [HEAD],
        [HEAD + b"3\r\nyes"],
        [HEAD + b"3\r\nyes\r"],
        [HEAD + b"3\r\nyes\r\n2"],
        [HEAD + b"3\r\nyes\r\n2\r\n"],
        [HEAD + b"3\r\nyes\r\n2\r\n\r\n"],  # a chunk whose data is a line end, without its own line end
        [HEAD + b"3\r\nyes\r\n", b"2\r\n"],
        [HEAD + b"3\r\nyes\r\n", b"2", b"\r\n"],
        [HEAD + b"3\r\nyes\r\n", b"2;a", b"=b\r\n"],
        [HEAD + b"3\r\nyes\r\n", b"0\r\n"],
        [HEAD + b"3\r\nyes\r\n", b"0\r\nx-trailer: 1\r\n"],
        [HEAD + b"3\r\nyes\r\n0\r\n\r\n"],
        [b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n3\r\nyes\r\n"],
        [b"HTTP/1.1 200 OK\r\ncontent-length: 12\r\n\r\n3\r\nyes\r\n"],
        [b"HTTP/1.1 200 OK\r\n\r\n3\r\nyes\r\n"],
        [b"HTTP/1.1 100 Continue\r\n\r\n"],
    ],
)
def test_between_chunks_is_false_everywhere_else(reads: list[bytes]) -> None:
    _, connection, _ = heard(reads)
    assert not connection.between_chunks


def test_a_next_answer_begins_outside_chunks() -> None:
    _, connection, origin = heard([HEAD + b"3\r\nyes\r\n", b"0\r\n\r\n"])
    again = Recorder()
    assert origin._take() is connection
    connection.begin(again, b"", (b"",))
    connection.data_received(b"HTTP/1.1 200 OK\r\ncontent-length: 7\r\n\r\nok\r\n")
    assert not connection.between_chunks
    connection.data_received(b"2\r\n")
    assert again.body == b"ok\r\n2\r\n"
    assert again.endings == ["end"]


@pytest.mark.parametrize("framing", [[b"3\r\n", b"yes\r\n"], [b"3\r\nyes", b"\r\n"], [b"3\r\nyes\r", b"\n"]])
def test_a_read_that_is_only_framing_does_not_call_the_receiver(framing: list[bytes]) -> None:
    recorder, connection, _ = heard([HEAD + b"1\r\n.\r\n", *framing])
    assert recorder.carried == [b".", b"yes"]
    assert connection.between_chunks is framing[1].endswith(b"\r\n")
    connection.data_received(b"1\r\n!\r\n")
    assert connection.between_chunks


def test_a_diverted_connection_gets_its_reads_again_after_the_exchange_and_serves_again() -> None:
    recorder, connection, origin = heard([HEAD + b"1\r\n.\r\n"])
    other = Diverted(connection, b"3\r\nyes\r\n")
    connection.divert(other)
    assert reader(connection) is other
    for read in (b"3\r\nyes\r\n", b"2\r\nno\r\n", b"0\r\n\r\n"):
        reader(connection).data_received(read)
    assert other.taken == [b"3\r\nyes\r\n"]
    assert (recorder.body, recorder.endings) == (b".no", ["end"])
    assert reader(connection) is connection
    again = Recorder()
    assert origin._take() is connection
    connection.begin(again, b"", (b"",))
    for read in (HEAD, b"3\r\nyes\r\n", b"0\r\n\r\n"):
        reader(connection).data_received(read)
    assert (again.body, again.endings) == (b"yes", ["end"])
    assert other.taken == [b"3\r\nyes\r\n"]


def test_the_protocol_is_restored_before_the_receiver_gets_the_end() -> None:
    """The receiver may begin the next exchange at once."""
    _, connection, origin = asked()
    readers = []

    class Next(Recorder):
        def end(self) -> None:
            readers.append(reader(connection))
            assert origin._take() is connection
            connection.begin(following, b"", (b"",))
            super().end()

    following, first = Recorder(), Next()
    connection._receiver = first
    connection.data_received(HEAD + b"1\r\n.\r\n")
    connection.divert(Diverted(connection))
    reader(connection).data_received(b"0\r\n\r\n")
    assert readers == [connection]
    reader(connection).data_received(OK)
    assert (following.body, following.endings) == (b"ok", ["end"])


def test_a_diverted_connection_that_the_engine_will_not_keep_is_closed() -> None:
    recorder, connection, origin = heard([HEAD.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n") + b"1\r\n.\r\n"])
    connection.divert(Diverted(connection))
    reader(connection).data_received(b"0\r\n\r\n")
    assert recorder.endings == ["end"]
    assert connection._transport is not None and connection._transport.is_closing()
    assert origin._take() is None


async def test_a_diverted_connection_that_ends_is_lost_once(engine: Engine, origin: Origin) -> None:
    recorder = Recorder()
    connection = await origin.send("/", b"", (b"{}",), recorder)
    other = Diverted(connection)
    peer = await engine.accept()
    await peer.request()
    connection.divert(other)
    peer.say(HEAD + b"1\r\n.\r\n")
    peer.close()
    assert await recorder.ended() == "lost"
    assert type(recorder.error) is BackendCut
    assert recorder.endings == ["lost"]
    assert len(other.lost) == 1


async def test_a_diverted_connection_serves_again_on_its_socket(engine: Engine, origin: Origin) -> None:
    connections = set()
    for turn in range(3):
        recorder = Recorder()
        connection = await origin.send("/", b"", (b"%d" % turn,), recorder)
        connections.add(connection)
        other = Diverted(connection)
        connection.divert(other)
        peer = engine.peers[0] if turn else await engine.accept()
        assert (await peer.request()).endswith(b"%d" % turn)
        peer.say(HEAD + b"1\r\n%d\r\n0\r\n\r\n" % turn)
        assert await recorder.ended() == "end"
        assert recorder.body == b"%d" % turn
        transport = connection._transport
        assert transport is not None
        assert transport.get_protocol() is connection
    assert len(connections) == 1
    assert engine.waiting == 0


def test_diverting_a_connection_that_has_ended_does_nothing() -> None:
    recorder, connection, _ = heard([HEAD])
    connection.connection_lost(None)
    connection.divert(Diverted(connection))
    assert recorder.endings == ["lost"]


@pytest.mark.parametrize("body", [b"2\r\nok\r\n", b""])
def test_pausing_stops_the_reads_and_the_end_of_an_exchange_resumes_them(body: bytes) -> None:
    recorder, connection, _ = heard([HEAD + body])
    transport = connection._transport
    assert isinstance(transport, FakeTransport)
    connection.pause()
    assert not transport.reading
    connection.resume()
    assert transport.reading
    connection.pause()
    connection.data_received(b"0\r\n\r\n")  # it was on its way already
    assert recorder.endings == ["end"]
    assert transport.reading


def test_a_connection_that_ended_between_its_making_and_the_request_has_read_nothing() -> None:
    connection = Connection(Origin("http://engine:80"))
    transport = FakeTransport()
    connection.connection_made(transport)
    transport.close()
    recorder = Recorder()
    connection.begin(recorder, b"", (b"",))
    assert isinstance(recorder.error, BackendCut)
    assert recorder.error.unread
    assert recorder.error.blame


def test_an_answer_is_ended_once_though_the_connection_breaks_after_it() -> None:
    recorder, connection, _ = heard([OK])
    connection.connection_lost(ConnectionResetError())
    assert recorder.endings == ["end"]


def test_a_second_answer_in_the_same_read_is_not_taken_for_a_part_of_the_first() -> None:
    recorder, connection, origin = heard([OK + b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nbad"])
    assert recorder.heads == 1
    assert recorder.body in (b"", b"ok")
    assert origin._take() is not connection
