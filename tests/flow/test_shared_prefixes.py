"""Prompts that share prefixes, at engines with prefix caches: the effect of placement by caches."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import deque
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from random import Random
from statistics import mean
from typing import Any

import httpx
import pytest
from pd_proxy_simulator import Simulator

from tests.faults.clock import virtual_time
from tests.processes import Process, served
from tests.support import completion, running_gateway, simulators, until
from tests.workers.test_supervisor import until_up, workers_of

pytestmark = pytest.mark.slow

WORDS = ("the river of stone was white and its light came over the water in the morning " * 100).split()
SHARED, OWN = 1000, 20
"""Words, each a token, that a prompt has in common with others, and of its own."""
PROMPT_BLOCKS = 71
ENGINES = 4


def prompts(prefixes: int, each: int, seed: int) -> list[str]:
    """Prompts in the order in which they are asked: so many begin with each of so many prefixes."""
    random = Random(seed)
    begins = [" ".join(random.choices(WORDS, k=SHARED)) for _ in range(prefixes)]
    found = [f"{begin} {' '.join(random.choices(WORDS, k=OWN))}" for begin in begins for _ in range(each)]
    random.shuffle(found)
    return found


@dataclass
class Served:
    """What became of some prompts.

    Attributes:
        rate: the share of their tokens that engines found in their caches, by the engines' own counters.
        ttft: mean seconds until the first token.
    """

    rate: float
    ttft: float


def rate(engines: Iterable[Simulator]) -> float:
    stats = [engine.engine.stats for engine in engines]
    return sum(s.prefix_hits for s in stats) / sum(s.prefix_queries for s in stats)


async def ask_all(url: str, asked: Iterable[str], at_once: int) -> float:
    """Ask them with some clients, each request on a connection of its own; returns the mean TTFT in seconds."""
    clock = asyncio.get_running_loop().time
    left, seconds = deque(asked), list[float]()
    limits = httpx.Limits(max_keepalive_connections=0)

    async def client(http: httpx.AsyncClient) -> None:
        while left:
            body = completion(left.popleft(), max_tokens=2, ignore_eos=True, stream=True)
            began = clock()
            async with http.stream("POST", "/v1/completions", json=body) as answer:
                lines = [(line, clock()) async for line in answer.aiter_lines() if line]
            assert answer.status_code == 200 and lines[-1][0] == "data: [DONE]"
            seconds.append(lines[0][1] - began)

    async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False, verify=False, limits=limits) as http:
        await asyncio.gather(*(client(http) for _ in range(at_once)))
    return mean(seconds)


@asynccontextmanager
async def engines(**prefill: Any) -> AsyncIterator[tuple[list[Simulator], list[Simulator]]]:
    """Prefill engines that take 0.1 s for a prompt of which they have nothing, and a decode engine."""
    async with (
        simulators(*["prefill"] * ENGINES, prefill_rate=10_000.0, **prefill) as p,
        simulators("decode") as d,
    ):
        yield p, d


async def with_policy(policy: str) -> Served:
    """Twelve prefixes at engines that have room for five each."""
    async with (
        engines(blocks=5 * PROMPT_BLOCKS) as (p, d),
        running_gateway([e.url for e in p], [e.url for e in d], policy={"prefill": policy}) as running,
    ):
        ttft = await ask_all(running.url, prompts(12, 16, 1), 6)
        return Served(rate(p), ttft)


def test_prefixes_are_found_where_they_were_computed() -> None:
    with virtual_time() as runner:
        by_caches, by_load = (runner.run(with_policy(policy)) for policy in ("auto", "least_loaded"))
    assert by_caches.rate >= 0.85
    assert by_load.rate <= 0.6
    assert by_caches.ttft < by_load.ttft


@asynccontextmanager
async def workers(count: int) -> AsyncIterator[tuple[Process, list[Simulator]]]:
    """A gateway of so many workers, and its prefill engines."""
    async with engines() as (p, d):
        flags = [flag for role, pool in (("--prefill", p), ("--decode", d)) for e in pool for flag in (role, e.url)]
        async with served("--workers", str(count), "--warmup", "false", *flags) as process:
            await all_up(process, [*p, *d])
            yield process, p


async def all_up(process: Process, backends: Iterable[Simulator]) -> None:
    async with httpx.AsyncClient(base_url=process.url, timeout=20, trust_env=False, verify=False) as http:
        for backend in backends:
            await until_up(http, backend.url)


async def test_two_workers_find_as_much_as_one() -> None:
    """Two that did not know of each other would have most prefixes computed twice: a tenth less is found then."""
    found = []
    for count in (1, 2):
        async with workers(count) as (process, p):
            await ask_all(process.url, prompts(24, 16, 2), 3)
            found.append(rate(p))
    one, two = found
    assert one > 0.8
    assert two > one - 0.02, f"{two:.3f} instead of {one:.3f}"


async def test_a_new_worker_knows_what_engines_have() -> None:
    asked = prompts(32, 1, 3)
    async with workers(2) as (process, p):
        await ask_all(process.url, asked, 3)
        victim, _ = workers_of(process)
        os.kill(victim, signal.SIGKILL)
        await until(lambda: len(workers_of(process)) == 2 and victim not in workers_of(process))
        await all_up(process, p)
        # The other worker would find them in any case: about half of the requests go to the new one.
        found = -sum(engine.engine.stats.prefix_hits for engine in p)
        await ask_all(process.url, asked, 1)
        found += sum(engine.engine.stats.prefix_hits for engine in p)
        assert found > 0.95 * len(asked) * PROMPT_BLOCKS * 16, f"{found / len(asked):.0f} tokens of a prompt"
