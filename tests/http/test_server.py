"""The client's side of the relay: a real uvicorn server with our protocol, and raw sockets as its clients.

What of uvicorn they rest on is in `test_uvicorn_contract.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from typing import Any

import httpx
import pytest
from pd_proxy.http.client_connections import Connections
from pd_proxy.http.deadlines import Deadlines
from pd_proxy.http.inbound import Reading
from pd_proxy.http.response import EXTENSION, AsgiResponse, Receive, Scope, Send
from pd_proxy.http.server import GatewayProtocol
from pd_proxy.http.server_exchange import ServerExchange

from tests.support import soon, until

from .helpers import TIMEOUT
from .serving import TEXT, Server, WatchedFlow, error, hello, parts, reluctant, request, stream

# Whole answers


async def test_an_answer_has_its_length_and_the_connection_stays(server: Server) -> None:
    async with server.connect() as (reader, writer):
        for path in ("/a", "/b", "/c"):
            writer.write(request(path))
            head = await reader.readuntil(b"\r\n\r\n")
            assert head == b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: 7\r\n\r\n"
            assert await reader.readexactly(7) == f"GET {path} ".encode()


async def test_pipelined_requests_are_answered_in_turn(server: Server) -> None:
    answer = await server.say(request("/a") + request("/b") + request("/c", "connection: close"))
    assert [answer.find(path) for path in (b"GET /a", b"GET /b", b"GET /c")] == sorted(
        [answer.find(path) for path in (b"GET /a", b"GET /b", b"GET /c")]
    )
    assert answer.count(b"HTTP/1.1 200 OK") == 3
    assert server.seen == ["/a", "/b", "/c"]


async def test_pipelined_streams_do_not_mix(server: Server) -> None:
    server.app = stream
    answer = await server.say(request() + request("/", "connection: close"))
    one = b"3\r\none\r\n3\r\ntwo\r\n5\r\nthree\r\n0\r\n\r\n"
    assert answer.count(one) == 2
    assert answer.endswith(one)


async def test_a_client_that_wants_to_close_is_told_so_and_closed(server: Server) -> None:
    status, headers, body = parts(await server.say(request("/", "connection: close")))
    assert (status, headers["connection"], body) == (200, "close", b"GET / ")


async def test_an_application_can_close_the_connection(server: Server) -> None:
    async def closing(scope: Scope, client: ServerExchange, receive: Receive) -> None:
        client.respond(413, [(b"connection", b"close")], b"no")

    server.app = closing
    answer = await server.say(request())
    assert parts(answer)[0] == 413
    assert answer.lower().count(b"connection: close") == 1


@pytest.mark.parametrize("lines", [[], ["connection: keep-alive"]])
async def test_an_old_client_gets_its_answer_and_the_close(server: Server, lines: list[str]) -> None:
    status, headers, body = parts(await server.say(request("/", *lines, version="1.0")))
    assert (status, headers["connection"], body) == (200, "close", b"GET / ")


async def test_an_old_client_gets_a_stream_without_chunks(server: Server) -> None:
    server.app = stream
    status, headers, body = parts(await server.say(request(version="1.0")))
    assert (status, body) == (200, b"onetwothree")
    assert "transfer-encoding" not in headers
    assert headers["connection"] == "close"


@pytest.mark.parametrize("method", ["PUT", "DELETE", "OPTIONS", "PATCH", "PROPFIND"])
async def test_any_method_reaches_the_application(server: Server, method: str) -> None:
    status, _, body = parts(await server.say(request("/", "connection: close", method=method)))
    assert (status, body) == (200, f"{method} / ".encode())


async def test_an_answer_to_head_has_no_body(server: Server) -> None:
    answer = await server.say(request(method="HEAD") + request("/b", "connection: close"))
    first, _, rest = answer.partition(b"\r\n\r\n")
    assert first.startswith(b"HTTP/1.1 200 OK\r\n")
    assert rest.startswith(b"HTTP/1.1 200 OK\r\n")


async def test_a_large_answer_is_whole(server: Server) -> None:
    async def large(scope: Scope, client: ServerExchange, receive: Receive) -> None:
        client.respond(200, [TEXT], b"x" * 3_000_000)

    server.app = large
    assert parts(await server.say(request("/", "connection: close")))[2] == b"x" * 3_000_000


@pytest.mark.parametrize("pieces", [1, 3])
async def test_a_body_is_read_at_once_or_as_it_comes(server: Server, pieces: int) -> None:
    body = b"0123456789" * 1000
    whole = request("/", f"content-length: {len(body)}", "connection: close", method="POST", body=body)
    size = -(-len(whole) // pieces)
    async with server.connect() as (reader, writer):
        for start in range(0, len(whole), size):
            writer.write(whole[start : start + size])
            await writer.drain()
            await asyncio.sleep(0)
        assert parts(await reader.read())[2] == b"POST / " + body


async def test_a_client_that_waits_for_leave_to_send_gets_it(server: Server) -> None:
    async with server.connect() as (reader, writer):
        writer.write(request("/", "content-length: 2", "expect: 100-continue", method="POST"))
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"ok")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 OK\r\n")
        assert await reader.readexactly(9) == b"POST / ok"


async def test_a_request_refused_before_its_body_is_there_still_hears_why(server: Server) -> None:
    async def refuse(scope: Scope, client: ServerExchange, receive: Receive) -> None:
        assert client.body is None
        client.respond(413, [(b"connection", b"close")], b"too large")

    server.app = refuse
    async with server.connect() as (reader, writer):
        writer.write(request("/", "content-length: 30000000", method="POST"))
        for _ in range(100):
            writer.write(b"x" * 10_000)
        assert parts(await reader.read())[2] == b"too large"


# Streams


async def test_a_stream_is_chunked_and_its_head_goes_out_with_the_first_piece(server: Server) -> None:
    released = asyncio.Event()

    async def slow(scope: Scope, client: ServerExchange, receive: Receive) -> None:
        client.start(200, [TEXT])
        assert client.started
        client.write(b"one")
        await released.wait()
        client.end()

    server.app = slow
    async with server.connect() as (reader, writer):
        writer.write(request())
        head = await reader.readuntil(b"\r\n\r\n")
        assert parts(head)[1] == {"content-type": "text/plain", "transfer-encoding": "chunked"}
        assert await reader.readexactly(8) == b"3\r\none\r\n"
        released.set()
        assert await reader.readexactly(5) == b"0\r\n\r\n"


async def test_a_stream_with_an_engines_chunks_in_it_is_read_by_httpx(server: Server) -> None:
    server.app = stream
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", verify=False) as client:
        for _ in range(3):
            assert (await client.get("/")).text == "onetwothree"
    assert len(server.connections) <= 1


async def test_an_empty_stream_is_a_whole_answer(server: Server) -> None:
    async def empty(scope: Scope, client: ServerExchange, receive: Receive) -> None:
        client.start(200, [])
        client.end()

    server.app = empty
    async with httpx.AsyncClient(verify=False) as client:
        assert (await client.get(f"http://127.0.0.1:{server.port}/")).content == b""


async def test_a_stream_that_is_cut_is_not_taken_for_whole(server: Server) -> None:
    async def cutting(scope: Scope, client: ServerExchange, receive: Receive) -> None:
        client.start(200, [])
        client.write(b"half")
        client.cut()

    server.app = cutting
    async with httpx.AsyncClient(verify=False) as client:
        with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
            await client.get(f"http://127.0.0.1:{server.port}/")


async def test_a_client_that_leaves_is_noticed_at_once(server: Server) -> None:
    streaming, gone, flow = asyncio.Event(), asyncio.Event(), WatchedFlow()
    state: list[bool] = []

    async def endless(scope: Scope, client: ServerExchange, receive: Receive) -> None:
        client.on_gone = gone.set
        client.flow = flow
        client.start(200, [])
        client.write(b"one")
        streaming.set()
        await gone.wait()
        assert flow.stopped.is_set()
        client.write(b"two")  # said to nobody, and no error
        assert client.chunks() is None
        client.end()
        state.append(client.gone)

    server.app = endless
    async with server.connect() as (_, writer):
        writer.write(request())
        await streaming.wait()
        writer.close()
        await soon(gone.is_set, 0.2)
    await asyncio.sleep(0)
    assert state == [True]


async def test_a_client_that_leaves_before_its_answer_is_noticed_at_once(server: Server) -> None:
    waiting, gone = asyncio.Event(), asyncio.Event()

    async def slow(scope: Scope, client: ServerExchange, receive: Receive) -> None:
        client.on_gone = gone.set
        waiting.set()
        await gone.wait()
        client.respond(200, [], b"to nobody")

    server.app = slow
    async with server.connect() as (_, writer):
        writer.write(request())
        await waiting.wait()
        writer.transport.abort()
        await soon(gone.is_set, 0.2)


@pytest.mark.parametrize("size", [70_000, 1_000_000])
async def test_a_client_that_leaves_after_a_long_body_is_noticed_at_once(server: Server, size: int) -> None:
    waiting, gone = asyncio.Event(), asyncio.Event()

    async def slow(scope: Scope, client: ServerExchange, receive: Receive) -> None:
        client.on_gone = gone.set
        if client.body is None:
            await client.gather(2 * size)
        waiting.set()
        await gone.wait()

    server.app = slow
    async with server.connect() as (_, writer):
        writer.write(request("/", f"content-length: {size}", method="POST", body=b"x" * size))
        await waiting.wait()
        writer.close()
        await until(gone.is_set)


async def test_the_end_of_an_answer_is_no_departure(server: Server) -> None:
    departures: list[str] = []

    async def quick(scope: Scope, client: ServerExchange, receive: Receive) -> None:
        client.on_gone = lambda: departures.append(scope["path"])
        client.respond(200, [], b"")

    server.app = quick
    await server.say(request("/a") + request("/b", "connection: close"))
    while server.connections:
        await asyncio.sleep(0)
    assert departures == []


async def test_a_client_that_does_not_read_pauses_the_flow_until_it_reads_again(server: Server) -> None:
    flow, written, done = WatchedFlow(), 0, asyncio.Event()

    async def flood(scope: Scope, client: ServerExchange, receive: Receive) -> None:
        nonlocal written
        client.start(200, [])
        client.flow = flow
        while not flow.paused.is_set():
            client.write(b"x" * 65536)
            written += 65536
        await flow.resumed.wait()
        client.end()
        done.set()

    server.app = flood
    loop = asyncio.get_running_loop()
    with reluctant(server.port) as sock:
        async with asyncio.timeout(TIMEOUT):
            await loop.sock_sendall(sock, request("/", "connection: close"))
            await flow.paused.wait()
            assert not flow.resumed.is_set()
            received = 0
            while data := await loop.sock_recv(sock, 1 << 20):
                received += len(data)
            await done.wait()
        assert received > written


async def test_a_flow_that_comes_while_the_socket_is_full_is_paused_at_once(server: Server) -> None:
    first, second = WatchedFlow(), WatchedFlow()

    async def two(scope: Scope, client: ServerExchange, receive: Receive) -> None:
        client.flow = first
        client.start(200, [])
        while not first.paused.is_set():
            client.write(b"x" * 65536)
        client.flow = second
        assert second.paused.is_set()
        await second.resumed.wait()
        client.end()

    server.app = two
    loop = asyncio.get_running_loop()
    with reluctant(server.port) as sock:
        async with asyncio.timeout(TIMEOUT):
            await loop.sock_sendall(sock, request("/", "connection: close"))
            await first.paused.wait()
            while await loop.sock_recv(sock, 1 << 20):
                pass
            assert second.resumed.is_set()


async def test_a_client_that_never_reads_can_be_cut(server: Server) -> None:
    flow, gone = WatchedFlow(), asyncio.Event()

    async def flood(scope: Scope, client: ServerExchange, receive: Receive) -> None:
        client.on_gone = gone.set
        client.start(200, [])
        client.flow = flow
        while not flow.paused.is_set():
            client.write(b"x" * 65536)
        client.cut()
        await gone.wait()

    server.app = flood
    with reluctant(server.port) as sock:
        async with asyncio.timeout(TIMEOUT):
            await asyncio.get_running_loop().sock_sendall(sock, request())
            await gone.wait()


async def test_requests_that_went_through_plain_asgi_leave_no_client_behind(server: Server) -> None:
    async def plain(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    class Mixed(Server):
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            if scope["path"] == "/plain":
                await plain(scope, receive, send)
            else:
                await hello(scope, scope["extensions"][EXTENSION], receive)

    server.__class__ = Mixed
    async with server.connect() as (reader, writer):
        for path in ("/plain", "/", "/plain", "/plain"):
            writer.write(request(path))
            length = int(parts(await reader.readuntil(b"\r\n\r\n"))[1]["content-length"])
            await reader.readexactly(length)
        (connection,) = server.connections
        assert connection.active is None


# Requests that never reach the application


async def test_a_megabyte_of_headers_is_refused(server: Server) -> None:
    lines = [f"x-{number}: {'y' * 1000}" for number in range(1000)]
    status, detail = error(await server.say(request("/", *lines)))
    assert (status, detail["code"]) == (431, "headers_too_large")
    assert str(GatewayProtocol.header_limit) in detail["message"]
    assert server.seen == []


async def test_a_megabyte_of_path_is_refused(server: Server) -> None:
    status, _ = error(await server.say(request("/" + "y" * 1_000_000)))
    assert status == 431
    assert server.seen == []


async def test_a_large_body_is_no_large_header(server: Server) -> None:
    body = b"x" * 1_000_000
    lines = [f"content-length: {len(body)}", "connection: close"]
    assert parts(await server.say(request("/", *lines, method="POST", body=body)))[0] == 200


async def test_the_second_request_of_a_connection_may_have_as_many_headers_and_no_more(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GatewayProtocol, "header_limit", 2000)
    good = request("/", "x: " + "y" * 1500)
    async with server.connect() as (reader, writer):
        for _ in range(3):
            writer.write(good)
            await reader.readuntil(b"GET / ")
        writer.write(request("/", "x: " + "y" * 3000)[:-2])
        assert error(await reader.read())[0] == 431


async def test_headers_pipelined_behind_a_running_request_are_bounded_too(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GatewayProtocol, "header_limit", 2000)
    waiting, gone = asyncio.Event(), asyncio.Event()

    async def slow(scope: Scope, client: ServerExchange, receive: Receive) -> None:
        client.on_gone = gone.set
        waiting.set()
        await gone.wait()

    server.app = slow
    async with server.connect() as (reader, writer):
        writer.write(request())
        await waiting.wait()
        (connection,) = server.connections
        writer.write(b"GET / HTTP/1.1\r\nx: " + b"y" * 200_000)
        with contextlib.suppress(ConnectionError, TimeoutError):
            async with asyncio.timeout(2):
                await reader.read()
        taken = connection.transport.is_closing() or not connection.transport.is_reading()
        gone.set()
        assert taken


@pytest.mark.parametrize(
    "said",
    [
        b"hello there\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /\x00 HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost gateway\r\n\r\n",
        b"POST / HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nok",
        b"POST / HTTP/1.1\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\ncontent-length: 0x2\r\n\r\nok",
    ],
)
async def test_what_is_no_http_is_refused_in_openais_shape(server: Server, said: bytes) -> None:
    status, detail = error(await server.say(said))
    assert (status, detail["type"], detail["code"]) == (400, "invalid_request_error", "invalid_request")
    assert server.seen == []


async def test_slow_headers_time_out(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GatewayProtocol, "header_seconds", 0.05)
    status, detail = error(await server.say(request()[:-2]))
    assert (status, detail["code"]) == (408, "request_timeout")
    assert "0.05 s" in detail["message"]


async def test_slow_headers_of_a_later_request_time_out_too(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GatewayProtocol, "header_seconds", 0.05)
    async with server.connect() as (reader, writer):
        writer.write(request())
        await reader.readuntil(b"GET / ")
        writer.write(request()[:-2])
        assert error(await reader.read())[0] == 408


async def test_a_request_that_begins_before_the_last_answer_has_its_own_time(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GatewayProtocol, "header_seconds", 1.0)
    monkeypatch.setattr(Connections, "idle", lambda *_: Deadlines(0.02))  # for connections without a request
    asked, released = asyncio.Event(), asyncio.Event()

    async def slow(scope: Scope, client: ServerExchange, receive: Receive) -> None:
        asked.set()
        await released.wait()
        await hello(scope, client, receive)

    server.app = slow
    async with server.connect() as (reader, writer):
        writer.write(request())
        await asked.wait()
        (connection,) = server.connections
        writer.write(request()[:-2])
        await until(lambda: connection.reading is Reading.HEAD)
        released.set()
        await reader.readuntil(b"GET / ")
        status, detail = error(await reader.read())
        assert status == 408
        assert "within 1 s" in detail["message"]


async def test_a_connection_that_says_nothing_is_closed_without_a_word(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GatewayProtocol, "header_seconds", 0.05)
    assert await server.say() == b""


async def test_an_idle_connection_and_a_slow_answer_are_no_slow_headers(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GatewayProtocol, "header_seconds", 0.02)
    released = asyncio.Event()

    async def slow(scope: Scope, client: ServerExchange, receive: Receive) -> None:
        await released.wait()
        await hello(scope, client, receive)

    async def silence(reader: asyncio.StreamReader) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.06):
                await reader.read(1)

    server.app = slow
    async with server.connect() as (reader, writer):
        for _ in range(2):
            released.clear()
            writer.write(request())
            await silence(reader)
            released.set()
            await reader.readuntil(b"GET / ")
            await silence(reader)


async def test_garbage_behind_a_stream_does_not_land_in_it(server: Server) -> None:
    streaming, gone = asyncio.Event(), asyncio.Event()

    async def endless(scope: Scope, client: ServerExchange, receive: Receive) -> None:
        client.on_gone = gone.set
        client.start(200, [])
        client.write(b"one")
        streaming.set()
        await gone.wait()

    server.app = endless
    async with server.connect() as (reader, writer):
        writer.write(request())
        await streaming.wait()
        writer.write(b"\x00\x00garbage\r\n\r\n")
        assert (await reader.read()).endswith(b"\r\n\r\n3\r\none\r\n")
        await gone.wait()


async def test_a_connection_reset_is_no_error(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.sendall(request()[:-2])
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert parts(await server.say(request("/", "connection: close")))[0] == 200
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


# The same over plain ASGI


class Asgi:
    """A server's half of ASGI: `receive` gives what a test says, `send` waits while the test holds it."""

    def __init__(self) -> None:
        self.said: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.sent: list[dict[str, Any]] = []
        self.open = asyncio.Event()
        self.open.set()

    async def receive(self) -> dict[str, Any]:
        return await self.said.get()

    async def send(self, message: Any) -> None:
        await self.open.wait()
        self.sent.append(message)

    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)


