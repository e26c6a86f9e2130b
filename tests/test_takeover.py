"""A gateway's restart: a new process takes over from an old one, and no request, stream or connection is lost."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from pd_proxy.runtime.sockets import bind, connection_limit, steer_here

from tests.processes import Process, gateway, ready
from tests.support import chat, completion, simulators, until

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


# The sockets


def accepted(listener: socket.socket) -> int:
    """Accept the connections that wait in a listening socket; returns how many there were."""
    listener.setblocking(False)
    count = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            listener.accept()[0].close()
            count += 1
    return count


def test_the_newest_socket_gets_all_connections_and_after_its_end_the_others_share_them() -> None:
    listeners = [bind("127.0.0.1", 0, reuse=True, timeout=60)]
    port = listeners[0].socket.getsockname()[1]
    address = ("127.0.0.1", port)
    try:
        for number in (2, 3):
            newest = bind("127.0.0.1", port, reuse=True, timeout=60)
            listeners.append(newest)
            assert newest.taken
            assert not newest.shared()
            newest.socket.listen()
            steer_here(newest.socket)
            assert listeners[0].shared()
            clients = [socket.create_connection(address) for _ in range(50)]
            assert [accepted(each.socket) for each in listeners] == [0] * (number - 1) + [50]
            for client in clients:
                client.close()
        listeners.pop(0).socket.close()
        listeners.pop(0).socket.close()
        assert not listeners[0].shared()
        clients = [socket.create_connection(address) for _ in range(10)]
        assert accepted(listeners[0].socket) == 10
        for client in clients:
            client.close()
    finally:
        for each in listeners:
            each.socket.close()


def test_a_socket_that_nobody_shares_listens_at_once() -> None:
    listener = bind("127.0.0.1", 0, reuse=True, timeout=60)
    with listener.socket:
        assert not listener.taken
        socket.create_connection(listener.socket.getsockname()).close()


def test_the_kernel_ends_connections_of_vanished_clients_and_of_clients_that_read_nothing() -> None:
    listener = bind("127.0.0.1", 0, reuse=False, timeout=7).socket
    with listener, socket.create_connection(listener.getsockname()), listener.accept()[0] as connection:
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 7000


def test_the_limit_on_connections_follows_from_the_files_that_streams_need() -> None:
    assert connection_limit(1024) == 298
    assert connection_limit(20_000) == 6624
    assert connection_limit(64) == 16


# Two processes


async def ready_at(url: str) -> None:
    async with httpx.AsyncClient(base_url=url, trust_env=False, verify=False) as http:
        await ready(http)


class Traffic:
    """A steady stream of requests, each on a connection of its own, and clients that keep theirs open.

    Attributes:
        outcomes: how requests ended: "ok", or an error.
        texts: the texts of the streams.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.outcomes: Counter[str] = Counter()
        self.texts: list[str] = []
        self._running = True
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, kept_alive: int, pause: float) -> None:
        self._tasks = [asyncio.create_task(self._new_connections(pause)) for _ in range(2)]
        self._tasks += [asyncio.create_task(self._kept_alive(pause)) for _ in range(kept_alive)]

    async def stop(self) -> None:
        self._running = False
        await asyncio.gather(*self._tasks)

    async def _new_connections(self, pause: float) -> None:
        while self._running:
            async with httpx.AsyncClient(base_url=self.url, timeout=20, trust_env=False, verify=False) as http:
                await self._ask(http)
            await asyncio.sleep(pause)

    async def _kept_alive(self, pause: float) -> None:
        async with httpx.AsyncClient(base_url=self.url, timeout=20, trust_env=False, verify=False) as http:
            while self._running:
                await self._ask(http)
                await asyncio.sleep(pause)

    async def _ask(self, http: httpx.AsyncClient) -> None:
        try:
            answer = await http.post(COMPLETIONS, json=completion(max_tokens=3))
            self.outcomes["ok" if answer.status_code == 200 else f"{answer.status_code} {answer.text}"] += 1
        except httpx.HTTPError as error:
            self.outcomes[repr(error)] += 1

    async def stream(self, tokens: int) -> None:
        """A stream that runs across the restart."""
        async with httpx.AsyncClient(base_url=self.url, timeout=20, trust_env=False, verify=False) as http:
            request = chat(stream=True, max_tokens=tokens, ignore_eos=True)
            async with http.stream("POST", CHAT, json=request) as answer:
                lines = [line async for line in answer.aiter_lines() if line]
        assert lines[-1] == "data: [DONE]"
        events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
        self.texts.append("".join(event["choices"][0]["delta"].get("content") or "" for event in events))


