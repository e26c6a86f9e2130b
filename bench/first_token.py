"""Compares the time to the first token with the token from prefill and with the token from decode, on simulated fleets
under load.

There are two prefill and two decode engines (`pd-proxy simulate`'s). Clients arrive at random at a share of decode's
capacity. Its batch is bounded, so that requests queue for it near its capacity; only then does the source of the first
token matter. The shape is that of vllm-ascend's Qwen3-235B tutorial: 3,500 tokens of prompt, but answers a tenth as
long as its 1,500 tokens, so that a run ends soon. All runs in one process and in virtual time: the result depends on
queues and transfers, not on this machine's speed, and is the same in each run.

    .venv/bin/python -m bench.first_token            writes bench/FIRST_TOKEN.md
    .venv/bin/python -m bench.first_token --quick    a small one, printed
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import random
import socket
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from pd_proxy.app import build
from pd_proxy.process import uvicorn_config
from pd_proxy.settings.tree import build_settings
from pd_proxy_simulator import Simulator, SimulatorConfig

from tests.faults.clock import virtual_time
from tests.support import TestServer, until

FILE = Path(__file__).with_name("FIRST_TOKEN.md")
PROMPT, ANSWER = 3584, 154
STEP, SLOTS = 0.04, 32  # seconds of a decode step; sequences in one engine's batch
ENGINES = {"prefill_rate": 35_000.0, "transfer_rate": 70_000.0, "blocks": 32_768, "handshake_timeout": 1.0}
CAPACITY = 2 * SLOTS / (ANSWER * STEP)  # requests a second that two decode engines can serve
LOADS = (0.5, 0.8, 0.95, 1.1)


@dataclass(frozen=True)
class Times:
    """The times of one run, in seconds: to each first token, from it to the second, and of a whole answer."""

    first: list[float]
    gap: list[float]
    whole: list[float]


async def serve(whose: str, load: float, requests: int) -> Times:
    """Simulate one run. Raises RuntimeError where an answer is wrong."""
    loop, rng = asyncio.get_running_loop(), random.Random(f"{load}")
    async with AsyncExitStack() as stack:
        urls: dict[str, list[str]] = {"prefill": [], "decode": []}
        for role in ("prefill", "prefill", "decode", "decode"):
            step = {"step_time": STEP, "max_num_seqs": SLOTS} if role == "decode" else {"step_time": 0.01}
            config = SimulatorConfig(role=role, **ENGINES, **step)  # type: ignore[arg-type]
            urls[role].append((await stack.enter_async_context(Simulator(config))).url)
        flags: dict[str, Any] = {**urls, "port": 0, "warmup": False, "first_token": whose, "log_level": "error"}
        flags["timeouts"] = {"handoff": 15.0}
        gateway = build(build_settings(flags, {}))
        server = TestServer(uvicorn_config(gateway.surface))
        listener = _listen()
        serving = asyncio.create_task(server.serve([listener]))
        await server.listening.wait()
        await until(lambda: all(backend.up for backend in gateway.fleet))
        port = listener.getsockname()[1]
        tasks = []
        for number in range(requests):
            await asyncio.sleep(rng.expovariate(load * CAPACITY))
            tasks.append(loop.create_task(_ask(port, number, rng.randrange(-200, 200))))
        found = [await task for task in tasks]
        server.should_exit = True
        await serving
    return Times(*(list(column) for column in zip(*found, strict=True)))


def _listen() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0), backlog=1024)


async def _ask(port: int, number: int, more: int) -> tuple[float, float, float]:
    rng, loop = random.Random(number), asyncio.get_running_loop()
    ids = ",".join(str(40 + rng.randrange(400)) for _ in range(PROMPT + more))
    body = f'{{"model":"sim","prompt":[{ids}],"max_tokens":{ANSWER},"temperature":0,"ignore_eos":true,"stream":true}}'
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
    began = loop.time()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    writer.write(head.encode() + body.encode())
    times: list[float] = []
    done = False
    while line := await reader.readline():
        if line.startswith(b'data: {"id"') and b'"text":""' not in line:
            times.append(loop.time() - began)
        done = done or line.startswith(b"data: [DONE]")
    writer.close()
    if not done or len(times) < 2:
        raise RuntimeError(f"request {number} was not answered: {len(times)} tokens")
    return times[0], times[1] - times[0], loop.time() - began


def quantile(values: Sequence[float], share: float) -> float:
    """The value that is not below `share` of the others."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def measure(requests: int, loads: Sequence[float]) -> list[str]:
    """The table's rows, one for each load and each source of the first token."""
    rows = []
    for load in loads:
        for whose in ("decode", "auto"):
            with virtual_time() as runner:
                times = runner.run(serve(whose, load, requests))
            cells = [fmean(times.first), quantile(times.first, 0.99), fmean(times.gap), quantile(times.gap, 0.99)]
            cells.append(fmean(times.whole))
            shown = " | ".join(f"{cell:.2f}" for cell in cells)
            rows.append(f"| {load:.0%} | {'prefill' if whose == 'auto' else 'decode'} | {shown} |")
            print(rows[-1], flush=True)
    return rows


def render(rows: Sequence[str], requests: int) -> str:
    """The page."""
    head = f"""\
<!-- Written by `python -m bench.first_token`. Do not edit; run it again. -->

# The first token from prefill, at load

{requests} requests a row, at random at a share of the {CAPACITY:.1f} a second that decode can serve: {PROMPT} tokens in
(give or take 200), {ANSWER} out. Two prefill engines of 35,000 tokens a second, two decode engines with {SLOTS}
sequences in a batch and a step of {STEP * 1000:.0f} ms; KV moves at 70,000 tokens a second. Simulated engines in
virtual time: queues and transfers are simulated, the gateway's own time is zero. Seconds.

| load | first token from | mean TTFT | p99 TTFT | mean gap to the second | p99 gap | mean of the whole answer |
| --- | --- | --- | --- | --- | --- | --- |
"""
    tail = """
With the first token from prefill, TTFT does not include the wait for decode. That wait is the gap to the second token,
and the whole answer takes as long as before; `pd_proxy_handoff_gap_seconds` measures it, so that a good TTFT does not
hide a slow hand-off. One prompt in sixteen fills its last block and nevertheless has its first token from decode: the
p99 is that of these prompts.
"""
    return head + "".join(f"{row}\n" for row in rows) + tail


def main() -> None:
    parser = argparse.ArgumentParser(description="TTFT with the first token from prefill and from decode.")
    parser.add_argument("--quick", action="store_true", help="fewer requests and loads; nothing is written")
    quick = parser.parse_args().quick
    logging.disable(logging.WARNING)
    requests = 40 if quick else 400
    rows = measure(requests, LOADS[1:2] if quick else LOADS)
    if not quick:
        FILE.write_text(render(rows, requests), encoding="utf-8")


if __name__ == "__main__":
    main()
