"""The process: how it starts, and how it stops."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from tests.processes import Process, environment, ready, served
from tests.support import OPERATOR, chat, simulators, until

CHAT = "/v1/chat/completions"
pytestmark = pytest.mark.slow


async def test_sigterm_lets_running_streams_finish_and_exits_0() -> None:
    async with (
        simulators("prefill", "decode", step_time=0.02) as [p, d],
        served("--prefill", p.url, "--decode", d.url) as gateway,
        httpx.AsyncClient(base_url=gateway.url, timeout=30, trust_env=False, verify=False) as http,
    ):
        await ready(http)
        async with http.stream("POST", CHAT, json=chat(stream=True, max_tokens=60, ignore_eos=True)) as answer:
            lines = answer.aiter_lines()
            assert (await anext(lines)).startswith("data: ")
            gateway.signal(signal.SIGTERM)
            async with asyncio.timeout(5):
                while (await http.get("/ready")).status_code != 503:
                    await asyncio.sleep(0.01)
            refused = await http.post(CHAT, json=chat())
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
            assert (await http.get("/health")).status_code == 200
            rest = [line async for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert len(rest) >= 60
        assert await gateway.status() == 0


async def test_streams_that_outlast_the_grace_end_with_an_error() -> None:
    async with (
        simulators("prefill", "decode", step_time=0.02) as [p, d],
        served("--prefill", p.url, "--decode", d.url, "--shutdown.grace", "0.3") as gateway,
        httpx.AsyncClient(base_url=gateway.url, timeout=30, trust_env=False, verify=False) as http,
    ):
        await ready(http)
        async with http.stream("POST", CHAT, json=chat(stream=True, max_tokens=9000, ignore_eos=True)) as answer:
            lines = answer.aiter_lines()
            await anext(lines)
            gateway.signal(signal.SIGTERM)
            rest = [line async for line in lines if line]
        assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "draining"
        assert await gateway.status() == 0
        await until(lambda: d.engine.running == 0)


async def test_an_idle_gateway_stops_at_once_and_so_does_ctrl_c() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        async with served("--decode", "http://127.0.0.1:9") as gateway:
            gateway.signal(number)
            assert await gateway.status() == 0


async def test_metrics_can_have_a_port_of_their_own() -> None:
    async with served("--decode", "http://127.0.0.1:9", "--metrics.port", "0") as gateway:
        async with asyncio.timeout(60):
            while not any("for /metrics" in line for line in gateway.log):
                await asyncio.sleep(0.02)
        [line] = [line for line in gateway.log if "for /metrics" in line]
        url = re.search(r"http://\S+", line)
        assert url is not None
        async with httpx.AsyncClient(trust_env=False, verify=False) as http:
            assert "pd_proxy_backend_up" in (await http.get(f"{url[0]}/metrics")).text
            assert (await http.get(f"{gateway.url}/metrics")).status_code == 404


async def test_a_taken_port_is_reported_in_one_line() -> None:
    async with served("--decode", "http://127.0.0.1:9") as gateway:
        port = gateway.url.rsplit(":", 1)[1]
        second = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "pd_proxy.cli", "serve", "--port", port, "--mixed", "http://127.0.0.1:9"),
            stderr=asyncio.subprocess.PIPE,
        )
        _, said = await second.communicate()
        assert second.returncode == 1
        line = said.decode().splitlines()[-1]
        assert line.endswith(f" error   pd_proxy: cannot listen on 127.0.0.1:{port}: Address already in use")


async def test_a_process_without_free_files_neither_dies_nor_spins_and_serves_again() -> None:
    async with (
        simulators("prefill", "decode") as [p, d],
        served("--prefill", p.url, "--decode", d.url, "--limits.connections", "1000", files=100) as gateway,
    ):
        async with httpx.AsyncClient(base_url=gateway.url, timeout=30, trust_env=False, verify=False) as http:
            await ready(http)
        assert any("limits.connections" in line for line in gateway.log), "the limit was said to be too high"
        port = int(gateway.url.rsplit(":", 1)[1])
        crowd = [socket.create_connection(("127.0.0.1", port)) for _ in range(200)]
        before = cpu_seconds(gateway.process.pid)
        await asyncio.sleep(1)  # it must not be busy meanwhile
        assert cpu_seconds(gateway.process.pid) - before < 0.5
        for client in crowd:
            client.close()
        async with httpx.AsyncClient(base_url=gateway.url, timeout=30, trust_env=False, verify=False) as http:
            await ready(http)
            assert (await http.post(CHAT, json=chat())).status_code == 200


async def test_idle_connections_block_neither_the_probes_nor_the_port_of_the_metrics() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        metrics = free.getsockname()[1]
    async with (
        simulators("prefill", "decode") as [p, d],
        served(
            *("--prefill", p.url, "--decode", d.url, "--metrics.port", str(metrics), "--admin_key", "operator"),
            files=256,
        ) as gateway,
    ):
        port = int(gateway.url.rsplit(":", 1)[1])
        crowd = [socket.create_connection(("127.0.0.1", at)) for at in (port, metrics) for _ in range(300)]
        before = cpu_seconds(gateway.process.pid)
        pages = (f"{gateway.url}/health", f"{gateway.url}/admin/backends", f"http://127.0.0.1:{metrics}/metrics")
        for _ in range(3):
            for page in pages:  # each on a new connection, as probes are
                async with httpx.AsyncClient(headers=OPERATOR, timeout=30, trust_env=False, verify=False) as http:
                    assert (await http.get(page)).status_code == 200
        await asyncio.sleep(1)  # it must not be busy meanwhile
        assert cpu_seconds(gateway.process.pid) - before < 1
        files = len(list(Path(f"/proc/{gateway.process.pid}/fd").iterdir()))
        assert files < 256 - 2 * 42, "none are left for the legs of streams on all the connections"
        async with httpx.AsyncClient(base_url=gateway.url, timeout=30, trust_env=False, verify=False) as http:
            answers = [await http.post(CHAT, json=chat())]
            while answers[-1].status_code == 503:  # until some connections have been idle for long enough to be closed
                answers.append(await http.post(CHAT, json=chat()))
            assert answers[-1].status_code == 200
        for client in crowd:
            client.close()


async def test_by_default_the_limit_on_connections_is_reached_before_the_limit_on_files() -> None:
    async with (
        simulators("prefill", "decode") as [p, d],
        served("--prefill", p.url, "--decode", d.url, files=200) as gateway,
        httpx.AsyncClient(base_url=gateway.url, timeout=30, trust_env=False, verify=False) as http,
    ):
        await ready(http)
        port = int(gateway.url.rsplit(":", 1)[1])
        crowd = [socket.create_connection(("127.0.0.1", port)) for _ in range(60)]
        # 24 may be open, and 16 more are accepted.
        assert (await http.post(CHAT, json=chat())).status_code == 200
        metrics = (await http.get("/metrics")).text
        assert "pd_proxy_client_connections 40.0" in metrics
        assert "pd_proxy_client_connections_refused_total 21.0" in metrics
        for client in crowd:
            client.close()


def cpu_seconds(pid: int) -> float:
    """CPU that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@asynccontextmanager