async def restart_under_load(
    url: str, old: Process, start_new: Callable[[], contextlib.AbstractAsyncContextManager[Process]]
) -> tuple[Traffic, Traffic]:
    """Replaces `old` by a new process while requests and streams go on; returns their outcomes before and after."""
    await ready_at(url)
    traffic, after = Traffic(url), Traffic(url)
    traffic.start(kept_alive=6, pause=0.01)
    streams = [asyncio.create_task(traffic.stream(150)) for _ in range(5)]  # 3 s
    await until(lambda: traffic.outcomes.total() > 50, 30)
    async with start_new() as new:
        await until(new.listens, 20)
        before = traffic.outcomes.total()
        left = asyncio.create_task(old.leave())
        await asyncio.gather(*streams)
        assert await left == 0
        await until(lambda: traffic.outcomes.total() > before + 200, 60)
        await traffic.stop()
        after.start(kept_alive=2, pause=0.0)
        await until(lambda: after.outcomes.total() > 20, 30)
        await after.stop()
        assert await new.leave() == 0
    return traffic, after


@pytest.mark.slow
@pytest.mark.parametrize("way", ["reuse_port", "inherited"])
async def test_a_new_process_takes_over_and_nothing_is_lost(way: str) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as owned:
        port = owned.getsockname()[1]
        if way == "reuse_port":
            owned.close()
        async with simulators("prefill", "decode", step_time=0.02, handshake_timeout=5.0) as [p, d]:
            flags = ["--prefill", p.url, "--decode", d.url, "--health.interval", "0.2"]

            def start() -> contextlib.AbstractAsyncContextManager[Process]:
                if way == "inherited":
                    return gateway(*flags, inherit=owned)
                return gateway(*flags, "--port", str(port), "--reuse-port")

            async with start() as old:
                await until(old.listens, 20)
                traffic, after = await restart_under_load(f"http://127.0.0.1:{port}", old, start)
                assert old.says("another process listens")
    assert traffic.outcomes.keys() == {"ok"}, traffic.outcomes
    assert after.outcomes.keys() == {"ok"}, after.outcomes
    assert traffic.outcomes.total() > 250
    assert len(traffic.texts) == 5
    assert len(set(traffic.texts)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("way", ["reuse_port", "inherited"])
async def test_connections_that_the_old_process_had_not_accepted_yet_are_served(way: str) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as owned:
        port = owned.getsockname()[1]
        if way == "reuse_port":
            owned.close()
        async with (
            simulators("prefill", "decode", handshake_timeout=5.0) as [p, d],
            contextlib.AsyncExitStack() as stack,
        ):
            flags = ["--prefill", p.url, "--decode", d.url, "--health.interval", "0.2"]
            old, new = [
                gateway(*flags, inherit=owned)
                if way == "inherited"
                else gateway(*flags, "--port", str(port), "--reuse-port")
                for _ in range(2)
            ]
            first = await stack.enter_async_context(old)
            await until(first.listens, 20)
            await ready_at(f"http://127.0.0.1:{port}")
            first.process.send_signal(signal.SIGSTOP)
            http = await stack.enter_async_context(
                httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False, verify=False)
            )
            asking = [asyncio.create_task(http.post(COMPLETIONS, json=completion(max_tokens=3))) for _ in range(50)]
            await until(lambda: connections_to(port) >= 50, 20)
            second = await stack.enter_async_context(new)
            await until(second.listens, 20)
            first.process.send_signal(signal.SIGTERM)
            first.process.send_signal(signal.SIGCONT)
            answers = await asyncio.gather(*asking)
            assert {answer.status_code for answer in answers} == {200}
            async with asyncio.timeout(20):
                assert await first.process.wait() == 0


