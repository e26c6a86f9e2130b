"""Several workers: one gateway to its clients, its operators and its scraper, whichever worker dies."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.processes import Process, ready, served
from tests.support import OPERATOR, chat, completion, simulators, until

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
pytestmark = pytest.mark.slow


def workers_of(process: Process) -> list[int]:
    """The process ids of a gateway's workers."""
    pid = process.process.pid
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


async def metric(http: httpx.AsyncClient, name: str) -> float:
    """The sum of a metric's samples."""
    families = text_string_to_metric_families((await http.get("/metrics")).text)
    return sum(s.value for family in families for s in family.samples if s.name == name)


async def until_metric(http: httpx.AsyncClient, name: str, value: float) -> None:
    """Wait until the samples of a metric add up to a value."""
    async with asyncio.timeout(60):
        while await metric(http, name) != value:
            await asyncio.sleep(0.05)


async def ask_apart(url: str, count: int, body: dict[str, Any], path: str = COMPLETIONS) -> list[httpx.Response]:
    """Send requests at the same time, each on its own connection."""

    async def one() -> httpx.Response:
        # Without certificates: loading them this often takes seconds on a busy machine.
        async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False, verify=False) as http:
            return await http.post(path, json=body)

    return await asyncio.gather(*(one() for _ in range(count)))


async def test_workers_are_one_gateway_to_a_scraper_and_to_an_operator() -> None:
    async with (
        simulators("prefill", "decode", "decode") as [p, d1, d2],
        served("--workers", "3", "--prefill", p.url, "--decode", d1.url, "--admin_key", "operator") as process,
        httpx.AsyncClient(base_url=process.url, headers=OPERATOR, timeout=20, trust_env=False, verify=False) as http,
    ):
        await ready(http)
        answers = await ask_apart(process.url, 60, completion())
        assert {answer.status_code for answer in answers} == {200}
        await until_metric(http, "pd_proxy_requests_total", 60)  # a client has its answer before it is counted
        for _ in range(6):  # so that every worker may answer once
            assert await metric(http, "pd_proxy_requests_total") == 60
            assert await metric(http, "pd_proxy_backend_up") == 2
            # the answers were not streamed
            assert await metric(http, "pd_proxy_time_to_first_token_seconds_count") == 0
        decisions = (await http.get("/admin/decisions?limit=1000")).json()["decisions"]
        assert len({decision["request_id"] for decision in decisions}) == 60
        assert [decision["at"] for decision in decisions] == sorted((d["at"] for d in decisions), reverse=True)
        added = await http.post("/instances/add", json={"type": "decode", "instances": d2.url})
        assert added.status_code == 200
        name = d1.url.removeprefix("http://")
        assert (await http.post(f"/admin/backends/{name}/drain")).status_code == 200
        for _ in range(8):
            async with httpx.AsyncClient(
                base_url=process.url, headers=OPERATOR, timeout=20, trust_env=False, verify=False
            ) as other:
                listed = (await other.get("/admin/backends")).json()["backends"]
                assert {b["url"]: b["draining"] for b in listed} == {p.url: False, d1.url: True, d2.url: False}
        before = len(d1.requests)
        await until_up(http, d2.url)
        assert {a.status_code for a in await ask_apart(process.url, 20, completion())} == {200}
        assert len(d1.requests) == before


async def until_up(http: httpx.AsyncClient, url: str) -> None:
    """Wait until every worker has a backend in its rotation: the merged metric is the lowest of them."""
    async with asyncio.timeout(60):
        while True:
            families = text_string_to_metric_families((await http.get("/metrics")).text)
            up = {s.labels["backend"]: s.value for f in families for s in f.samples if s.name == "pd_proxy_backend_up"}
            if up.get(url) == 1:
                return
            await asyncio.sleep(0.05)


