"""Slow and hostile clients of a whole gateway: engines get no wrong requests, other clients are served, nothing stays
in flight."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from time import monotonic
from typing import Any

import pytest

from tests.support import Running, chat, completion, pools, until

CHAT = "/v1/chat/completions"
TIMEOUT = 10.0


@contextlib.asynccontextmanager
async def reluctant(running: Running) -> AsyncIterator[socket.socket]:
    """A client with a small receive buffer, so that data that it does not read stays in the gateway."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", running.port))
        yield sock


async def ask(sock: socket.socket, body: dict[str, Any], *headers: str) -> None:
    data = json.dumps(body).encode()
    lines = [f"POST {CHAT} HTTP/1.1", "host: x", f"content-length: {len(data)}", *headers, "", ""]
    await asyncio.get_running_loop().sock_sendall(sock, "\r\n".join(lines).encode() + data)


async def everything(sock: socket.socket) -> bytes:
    received = b""
    async with asyncio.timeout(60):
        while data := await asyncio.get_running_loop().sock_recv(sock, 65536):
            received += data
    return received


def text_of_stream(answer: bytes) -> str:
    """The text of a chunked stream of events, which has to be complete."""
    body, text = answer.partition(b"\r\n\r\n")[2], b""
    while True:
        size, _, body = body.partition(b"\r\n")
        if size == b"0":
            break
        text += body[: int(size, 16)]
        body = body[int(size, 16) + 2 :]
    events = [line.removeprefix("data: ") for line in text.decode().split("\n\n") if line]
    assert events[-1] == "[DONE]"
    return "".join(json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events[:-1])


@pytest.mark.slow
async def test_a_slow_reader_stops_its_own_stream_only_and_gets_every_byte() -> None:
    async with pools() as (running, _, [d]), reluctant(running) as sock:
        long = chat(stream=True, max_tokens=6_000, ignore_eos=True)
        whole = (await running.http.post(CHAT, json=long | {"stream": False})).json()["choices"][0]["message"]
        await ask(sock, long, "connection: close")
        await until(lambda: any(not c.writable for c in running.connections), TIMEOUT)
        [slow] = [c for c in running.connections if not c.writable]
        # All data of one read is written before the pause takes effect, so one read may exceed the mark.
        assert slow.unsent <= 64 * 1024 + 256 * 1024
        held = slow.unsent
        started = monotonic()
        for _ in range(20):
            answer = await running.http.post("/v1/completions", json=completion(max_tokens=50))
            assert answer.status_code == 200
        assert monotonic() - started < TIMEOUT
        assert slow.unsent == held, "nothing more is taken from the engine meanwhile"
        assert d.engine.running <= 1
        assert text_of_stream(await everything(sock)) == whole["content"]
        await until(running.idle)


