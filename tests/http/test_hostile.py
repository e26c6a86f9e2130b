"""Clients that are slow, greedy or malicious, against the server's protocol: each is answered or let go, none grows."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import re
import socket
import sys
from time import monotonic

import pytest
from pd_proxy.http import client_connections as connections
from pd_proxy.http import server as server_module
from pd_proxy.http.client_connections import Connections
from pd_proxy.http.inbound import Reading
from pd_proxy.http.response import Receive, Scope, Send
from pd_proxy.http.server import GatewayProtocol
from pd_proxy.http.server_exchange import ServerExchange

from tests.support import until

from .helpers import TIMEOUT
from .serving import TEXT, App, Server, error, hello, parts, reluctant, request, stream

POST = b"POST / HTTP/1.1\r\nhost: gateway\r\n"
CHUNKED = POST + b"transfer-encoding: chunked\r\n\r\n"


class Bodies:
    """An application that keeps the bodies which came whole."""

    def __init__(self) -> None:
        self.whole: list[bytes] = []

    async def __call__(self, scope: Scope, client: ServerExchange, receive: Receive) -> None:
        body = client.body
        if body is None:
            body = bytearray()
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return
                body += message["body"]
                if not message["more_body"]:
                    break
        self.whole.append(bytes(body))
        client.respond(200, [TEXT], b"ok")


# Requests that two readers could understand in two ways


@pytest.mark.parametrize(
    "said",
    [
        POST + b"content-length: 2\r\ncontent-length: 2\r\n\r\n{}",
        POST + b"content-length: 2, 2\r\n\r\n{}",
        POST + b"content-length: +2\r\n\r\n{}",
        POST + b"content-length: 2 2\r\n\r\n{}",
        POST + b"content-length:\r\n\r\n{}",
        POST + b"content-length: 99999999999999999999999\r\n\r\n{}",
        POST + b"content-length : 2\r\n\r\n{}",
        POST + b"content-length: 6\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\nG",
        POST + b"transfer-encoding: chunked\r\ncontent-length: 6\r\n\r\n0\r\n\r\nG",
        POST + b"transfer-encoding : chunked\r\n\r\n0\r\n\r\n",
        POST + b"transfer-encoding:\x0bchunked\r\n\r\n0\r\n\r\n",
        POST + b"transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        POST + b"transfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        POST + b"transfer-encoding: identity\r\ncontent-length: 2\r\n\r\n{}",
        POST + b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        POST + b"transfer-encoding: xchunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.0\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\nhost: gateway\ncontent-length: 2\n\n{}",
        POST + b"x: y\ncontent-length: 2\r\n\r\n{}",
        POST + b"x: y\rcontent-length: 2\r\n\r\n{}",
        POST + b"x: y\r\n content-length: 2\r\n\r\n{}",
        POST + b"transfer-encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
        POST + b"x: a\x00b\r\n\r\n",
        POST + b"x\x00: ab\r\n\r\n",
        POST + b": ab\r\n\r\n",
        b"POST / HTTP/1.1\r\n x: ab\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"CONNECT gateway:1 HTTP/1.1\r\n\r\n",
        b"GET http://gateway:999999/ HTTP/1.1\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nhost: gateway\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nx-host: gateway\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: gateway\r\nhost: gateway\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: gateway\r\nx: y\r\nHOST: other\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: gateway\r\nhost:\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost:\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a b\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a, b\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a,b\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a/b\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: user@a\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a:b\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a:1:2\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: ::1\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: [::1\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: caf\xe9\r\n\r\n",
        b"GET / HTTP/1.0\r\nhost: a\r\nhost: a\r\n\r\n",
        b"POST /a HTTP/1.1\r\nconnection: upgrade\r\nupgrade: h2c\r\ncontent-length: 2\r\n\r\n{}",
        b"GET / http/1.1\r\nhost: gateway\r\n\r\n",
        b"GET / HTTP/1.11\r\nhost: gateway\r\n\r\n",
    ],
)
async def test_headers_that_can_be_read_in_two_ways_are_400(server: Server, said: bytes) -> None:
    server.app = bodies = Bodies()
    status, detail = error(await server.say(said))
    assert (status, detail["code"]) == (400, "invalid_request")
    assert bodies.whole == []


@pytest.mark.parametrize("split", [False, True], ids=["at once", "behind its headers"])
@pytest.mark.parametrize(
    "body",
    [
        b"ffffffffffffffffff\r\n",
        b"-1\r\n",
        b"0x2\r\n{}\r\n0\r\n\r\n",
        b"2\n{}\n0\n\n",
        b"2 \r\n{}\r\n0\r\n\r\n",
        b"2\r\n{}X0\r\n\r\n",
        b"2;a\nb\r\n{}\r\n0\r\n\r\n",
        b"2\r\n{}\r\n0\r\ncontent-length: 3\r\n\r\n",
        b"\r\n2\r\n{}\r\n0\r\n\r\n",
    ],
)
async def test_chunks_that_can_be_read_in_two_ways_are_400(server: Server, body: bytes, split: bool) -> None:
    server.app = bodies = Bodies()
    async with server.connect() as (reader, writer):
        if split:
            writer.write(CHUNKED)
            async with asyncio.timeout(TIMEOUT):
                while not server.seen:
                    await asyncio.sleep(0)
            writer.write(body)
        else:
            writer.write(CHUNKED + body)
        status, detail = error(await reader.read())
    assert (status, detail["code"]) == (400, "invalid_request")
    assert bodies.whole == []
    await until(lambda: not server.connections)


@pytest.mark.parametrize(
    "host",
    [
        "gateway",
        "GATEWAY:8000",
        "my_gateway.svc",
        "10.0.0.1:80",
        "[::1]:8000",
        "[fe80::1%25eth0]",
        "a:",
        "xn--caf-dma.fr",
    ],
)
async def test_a_host_is_a_name_or_an_address_and_perhaps_a_port(server: Server, host: str) -> None:
    said = f"GET / HTTP/1.1\r\nHost:  {host} \r\nconnection: close\r\n\r\n"
    assert parts(await server.say(said.encode()))[0] == 200


async def test_an_old_client_need_not_name_the_host(server: Server) -> None:
    assert parts(await server.say(b"GET / HTTP/1.0\r\n\r\n"))[0] == 200


@pytest.mark.parametrize("version", ["2.0", "0.9", "1.2", "3.0", "9.9"])
async def test_another_version_of_http_is_505(server: Server, version: str) -> None:
    status, detail = error(await server.say(f"GET / HTTP/{version}\r\nhost: gateway\r\n\r\n".encode()))
    assert (status, detail["code"]) == (505, "http_version_not_supported")
    assert server.seen == []


GARBAGE = [
    (b"garbage\r\n\r\n", 400),
    (b"GET /b HTTP/1.1\r\n\r\n", 400),
    (b"GET /b HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n", 400),
    (b"GET /b HTTP/2.0\r\nhost: a\r\n\r\n", 505),
    (POST + b"content-length: 2, 3\r\n\r\n{}", 400),
    (CHUNKED + b"x\r\n", 400),
    (b"\x16\x03\x01\x02\x00", 400),
    (request("/b", *["a:"] * 300), 431),
]


@pytest.mark.parametrize(("garbage", "status"), GARBAGE)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("app", [hello, stream], ids=["whole", "stream"])
async def test_good_requests_before_a_bad_one_in_one_read_are_answered_first(
    server: Server, garbage: bytes, status: int, count: int, app: App
) -> None:
    async def slow(scope: Scope, client: ServerExchange, receive: Receive) -> None:
        for _ in range(5):
            await asyncio.sleep(0)
        await app(scope, client, receive)

    server.app = slow
    answer = await server.say(b"".join(request(f"/{number}") for number in range(count)) + garbage)
    heads = [found.start() for found in re.finditer(rb"HTTP/1\.1 \d\d\d ", answer)]
    assert len(heads) == count + 1 and answer.count(b"HTTP/1.1 200 OK") == count
    last = answer[heads[-1] :]
    assert error(last)[0] == status and parts(last)[1]["connection"] == "close"
    assert server.seen == [f"/{number}" for number in range(count)], "the bad one is not seen"


async def test_what_follows_a_bad_request_is_not_heard(server: Server) -> None:
    answer = await server.say(request("/a") + b"garbage\r\n\r\n" + request("/c"))
    assert server.seen == ["/a"] and b"HTTP/1.1 200" in answer and b"HTTP/1.1 400" in answer


async def test_a_bad_request_behind_a_running_one_is_not_answered_in_its_place(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "_LINGER", 0.05)
    waiting, gone = asyncio.Event(), asyncio.Event()

    async def slow(scope: Scope, client: ServerExchange, receive: Receive) -> None:
        client.on_gone = gone.set
        waiting.set()
        await gone.wait()

    server.app = slow
    async with server.connect() as (reader, writer):
        writer.write(request())
        await waiting.wait()
        writer.write(b"GET http://gateway:999999/ HTTP/1.1\r\n\r\n")
        assert await reader.read() == b""
        await gone.wait()


async def test_a_running_request_has_a_moment_to_end_when_a_bad_one_follows(server: Server) -> None:
    waiting, go_on = asyncio.Event(), asyncio.Event()

    async def slow(scope: Scope, client: ServerExchange, receive: Receive) -> None:
        waiting.set()
        await go_on.wait()
        await hello(scope, client, receive)

    server.app = slow
    async with server.connect() as (reader, writer):
        writer.write(request())
        await waiting.wait()
        [connection] = server.connections
        writer.write(b"garbage\r\n\r\n")
        await until(lambda: connection.reading is Reading.NOTHING)
        go_on.set()
        answer = await reader.read()
    assert answer.startswith(b"HTTP/1.1 200") and b"HTTP/1.1 400" in answer


async def test_trailers_are_no_headers(server: Server) -> None:
    headers: list[tuple[bytes, bytes]] = []

    async def look(scope: Scope, client: ServerExchange, receive: Receive) -> None:
        headers.extend(scope["headers"])
        await hello(scope, client, receive)

    server.app = look
    trailers = b"authorization: Bearer stolen\r\nx-request-id: 1\r\n"
    async with server.connect() as (reader, writer):
        writer.write(CHUNKED + b"2\r\n{}\r\n0\r\n" + trailers + b"\r\n")
        assert (await reader.readuntil(b"{}")).startswith(b"HTTP/1.1 200")
    assert headers == [(b"host", b"gateway"), (b"transfer-encoding", b"chunked")]


@pytest.mark.parametrize(
    "upgrade", [b"connection: upgrade\r\nupgrade: h2c\r\n", b"connection: upgrade\r\nupgrade: websocket\r\n"]
)
async def test_another_protocol_is_declined_and_what_follows_is_still_heard(server: Server, upgrade: bytes) -> None:
    first = b"POST /a HTTP/1.1\r\nhost: gateway\r\n" + upgrade + b"content-length: 2\r\n\r\n{}"
    answer = await server.say(first + request("/b", "connection: close"))
    assert answer.count(b"HTTP/1.1 200 OK") == 2
    assert b"POST /a {}" in answer
    assert b"GET /b" in answer


# Too many, too small, too long


async def test_too_many_headers_are_431(server: Server) -> None:
    assert parts(await server.say(request("/", *["a:"] * 250, "connection: close")))[0] == 200
    status, detail = error(await server.say(request("/", *["a:"] * 300)))
    assert (status, detail["code"]) == (431, "headers_too_large")
    assert len(server.seen) == 1


@pytest.mark.parametrize("before", [b"", request("/first")], ids=["first", "behind another"])
async def test_headers_over_the_limit_are_431_though_they_come_in_one_read(server: Server, before: bytes) -> None:
    large = request("/", "x: " + "y" * (GatewayProtocol.header_limit + 1), "connection: close")
    answer = await server.say(before + large)
    assert server.seen in ([], ["/first"])
    if not before:
        assert error(answer)[0] == 431


@pytest.mark.parametrize(
    "piece",
    [b"1\r\nx\r\n" * 1000, b"1;" + b"e" * 10_000 + b"\r\nx\r\n"],
    ids=["tiny chunks", "long extensions"],
)
async def test_a_body_that_is_nearly_all_framing_is_400(server: Server, piece: bytes) -> None:
    server.app = bodies = Bodies()
    async with server.connect() as (reader, writer):
        writer.write(CHUNKED + b"1\r\nx\r\n")
        answer = asyncio.create_task(reader.read())
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 50_000_000 and not answer.done():
                writer.write(piece)
                sent += len(piece)
                await writer.drain()
                await asyncio.sleep(0)
        status, detail = error(await answer)
    assert (status, detail["code"]) == (400, "invalid_request")
    assert sent < 10_000_000
    assert bodies.whole == []


async def test_endless_trailers_are_400(server: Server) -> None:
    server.app = bodies = Bodies()
    async with server.connect() as (reader, writer):
        writer.write(CHUNKED + b"1\r\nx\r\n0\r\n")
        answer = asyncio.create_task(reader.read())
        with contextlib.suppress(ConnectionError):
            while not answer.done():
                writer.write(b"a: b\r\n" * 1000)
                await writer.drain()
                await asyncio.sleep(0)
        assert error(await answer)[0] == 400
    assert bodies.whole == []


async def test_a_large_body_in_ordinary_chunks_is_whole(server: Server) -> None:
    server.app = bodies = Bodies()
    chunk = b"3e8\r\n" + b"x" * 1000 + b"\r\n"
    async with server.connect() as (reader, writer):
        writer.write(CHUNKED + chunk * 20_000 + b"0\r\n\r\n")
        assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
    assert bodies.whole == [b"x" * 20_000_000]


async def test_of_a_thousand_requests_sent_ahead_the_first_are_answered_and_no_more_are_held(server: Server) -> None:
    held = 0

    async def count(scope: Scope, client: ServerExchange, receive: Receive) -> None:
        nonlocal held
        [connection] = server.connections
        held = max(held, len(connection.waiting) + (connection.active is not None))
        await hello(scope, client, receive)

    server.app = count
    answer = await server.say(b"".join(request(f"/{number}") for number in range(1000)))
    answered = answer.count(b"HTTP/1.1 200 OK")
    assert 1 < answered <= 17
    assert server.seen == [f"/{number}" for number in range(answered)]
    assert answer.count(b"connection: close") == 1, "the last one says that there is no more"
    assert answer.rpartition(b"HTTP/1.1")[2].count(b"connection: close") == 1
    assert held <= 17


async def test_a_body_that_goes_on_after_its_answer_ends_the_connection(server: Server) -> None:
    """Here `GET` is answered before its body; a client that dribbles one would stay for ever."""

    async def early(scope: Scope, client: ServerExchange, receive: Receive) -> None:
        client.respond(200, [TEXT], b"early")

    server.app = early
    async with server.connect() as (reader, writer):
        writer.write(request("/", "content-length: 1000000000") + b"x")
        answer = await reader.read()
        assert parts(answer)[1]["connection"] == "close"
        with contextlib.suppress(ConnectionError):
            while server.connections:
                writer.write(b"x")
                await writer.drain()
                await asyncio.sleep(0.01)


# Clients that do not read


async def plain(scope: Scope, receive: Receive, send: Send) -> None:
    body = b"x" * 8_000_000
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    for start in range(0, len(body), 1_000_000):
        await send(
            {"type": "http.response.body", "body": body[start : start + 1_000_000], "more_body": start < 7_000_000}
        )


class Plain(Server):
    """Answers without the client of ours."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await plain(scope, receive, send)