async def test_asgi_carries_a_whole_answer() -> None:
    asgi = Asgi()
    client = AsgiResponse(asgi.receive, asgi.send)
    client.respond(404, [TEXT], b"no")
    assert client.started
    await client.flushed()
    assert asgi.sent == [
        {"type": "http.response.start", "status": 404, "headers": [TEXT, (b"content-length", b"2")]},
        {"type": "http.response.body", "body": b"no", "more_body": False},
    ]


async def test_asgi_carries_a_stream_in_order() -> None:
    asgi = Asgi()
    client = AsgiResponse(asgi.receive, asgi.send)
    client.start(200, [TEXT])
    client.write(b"one")
    assert client.chunks() is None
    client.end(b"two")
    await client.flushed()
    assert asgi.body() == b"onetwo"
    assert [message.get("more_body") for message in asgi.sent] == [None, True, False]


async def test_asgi_pauses_the_flow_while_sends_wait_and_resumes_it_after() -> None:
    asgi, flow = Asgi(), WatchedFlow()
    client = AsgiResponse(asgi.receive, asgi.send)
    client.flow = flow
    asgi.open.clear()
    client.start(200, [])
    client.write(b"x" * AsgiResponse.HIGH_WATER)
    assert not flow.paused.is_set()
    client.write(b"x")
    assert flow.paused.is_set()
    assert not flow.resumed.is_set()
    asgi.open.set()
    async with asyncio.timeout(TIMEOUT):
        await flow.resumed.wait()
    client.end()
    await client.flushed()
    assert len(asgi.body()) == AsgiResponse.HIGH_WATER + 1