def connections_to(port: int) -> int:
    """Connections of clients that the kernel has established."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
    return sum(row[2].endswith(f":{port:04X}") and row[3] == "01" for row in rows)


@pytest.mark.slow
async def test_a_new_process_that_cannot_serve_takes_no_clients_from_the_old_one() -> None:
    async with simulators("prefill", "decode") as [p, d]:
        flags = ["--decode", d.url, "--health.interval", "0.1", "--port"]
        async with gateway("--prefill", p.url, *flags, "0", "--reuse-port") as old:
            await until(old.listens, 20)
            await ready_at(old.url)
            async with gateway("--prefill", "http://127.0.0.1:9", *flags, str(old.port), "--reuse-port") as new:
                await until(lambda: new.says("taking over once ready"), 20)
                async with httpx.AsyncClient(base_url=old.url, trust_env=False, verify=False) as http:
                    for _ in range(100):
                        assert (await http.get("/ready", headers={"connection": "close"})).status_code == 200
                        await asyncio.sleep(0.01)
                assert not new.listens()
                assert await new.leave() == 0, "and a signal still ends it"


@pytest.mark.slow
async def test_without_the_setting_a_second_process_cannot_listen_on_the_port() -> None:
    async with gateway("--decode", "http://127.0.0.1:9", "--port", "0") as first:
        await until(first.listens, 20)
        for flag in ([], ["--reuse-port"]):
            async with gateway("--port", str(first.port), *flag) as second:
                async with asyncio.timeout(20):
                    assert await second.process.wait() == 1
        assert second.says("Address already in use")


@pytest.mark.slow
async def test_an_inherited_file_that_is_no_listening_socket_is_reported_in_one_line() -> None:
    with socket.socket() as quiet:
        async with gateway("--decode", "http://127.0.0.1:9", inherit=quiet) as process:
            async with asyncio.timeout(20):
                assert await process.process.wait() == 1
        assert process.log[-1].endswith(" pd_proxy: file descriptor 3 (LISTEN_FDS) is not a listening TCP socket\n")
        assert len([line for line in process.log if "LISTEN_FDS" in line]) == 1


@pytest.mark.slow
async def test_systemd_is_notified_when_the_gateway_is_ready_and_when_it_stops(tmp_path: Path) -> None:
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(path)
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        async with gateway("--decode", "http://127.0.0.1:9", "--port", "0", NOTIFY_SOCKET=path) as process:
            async with asyncio.timeout(20):
                assert await loop.sock_recv(sock, 100) == b"READY=1"
                process.process.send_signal(signal.SIGTERM)
                assert await loop.sock_recv(sock, 100) == b"STOPPING=1"


@pytest.mark.slow
async def test_a_client_that_still_reads_its_answer_is_waited_for() -> None:
    """Its request ended long ago; the unread rest of its answer would be lost with the process."""
    async with (
        simulators("prefill", "decode") as [p, d],
        gateway("--prefill", p.url, "--decode", d.url, "--port", "0") as process,
    ):
        await until(process.listens, 20)
        await ready_at(process.url)
        body = json.dumps(chat(max_tokens=9000, ignore_eos=True, logprobs=True, top_logprobs=5)).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
        loop = asyncio.get_running_loop()
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.setblocking(False)
            await loop.sock_connect(sock, ("127.0.0.1", process.port))
            await loop.sock_sendall(sock, head.encode() + body)
            async with asyncio.timeout(20):
                answer = await loop.sock_recv(sock, 1000)
                length = int(answer.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
                assert length > 1_000_000
                leaving = asyncio.create_task(process.leave())
                await asyncio.sleep(7)  # longer than the forced end takes
                while data := await loop.sock_recv(sock, 1 << 20):
                    answer += data
        assert len(answer.partition(b"\r\n\r\n")[2]) == length
        assert await leaving == 0
