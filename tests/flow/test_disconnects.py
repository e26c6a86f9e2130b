"""A client that leaves, at every stage: its legs are ended within 0.2 s, and no count stays behind."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import Callable
from typing import Any

import pytest
from pd_proxy.http.connection import Connection
from pd_proxy.http.origin import Origin
from pd_proxy_simulator import Simulator

from tests.support import Running, chat, pools, running_gateway, simulators, soon, stuck_backend, until

CHAT = "/v1/chat/completions"
SOON = 0.2  # seconds
TIMEOUT = 5.0  # how long a loaded machine may take to bring a request to its stage


class RawClient:
    """A client that sends bytes and leaves when it likes."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def __aenter__(self) -> RawClient:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self._port)
        return self

    async def __aexit__(self, *error: object) -> None:
        self.writer.close()

    def send(self, request: dict[str, Any], *, cut: int = 0) -> None:
        """Send a chat request, without its last `cut` bytes."""
        body = json.dumps(request).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
        data = head.encode() + body
        self.writer.write(data[: len(data) - cut])

    def leave(self, *, reset: bool = False) -> None:
        """Close the connection, politely or not."""
        if reset:
            sock = self.writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.writer.transport.abort()
        else:
            self.writer.close()


def quiet(running: Running, engines: list[Simulator]) -> Callable[[], bool]:
    """Whether neither the gateway nor an engine has anything in flight, pinned or waiting."""
    return lambda: running.idle() and all(e.engine.running == 0 and e.engine.waiting == 0 for e in engines)


async def left(running: Running, engines: list[Simulator], stage: str) -> None:
    await soon(quiet(running, engines), SOON)
    metrics = await running.metrics()
    assert metrics[f'pd_proxy_client_disconnects_total{{stage="{stage}"}}'] == 1
    assert metrics["pd_proxy_handoffs_pending"] == 0
    for engine in engines:
        for kind in ("requests", "tokens"):
            name = f'pd_proxy_backend_inflight_{kind}{{backend="{engine.url}",pool="{engine.config.role}"}}'
            assert metrics[name] == 0


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
async def test_in_the_middle_of_its_own_body(reset: bool) -> None:
    async with pools() as (running, p, d), RawClient(running.port) as client:
        client.send(chat(), cut=10)
        await until(lambda: running.gateway.gate.inside == 1, TIMEOUT)
        client.leave(reset=reset)
        await left(running, [*p, *d], "admission")
        assert not [r for e in (*p, *d) for r in e.requests if r.path == CHAT]


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_while_prefill_runs(stream: bool, reset: bool) -> None:
    async with pools(engine={"prefill_rate": 5.0}) as (running, [p], [d]), RawClient(running.port) as client:
        client.send(chat(stream=stream))
        await until(lambda: p.engine.running == 1, TIMEOUT)
        client.leave(reset=reset)
        await left(running, [p, d], "prefill")
        assert p.engine.stranded_blocks == 0


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_while_decode_has_not_answered(stream: bool) -> None:
    async with pools() as (running, [p], [d]), RawClient(running.port) as client:
        d.faults.add("hang", leg="decode")
        client.send(chat(stream=stream))
        await until(lambda: running.gateway.fleet.handoffs_pending == 1 and len(d.requests) > 0, TIMEOUT)
        await until(lambda: any(r.path == CHAT for r in d.requests), TIMEOUT)
        client.leave()
        await left(running, [p, d], "stream" if stream else "decode")  # a stream has its first token from prefill


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
async def test_in_the_middle_of_its_stream(reset: bool) -> None:
    async with pools(engine={"step_time": 0.02}) as (running, [p], [d]), RawClient(running.port) as client:
        client.send(chat(stream=True, max_tokens=5000, ignore_eos=True))
        await client.reader.readuntil(b"data: ")
        client.leave(reset=reset)
        await left(running, [p, d], "stream")
        assert p.engine.stranded_blocks == 0