async def test_the_memory_of_a_stream_that_is_not_read_is_bounded() -> None:
    async with pools(timeouts={"idle": 60}) as (running, _, [d]), reluctant(running) as sock:
        await ask(sock, chat(stream=True, max_tokens=30_000, ignore_eos=True, logprobs=True, top_logprobs=5))
        await until(lambda: any(not c.writable for c in running.connections), TIMEOUT)
        [slow] = [c for c in running.connections if not c.writable]
        before = -1
        while before != slow.unsent:  # the last data that was on its way from the engine
            before = slow.unsent
            await asyncio.sleep(0.1)
        assert 0 < before <= 64 * 1024 + 256 * 1024
    await until(lambda: d.engine.running == 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", ["/metrics", "/v1/models", "/nothing", "/openapi.json"], ids=["metrics", "models", "error", "openapi"]
)
async def test_a_client_that_sends_requests_and_never_reads_is_cut_off_on_every_route(path: str) -> None:
    async with pools(timeouts={"idle": 3}) as (running, _, _), reluctant(running) as sock:
        loop = asyncio.get_running_loop()
        await until(lambda: len(running.connections) == 1)
        [mine] = running.connections
        sent = most = 0
        state = running.server.server_state
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(60):
                while mine in running.connections:
                    await loop.sock_sendall(sock, f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
                    sent += 1
                    # One request after the other, until the answers are no longer sent.
                    while mine in running.connections and state.total_requests < sent and not most:
                        most = max(most, mine.unsent)
                        await asyncio.sleep(0)
                    most = max(most, mine.unsent)
        assert 0 < most < 256 * 1024, "the mark, and one answer on top of it"
        await until(lambda: not mine.is_answering)  # the client may notice the end of the connection first
        assert (await running.http.get("/health")).status_code == 200


@pytest.mark.slow
async def test_a_client_that_never_reads_a_long_answer_is_cut_off_and_blames_no_engine() -> None:
    async with pools(timeouts={"idle": 0.4}) as (running, [p], [d]), reluctant(running) as sock:
        await ask(sock, chat(max_tokens=9000, ignore_eos=True, logprobs=True, top_logprobs=5))
        await until(lambda: any(c.unsent > 500_000 for c in running.connections), 30)
        assert running.idle(), "its leases have gone with its answer"
        await until(lambda: not any(c.unsent for c in running.connections), TIMEOUT)
        assert p.engine.stranded_blocks == 0
        assert d.engine.running == 0


async def test_the_body_of_every_route_is_bounded_before_the_key_is_checked() -> None:
    async with pools(timeouts={"request_body": 0.3}, admin_key="k") as (running, _, _):
        answer = await running.http.post("/instances/add", content=b"x" * 2_000_000)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(b"POST /instances/add HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        async with asyncio.timeout(5):
            answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_timeout"
        writer.close()


async def test_a_client_without_a_key_is_refused_before_its_body_is_read() -> None:
    async with pools(api_keys=["k"]) as (running, _, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: 60000000\r\n\r\n{{".encode())
        async with asyncio.timeout(5):
            answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 401 ")
        assert b"\r\nconnection: close\r\n" in answer
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(5):
                while True:
                    writer.write(b"x" * 1000)
                    await writer.drain()
                    await asyncio.sleep(0.01)
        await until(running.idle)


SMUGGLED = json.dumps(chat("smuggled")).encode()


@pytest.mark.parametrize(
    "said",
    [
        b"content-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"transfer-encoding: chunked\r\ncontent-length: 4\r\n\r\n0\r\n\r\n",
        b"content-length: 0\r\ncontent-length: 4\r\n\r\n",
        b"transfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        b"x: y\n\n",
        b"x: y\r\n transfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"x: \x00\r\n\r\n",
        b"transfer-encoding: chunked\r\n\r\nfffffffffffffffffff\r\n",
        b"transfer-encoding: chunked\r\n\r\n1;x\n\r\n0\r\n\r\n",
    ],
)
async def test_a_request_that_is_smuggled_in_an_ambiguous_one_reaches_no_engine(said: bytes) -> None:
    async with pools() as (running, p, d):
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\n".encode()
        hidden = head + b"content-length: %d\r\n\r\n" % len(SMUGGLED) + SMUGGLED
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(head + said + hidden)
        async with asyncio.timeout(5):
            answer = await reader.read()
        writer.close()
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert answer.count(b"HTTP/1.1 ") == 1
        await until(running.idle)
        assert not [r for e in (*p, *d) for r in e.requests if r.path == CHAT]


async def test_of_a_thousand_pipelined_requests_only_a_few_reach_the_engines() -> None:
    async with pools() as (running, _, [d]):
        body = json.dumps(completion(max_tokens=2)).encode()
        one = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(one * 1000)
        answer = b""
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(20):
                while data := await reader.read(65536):
                    answer += data
        writer.close()
        answered = answer.count(b"HTTP/1.1 200 OK")
        assert 1 < answered <= 17
        assert len([r for r in d.requests if r.path == "/v1/completions"]) == answered
        await until(running.idle)


async def test_connections_beyond_the_limit_get_a_503_and_the_metrics_say_so() -> None:
    async with pools(limits={"connections": 4}) as (running, _, _):
        clients = [await asyncio.open_connection("127.0.0.1", running.port) for _ in range(4)]
        await until(lambda: len(running.connections) == 4)
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{{}}".encode())
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "too_many_connections"
        writer.close()
        page = (await running.http.get("/metrics")).text.splitlines()
        assert "pd_proxy_client_connections_limit 4.0" in page
        assert "pd_proxy_client_connections 5.0" in page, "the scrape's own is let in though there are too many"
        assert "pd_proxy_client_connections_refused_total 1.0" in page
        for _, writer in clients:
            writer.close()