async def unread(*flags: str) -> AsyncIterator[Process]:
    """A gateway whose standard error is read only while it starts. The pipe holds a dozen lines."""
    end, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "pd_proxy.cli", "serve", "--port", "0", *flags, stderr=writing,
        env=environment(),
    )  # fmt: skip
    os.close(writing)
    try:
        said = b""
        while re.search(rb"listening on http://\S+\n", said) is None:
            said += await asyncio.wait_for(asyncio.to_thread(os.read, end, 4096), 20)
        yield Process(process, said.decode().splitlines(keepends=True))
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        os.close(end)


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_an_unread_standard_error_stops_neither_requests_nor_the_end_of_the_process(workers: str) -> None:
    flags = ("--access_log", "--log_level", "debug", "--workers", workers, "--shutdown.delay", "0")
    async with (
        simulators("prefill", "decode") as [p, d],
        unread("--prefill", p.url, "--decode", d.url, *flags) as gateway,
        httpx.AsyncClient(base_url=gateway.url, timeout=20, trust_env=False, verify=False) as http,
    ):
        await ready(http)
        for _ in range(60):
            assert (await http.post(CHAT, json=chat(max_tokens=2))).status_code == 200
        d.faults.add("status", status=500)
        # each writes a line, with or without an access log
        failing = [http.post(CHAT, json=chat(max_tokens=2)) for _ in range(20)]
        assert all(answer.status_code >= 500 for answer in await asyncio.gather(*failing))
        gateway.signal(signal.SIGTERM)
        assert await gateway.status() == 0