async def test_asgi_counts_what_is_held_while_a_send_waits() -> None:
    asgi, flow = Asgi(), WatchedFlow()
    client = AsgiResponse(asgi.receive, asgi.send)
    client.flow = flow
    asgi.open.clear()
    client.start(200, [])
    await asyncio.sleep(0)  # the pump now waits in its first send
    for _ in range(3):
        client.write(b"x" * (AsgiResponse.HIGH_WATER // 2))
    assert flow.paused.is_set()
    asgi.open.set()
    client.end()
    await client.flushed()


async def test_asgi_tells_of_a_client_that_left() -> None:
    asgi, gone, flow = Asgi(), asyncio.Event(), WatchedFlow()
    client = AsgiResponse(asgi.receive, asgi.send)
    client.on_gone = gone.set
    client.flow = flow
    client.watch()
    client.start(200, [])
    asgi.said.put_nowait({"type": "http.disconnect"})
    async with asyncio.timeout(TIMEOUT):
        await gone.wait()
    assert client.gone
    assert flow.stopped.is_set()
    client.end()
    await client.flushed()


async def test_asgi_takes_the_end_of_an_answer_for_no_departure() -> None:
    asgi, departures = Asgi(), list[bool]()
    client = AsgiResponse(asgi.receive, asgi.send)
    client.on_gone = lambda: departures.append(True)
    client.watch()
    client.respond(200, [], b"")
    asgi.said.put_nowait({"type": "http.disconnect"})
    await client.flushed()
    assert client._watch is not None
    await asyncio.wait([client._watch])
    assert departures == []
    assert not client.gone


async def test_asgi_that_is_cut_tells_the_request_to_end() -> None:
    asgi, gone = Asgi(), asyncio.Event()
    client = AsgiResponse(asgi.receive, asgi.send)
    client.on_gone = gone.set
    client.watch()
    asgi.open.clear()
    client.start(200, [])
    client.cut()
    asgi.said.put_nowait({"type": "http.disconnect"})
    async with asyncio.timeout(2):
        await gone.wait()