async def test_while_decode_computes_a_whole_answer() -> None:
    async with pools(engine={"step_time": 0.02}) as (running, [p], [d]), RawClient(running.port) as client:
        client.send(chat(max_tokens=5000, ignore_eos=True))
        await until(lambda: d.engine.running == 1, TIMEOUT)
        client.leave()
        await left(running, [p, d], "decode")


async def test_while_the_gateway_connects_to_decode() -> None:
    connect = 1.0  # long enough that prefill, which does answer, is not taken for stuck where the machine stalls
    with stuck_backend() as url:
        async with (
            simulators("prefill") as [p],
            running_gateway([p.url], [url], ready=False, timeouts={"connect": connect}) as running,
        ):
            fleet = running.gateway.fleet
            await until(lambda: fleet.pool("prefill")[0].up)
            fleet.bring_in(fleet.pool("decode")[0])
            async with RawClient(running.port) as client:
                client.send(chat())
                await until(lambda: fleet.handoffs_pending == 1, TIMEOUT)
                client.leave()
                await soon(lambda: not running.gateway.gate.inside, SOON)
                await until(running.idle, 5 * connect + TIMEOUT)  # after some attempts to have the hand-off claimed


async def test_before_decodes_leg_has_gone_out(monkeypatch: pytest.MonkeyPatch) -> None:
    async with pools(first_token="decode") as (running, [p], [d]), RawClient(running.port) as client:
        post, begun = Origin._post, asyncio.Event()

        def hold(origin: Origin, connection: Connection) -> None:
            if origin.url != d.url:
                post(origin, connection)
                return
            monkeypatch.setattr(Origin, "_post", post)
            begun.set()

        monkeypatch.setattr(Origin, "_post", hold)
        client.send(chat(stream=True))
        async with asyncio.timeout(TIMEOUT):
            await begun.wait()
        client.leave()
        await p.wait_for(lambda: p.engine.stranded_blocks == 0)  # long before the lease's end
        assert p.engine.handoffs.pinned_total == 1
        await left(running, [p, d], "decode")
        assert len(d.requests) == 1  # which had prefill free the blocks


async def test_while_a_failed_try_waits_for_the_next() -> None:
    async with pools(retries={"attempts": 20}) as (running, [p], [d]), RawClient(running.port) as client:
        d.faults.add("status", status=500)
        client.send(chat())
        await until(lambda: len([r for r in d.requests if r.path == CHAT]) >= 3, TIMEOUT)
        client.leave()
        await soon(quiet(running, [p, d]), SOON)


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_at_any_moment(stream: bool) -> None:
    """A sweep: the request takes some 60 ms, and clients leave at each half millisecond of it."""
    engine = {"prefill_rate": 3000.0, "step_time": 0.002}
    async with pools(2, 2, engine=engine) as (running, p, d):

        async def leave_after(delay: float, reset: bool) -> None:
            async with RawClient(running.port) as client:
                client.send(chat(stream=stream))
                await asyncio.sleep(delay)  # the moment is what is being swept
                client.leave(reset=reset)

        for start in range(0, 160, 8):
            await asyncio.gather(*(leave_after((start + k) * 0.0005, k % 2 == 0) for k in range(8)))
        await soon(quiet(running, [*p, *d]), 5 * SOON)
        metrics = await running.metrics()
        assert metrics["pd_proxy_handoffs_pending"] == 0
        ended = {k: v for k, v in metrics.items() if k.startswith("pd_proxy_requests_total")}
        assert sum(ended.values()) > 0
        assert all('outcome="ok"' in k or 'outcome="client_gone"' in k for k in ended), ended
        answer = await running.http.post(CHAT, json=chat())
        assert answer.status_code == 200


async def test_one_that_stops_reading_slows_its_engine_and_is_let_go_in_the_end() -> None:
    async with pools(timeouts={"idle": 0.5}) as (running, [p], [d]):
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(sock, ("127.0.0.1", running.port))
            body = json.dumps(chat(stream=True, max_tokens=30000, ignore_eos=True)).encode()
            await loop.sock_sendall(
                sock, f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body
            )
            await until(lambda: running.gateway.gate.inside == 1, TIMEOUT)
            await until(quiet(running, [p, d]))