async def large(scope: Scope, client: ServerExchange, receive: Receive) -> None:
    client.respond(200, [TEXT], b"x" * 8_000_000)


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "plain"])
@pytest.mark.parametrize("lines", [[], ["connection: close"]], ids=["kept alive", "closing"])
async def test_who_never_reads_a_large_answer_is_cut(
    server: Server, monkeypatch: pytest.MonkeyPatch, lines: list[str], direct: bool
) -> None:
    monkeypatch.setattr(GatewayProtocol, "write_seconds", 0.2)
    if direct:
        server.app = large
    else:
        server.__class__ = Plain
    with reluctant(server.port) as sock:
        await asyncio.get_running_loop().sock_sendall(sock, request("/", *lines))
        await until(lambda: len(server.connections) == 1)
        [connection] = server.connections
        await until(lambda: connection.unsent > 0)
        await until(lambda: not server.connections)


async def test_who_leaves_the_last_bytes_of_an_answer_unread_is_cut_too(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too few bytes for back-pressure, so that no other limit sees them; the close would wait for them for ever."""
    monkeypatch.setattr(GatewayProtocol, "write_seconds", 0.2)
    paused = asyncio.Event()

    async def little_more(scope: Scope, client: ServerExchange, receive: Receive) -> None:
        client.start(200, [TEXT])
        [connection] = server.connections
        while not connection.unsent:
            client.write(b"x" * 10_000)
        assert connection.writable
        client.end()
        paused.set()

    server.app = little_more
    with reluctant(server.port) as sock:
        await asyncio.get_running_loop().sock_sendall(sock, request("/", "connection: close"))
        await paused.wait()
        await until(lambda: not server.connections)


@pytest.mark.slow
async def test_who_reads_slowly_but_steadily_gets_every_byte(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GatewayProtocol, "write_seconds", 1.0)
    server.app = large
    loop = asyncio.get_running_loop()
    received, started = 0, monotonic()
    with reluctant(server.port) as sock:
        await loop.sock_sendall(sock, request("/", "connection: close"))
        async with asyncio.timeout(20):
            while data := await loop.sock_recv(sock, 50_000):
                received += len(data)
                if monotonic() - started < 3.0:
                    await asyncio.sleep(0.1)  # the client's slowness is the point
                    [connection] = server.connections
                    assert connection.unsent
    assert received > 8_000_000


pauses_when_full = pytest.mark.skipif(
    sys.version_info >= (3, 12)
    and "_maybe_pause_protocol" not in inspect.getsource(asyncio.selector_events._SelectorSocketTransport.writelines),
    reason="asyncio's writelines of this Python never pauses the protocol; the gateway has uvloop's, which does",
)


@pauses_when_full
async def test_who_does_not_read_is_given_no_more_answers_until_it_does(server: Server) -> None:
    server.app = large
    loop = asyncio.get_running_loop()

    async def ask() -> None:
        for number in range(4):
            await loop.sock_sendall(sock, request(f"/{number}", *(["connection: close"] if number == 3 else [])))
            await asyncio.sleep(0.02)  # so that they come one by one, each after the answer to the one before

    with reluctant(server.port) as sock:
        await ask()
        [connection] = server.connections
        assert server.seen == ["/0"]
        assert connection.unsent < 8_500_000
        received = 0
        async with asyncio.timeout(60):  # 32 MB through a small window: seconds on a busy machine
            while data := await loop.sock_recv(sock, 1 << 20):
                received += len(data)
        assert server.seen == [f"/{number}" for number in range(4)]
        assert 4 * 8_000_000 < received < 4 * 8_001_000


@pauses_when_full
async def test_a_request_that_waits_behind_unread_answers_ends_with_its_client(server: Server) -> None:
    server.app = large
    with reluctant(server.port) as sock:
        await asyncio.get_running_loop().sock_sendall(sock, request("/1"))
        await until(lambda: len(server.seen) == 1)
        await asyncio.get_running_loop().sock_sendall(sock, request("/2"))
        [connection] = server.connections
        await until(lambda: len(connection.waiting) == 1)
    await until(lambda: not server.connections)
    assert server.seen == ["/1"]
    assert not connection.waiting
    assert connection.active is None


@pauses_when_full
async def test_a_request_that_is_refused_behind_unread_answers_leaves_no_turn_behind(server: Server) -> None:
    server.app = large
    loop = asyncio.get_running_loop()
    faults: list[dict[str, object]] = []
    loop.set_exception_handler(lambda _, context: faults.append(context))
    with reluctant(server.port) as sock:
        await loop.sock_sendall(sock, request("/1"))
        await until(lambda: len(server.seen) == 1)
        await loop.sock_sendall(sock, CHUNKED + b"no size\r\n")
        [connection] = server.connections
        await until(lambda: connection.reading is Reading.NOTHING)
        async with asyncio.timeout(30):
            last = b""
            while data := await loop.sock_recv(sock, 1 << 20):
                last = last[-1000:] + data
    assert b"400 Bad Request" in last
    assert not faults


@pauses_when_full
async def test_a_client_that_leaves_is_noticed_after_it_was_given_no_answers_for_a_while(server: Server) -> None:
    waiting, gone = asyncio.Event(), asyncio.Event()

    async def second_waits(scope: Scope, client: ServerExchange, receive: Receive) -> None:
        if scope["path"] == "/1":
            await large(scope, client, receive)
            return
        client.on_gone = gone.set
        waiting.set()
        await gone.wait()

    server.app = second_waits
    loop = asyncio.get_running_loop()
    with reluctant(server.port) as sock:
        await loop.sock_sendall(sock, request("/1"))
        await until(lambda: len(server.seen) == 1)
        await loop.sock_sendall(sock, request("/2"))
        [connection] = server.connections
        await until(lambda: len(connection.waiting) == 1)
        async with asyncio.timeout(30):
            received = 0
            while received < 8_000_000:
                received += len(await loop.sock_recv(sock, 1 << 20))
        await waiting.wait()
    await until(gone.is_set)


async def test_who_leaves_an_answer_unread_that_its_application_could_not_end_is_cut(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GatewayProtocol, "write_seconds", 0.2)

    async def failing(scope: Scope, client: ServerExchange, receive: Receive) -> None:
        client.start(200, [TEXT])
        [connection] = server.connections
        while not connection.unsent:
            client.write(b"x" * 10_000)
        raise ValueError

    server.app = failing
    with reluctant(server.port) as sock:
        await asyncio.get_running_loop().sock_sendall(sock, request("/"))
        await until(lambda: bool(server.connections))
        await until(lambda: not server.connections)


# Too many connections


async def opened(server: Server, count: int) -> list[socket.socket]:
    before = len(server.connections)
    clients = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(count)]
    await until(lambda: len(server.connections) == before + count)
    return clients


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Connections:
    shared = Connections(limit=3, spared=frozenset({"/health"}))
    monkeypatch.setattr(GatewayProtocol, "shared", shared)
    return shared


async def test_one_connection_too_many_is_told_so_and_the_probes_are_served(
    server: Server, shared: Connections
) -> None:
    clients = await opened(server, 3)
    answer = await server.say(request("/"))
    status, detail = error(answer)
    assert (status, detail["code"]) == (503, "too_many_connections")
    assert parts(answer)[1]["retry-after"] == "1"
    assert server.seen == []
    assert parts(await server.say(request("/health")))[0] == 200, "and the connection is closed after it"
    assert (shared.open, shared.refused) == (3, 1)
    clients[0].close()
    await until(lambda: shared.open == 2)
    assert parts(await server.say(request("/", "connection: close")))[0] == 200
    for client in clients:
        client.close()
    await until(lambda: shared.open == 0)


async def test_far_too_many_connections_are_closed_at_once(server: Server, shared: Connections) -> None:
    clients = await opened(server, shared.limit + shared.spare)
    try:
        async with server.connect() as (reader, _):
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
        assert shared.refused == 1
        assert shared.open == shared.limit + shared.spare
    finally:
        for client in clients:
            client.close()
    await until(lambda: shared.open == 0)


async def test_probes_are_served_whatever_idle_connections_there_are(server: Server, shared: Connections) -> None:
    clients = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(shared.limit + shared.spare + 100)]
    try:
        for _ in range(3):
            assert parts(await server.say(request("/health")))[0] == 200
        status, detail = error(await server.say(request("/")))
        assert (status, detail["code"]) == (503, "too_many_connections")
        assert shared.open == shared.limit + shared.spare
        assert server.seen == ["/health"] * 3
    finally:
        for client in clients:
            client.close()
    await until(lambda: shared.open == 0 and not shared.visitors)


async def test_connections_that_have_been_idle_make_room_for_those_that_ask(
    server: Server, shared: Connections, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "_IDLE", 0.0)
    async with server.connect() as (reader, writer):  # one that waits for another request, and two that are new
        writer.write(request("/"))
        await reader.readuntil(b"\r\n\r\n")
        silent = await opened(server, 2)
        for _ in range(3):
            assert parts(await server.say(request("/", "connection: close")))[0] == 200
        await until(lambda: shared.open == 2)
        assert b"HTTP/1.1" not in await reader.read()  # it was closed, after what was left of its answer
        for client in silent:
            client.close()
    assert shared.refused == 0
    await until(lambda: shared.open == 0)


async def test_a_connection_with_a_request_under_way_makes_no_room(
    server: Server, shared: Connections, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "_IDLE", 0.0)
    release = asyncio.Event()

    async def slow(scope: Scope, client: ServerExchange, receive: Receive) -> None:
        if scope["path"] == "/slow":
            await release.wait()
        client.respond(200, [TEXT], b"ok")

    server.app = slow
    running = [asyncio.create_task(server.say(request("/slow", "connection: close"))) for _ in range(3)]
    await until(lambda: len(server.seen) == 3)
    status, detail = error(await server.say(request("/")))
    assert (status, detail["code"]) == (503, "too_many_connections")
    release.set()
    assert [parts(answer)[0] for answer in await asyncio.gather(*running)] == [200] * 3


async def test_one_address_may_have_so_many_connections_and_probes(server: Server, shared: Connections) -> None:
    shared.limit, shared.per_address = 100, 2
    clients = await opened(server, 2)
    assert error(await server.say(request("/")))[0] == 503
    assert parts(await server.say(request("/health")))[0] == 200
    for client in clients:
        client.close()
    await until(lambda: shared.open == 0)
    assert not shared.addresses
    assert parts(await server.say(request("/", "connection: close")))[0] == 200


# Leaving


async def test_when_the_gateway_leaves_each_answer_is_the_last_of_its_connection(
    server: Server, shared: Connections
) -> None:
    running, go_on = asyncio.Event(), asyncio.Event()

    async def slow(scope: Scope, client: ServerExchange, receive: Receive) -> None:
        if scope["path"] == "/slow":
            client.start(200, [TEXT])
            client.write(b"begun ")
            running.set()
            await go_on.wait()
            client.end(b"ended")
        else:
            await hello(scope, client, receive)

    server.app = slow
    async with server.connect() as (slow_reader, slow_writer), server.connect() as (reader, writer):
        slow_writer.write(request("/slow"))
        await running.wait()
        writer.write(request("/1"))
        await reader.readuntil(b"GET /1 ")
        shared.leaving = True
        for connection in server.connections:
            connection.leave()
        writer.write(request("/2"))
        status, headers, body = parts(await reader.read())
        assert (status, headers["connection"], body) == (200, "close", b"GET /2 ")
        go_on.set()
        assert (await slow_reader.read()).endswith(b"5\r\nended\r\n0\r\n\r\n")


async def test_an_idle_connection_is_closed_but_not_one_whose_request_is_here(server: Server) -> None:
    async with server.connect() as (reader, writer), server.connect() as (fresh, _):
        writer.write(request("/1"))
        await reader.readuntil(b"GET /1 ")
        sock = writer.get_extra_info("socket")
        [connection] = [c for c in server.connections if c.reading is Reading.BETWEEN]
        # Written past the event loop, so that the server has not read it yet.
        socket.socket.send(socket.socket(fileno=socket.dup(sock.fileno())), request("/2"))
        for each in server.connections:
            each.close_if_idle()
        await reader.readuntil(b"GET /2 ")
        connection.close_if_idle()
        assert await reader.read() == b""
        [new] = server.connections
        assert new.reading is Reading.HEAD
        assert not fresh.at_eof()