async def test_a_closed_standard_error_stops_nothing() -> None:
    end, writing = os.pipe()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "pd_proxy.cli", "serve", "--port", "0", "--access_log", stderr=writing,
        env=environment(),
    )  # fmt: skip
    os.close(writing)
    try:
        said = b""
        while (found := re.search(rb"listening on (http://\S+)\n", said)) is None:
            said += await asyncio.wait_for(asyncio.to_thread(os.read, end, 4096), 20)
        os.close(end)
        async with httpx.AsyncClient(base_url=found[1].decode(), timeout=20, trust_env=False, verify=False) as http:
            for _ in range(5):
                assert (await http.post(CHAT, json=chat())).status_code == 404  # it has no backends
            assert "pd_proxy_log_lines_dropped_total" in (await http.get("/metrics")).text
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 20) == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_operators_are_served_at_a_socket_of_their_own_which_is_removed_with_the_process(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    async with (
        simulators("mixed", "mixed") as [one, other],
        served("--mixed", one.url, "--admin-socket", str(path), "--workers", "2") as gateway,
        httpx.AsyncClient(base_url=gateway.url, timeout=30, trust_env=False, verify=False) as http,
        httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=str(path)), base_url="http://localhost", timeout=30
        ) as operator,
    ):
        await ready(http)
        change = {"type": "mixed", "instances": [other.url]}
        assert (await http.post("/instances/add", json=change)).status_code == 403
        assert (await operator.post("/instances/add", json=change)).status_code == 200
        for _ in range(6):  # so that every worker may answer once
            async with httpx.AsyncClient(base_url=gateway.url, timeout=30, trust_env=False, verify=False) as client:
                listed = (await client.get("/admin/backends")).json()["backends"]
                assert [backend["url"] for backend in listed] == [one.url, other.url]
        gateway.signal(signal.SIGTERM)
        assert await gateway.status() == 0
    assert list(tmp_path.iterdir()) == []


async def test_missing_settings_for_operators_are_logged_at_the_start() -> None:
    async with served("--host", "0.0.0.0") as gateway:
        await until(lambda: any("reverse proxy" in line for line in gateway.log))
        assert any("requests that change the gateway (/instances/add) are refused" in line for line in gateway.log)
    async with served("--host", "0.0.0.0", "--admin-key", "k") as gateway:
        assert not any("no admin_key" in line or "neither admin_key" in line for line in gateway.log)


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_ignored_signals_are_logged_and_cut_no_stream(workers: str) -> None:
    async with (
        simulators("prefill", "decode", step_time=0.02) as [p, d],
        served("--workers", workers, "--prefill", p.url, "--decode", d.url) as gateway,
        httpx.AsyncClient(base_url=gateway.url, timeout=30, trust_env=False, verify=False) as http,
    ):
        await ready(http)
        async with http.stream("POST", CHAT, json=chat(stream=True, max_tokens=60, ignore_eos=True)) as answer:
            lines = answer.aiter_lines()
            assert (await anext(lines)).startswith("data: ")
            for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
                gateway.signal(number)
                name = signal.Signals(number).name
                await until(lambda name=name: any(f"{name} is ignored" in line for line in gateway.log))  # type: ignore[misc]
            rest = [line async for line in lines if line]
        assert rest[-1] == "data: [DONE]" and len(rest) >= 60
        assert (await http.post(CHAT, json=chat())).status_code == 200
        assert gateway.process.returncode is None
        assert sum("SIGHUP is ignored" in line for line in gateway.log) == 1


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_sigquit_lets_running_streams_finish_too(workers: str) -> None:
    async with (
        simulators("prefill", "decode", step_time=0.02) as [p, d],
        served("--workers", workers, "--prefill", p.url, "--decode", d.url) as gateway,
        httpx.AsyncClient(base_url=gateway.url, timeout=30, trust_env=False, verify=False) as http,
    ):
        await ready(http)
        async with http.stream("POST", CHAT, json=chat(stream=True, max_tokens=60, ignore_eos=True)) as answer:
            lines = answer.aiter_lines()
            assert (await anext(lines)).startswith("data: ")
            gateway.signal(signal.SIGQUIT)
            rest = [line async for line in lines if line]
        assert rest[-1] == "data: [DONE]" and len(rest) >= 60
        assert await gateway.status() == 0