async def test_a_worker_that_is_killed_is_replaced_and_no_stream_of_the_others_ends() -> None:
    async with (
        simulators("prefill", "decode", step_time=0.02) as [p, d],
        served("--workers", "2", "--prefill", p.url, "--decode", d.url, "--admin_key", "operator") as process,
        httpx.AsyncClient(base_url=process.url, headers=OPERATOR, timeout=20, trust_env=False, verify=False) as http,
    ):
        await ready(http)
        await ask_apart(process.url, 10, completion(max_tokens=2))
        await http.post(f"/admin/backends/{p.url.removeprefix('http://')}/drain")
        counted = await metric(http, "pd_proxy_requests_total")
        whole = cut = 0

        async def stream() -> None:
            nonlocal whole, cut
            body = chat(max_tokens=200, ignore_eos=True, stream=True)
            try:
                async with httpx.AsyncClient(base_url=process.url, timeout=60, trust_env=False, verify=False) as one:
                    text = (await one.post(CHAT, json=body)).text
                whole += text.rstrip().endswith("[DONE]")
            except httpx.HTTPError:
                cut += 1

        streams = [asyncio.create_task(stream()) for _ in range(24)]
        # All streams have begun, and the last still runs; on a busy machine the first may have ended.
        await until(lambda: len(d.requests) >= 10 + len(streams) and d.engine.running > 0)
        # The worker with fewer connections, since the kernel may have given nearly all of them to one.
        victim, survivor = sorted(workers_of(process), key=lambda pid: len([*Path(f"/proc/{pid}/fd").iterdir()]))
        os.kill(victim, signal.SIGKILL)
        await asyncio.gather(*streams)
        assert whole + cut == 24
        assert whole > 0, "the other worker's streams have ended"
        await until(lambda: len(workers_of(process)) == 2 and survivor in workers_of(process))
        await until(lambda: any("ended with signal 9" in line for line in process.log))
        assert await metric(http, "pd_proxy_requests_total") >= counted, "counts have gone back"
        drained: list[bool] = []
        async with asyncio.timeout(60):  # the new worker knows what the operator did before it started
            while len(drained) < 20:
                async with httpx.AsyncClient(
                    base_url=process.url, headers=OPERATOR, timeout=20, trust_env=False, verify=False
                ) as one:
                    answer = await one.get("/admin/backends")
                drained.append(answer.json()["backends"][0]["draining"])
        assert all(drained)
        for engine in (p, d):
            await engine.wait_for(lambda engine=engine: not engine.engine.running)  # type: ignore[misc]


async def test_workers_stop_together_and_let_their_streams_finish() -> None:
    async with (
        simulators("prefill", "decode", step_time=0.01) as [p, d],
        served("--workers", "2", "--prefill", p.url, "--decode", d.url) as process,
        httpx.AsyncClient(base_url=process.url, timeout=20, trust_env=False, verify=False) as http,
    ):
        await ready(http)
        body = chat(max_tokens=300, ignore_eos=True, stream=True)
        asking = asyncio.create_task(ask_apart(process.url, 8, body, CHAT))
        await until(lambda: len(d.requests) >= 8 and d.engine.running > 0)
        process.signal(signal.SIGTERM)
        answers = await asking
        assert all(answer.text.rstrip().endswith("[DONE]") for answer in answers)
        assert await process.status() == 0


async def test_workers_whose_supervisor_is_killed_stop_too() -> None:
    async with simulators("mixed") as [m], served("--workers", "2", "--mixed", m.url) as process:
        workers = workers_of(process)
        process.signal(signal.SIGKILL)
        await until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))


async def test_workers_place_requests_by_the_load_of_all_workers() -> None:
    """Two workers without shared load would also send half of their own requests to each backend, but neither would
    know of the long request that the other has placed."""
    async with (
        simulators("mixed", "mixed", step_time=0.05) as [one, two],
        served("--workers", "2", "--mixed", one.url, "--mixed", two.url, "--policy.mixed", "least_loaded") as process,
        httpx.AsyncClient(base_url=process.url, timeout=20, trust_env=False, verify=False) as http,
    ):
        await ready(http)
        await until_up(http, one.url)
        await until_up(http, two.url)
        # It runs for longer than the other requests take on any machine.
        heavy = completion(prompt="long " * 1000, max_tokens=2000, ignore_eos=True, stream=True)
        async with http.stream("POST", COMPLETIONS, json=heavy) as answer:
            pieces = answer.aiter_bytes()  # kept: an iterator without references is closed, and its request ends
            await anext(pieces)
            busy, idle = (one, two) if one.engine.running else (two, one)
            before = len(busy.requests)
            answers = await ask_apart(process.url, 16, completion(max_tokens=2))
            assert {a.status_code for a in answers} == {200}
            assert busy.engine.running == 1
            assert len(busy.requests) == before, json.dumps([len(e.requests) for e in (one, two)])
            assert len(idle.requests) == 16


async def test_engines_that_call_back_reach_the_worker_whose_request_it_is() -> None:
    # no request may time out by itself
    layerwise: dict[str, Any] = {"connector": "ascend_layerwise", "handshake_timeout": 30.0}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    flags = ("--port", str(port), "--metaserver.url", f"http://127.0.0.1:{port}", "--connector", "ascend_layerwise")
    async with (
        simulators("prefill", "decode", **layerwise) as [p, d],
        served("--workers", "3", *flags, "--prefill", p.url, "--decode", d.url) as process,
        httpx.AsyncClient(base_url=process.url, timeout=20, trust_env=False, verify=False) as http,
    ):
        await ready(http)
        answers = await ask_apart(process.url, 30, completion())
        assert {answer.status_code for answer in answers} == {200}
        assert not any("x-pd-proxy-fallback" in answer.headers for answer in answers)
        assert await metric(http, "pd_proxy_retries_total") == 0
        assert set(d.engine.side.calls) == {200}  # type: ignore[attr-defined]
