"""Chaos for some seconds: engines are killed, stopped, paused and restarted at random under load; no client notices.

The load has the tutorial's shape, scaled to a test machine: streams of some dozens of tokens with prompts of a few
hundred bytes, chat and completions, streamed and whole. At any time one backend of each pool is healthy. SOAK_SECONDS
makes it longer (`make soak`), SOAK_SEED repeats a run; the seed is printed.
"""

from __future__ import annotations

import asyncio
import os
import random
from time import monotonic
from typing import Any

import httpx
import pytest
from pd_proxy_simulator import Simulator

from tests.flow.test_resume import Answer
from tests.support import Running, chat, completion, pools, simulators, text_of, until

pytestmark = pytest.mark.slow

SECONDS = float(os.environ.get("SOAK_SECONDS") or 15)
SEED = int(os.environ.get("SOAK_SEED") or random.SystemRandom().randrange(1 << 32))
CLIENTS = 24
PROMPTS = 12
ENGINE = {"step_time": 0.004, "prefill_rate": 20_000.0}
Question = tuple[str, dict[str, Any]]


def questions(chance: random.Random) -> list[Question]:
    """What is asked: every kind of request, each with its own prompt."""
    found: list[Question] = []
    for number in range(PROMPTS):
        words = " ".join(chance.choice(("alpha", "beta", "gamma", "🦀", "naïve", "delta")) for _ in range(60))
        make, path = ((chat, "/v1/chat/completions"), (completion, "/v1/completions"))[number % 2]
        more = {"stream_options": {"include_usage": True}, "stream": True} if number % 3 else {}
        found.append((path, make(f"{number} {words}", max_tokens=chance.randint(10, 60), **more)))
    return found


def shown_answer(response: httpx.Response) -> tuple[Any, ...]:
    """What a client gets: the text, its finish_reason, and the counts."""
    assert response.status_code == 200, response.text
    if response.headers["content-type"].startswith("text/event-stream"):
        answer = Answer(response.text)
        assert answer.error is None, answer.error
        assert (answer.done, len(answer.ids), len(answer.created)) == (1, 1, 1)
        usage = answer.usage or {}
        return answer.text, answer.finish, usage.get("prompt_tokens"), usage.get("completion_tokens")
    whole = response.json()
    usage = whole["usage"]
    return text_of(whole), [whole["choices"][0]["finish_reason"]], usage["prompt_tokens"], usage["completion_tokens"]


async def undisturbed(asked: list[Question]) -> list[tuple[Any, ...]]:
    """The answers of one engine to which nothing happens."""
    async with (
        simulators("mixed", step_time=0.0) as [engine],
        httpx.AsyncClient(timeout=30, trust_env=False, verify=False) as http,
    ):
        return [shown_answer(await http.post(engine.url + path, json=body)) for path, body in asked]


async def torment(running: Running, engines: list[Simulator], chance: random.Random, until_: float) -> int:
    """Kill, stop, pause and reset the engines of one pool, one at a time; returns how often."""
    fleet = running.gateway.fleet
    role = engines[0].config.role
    times = 0
    while monotonic() < until_:
        await until(lambda: len(fleet.candidates(role, None)) == len(engines), 30)
        for engine in engines:
            engine.faults.clear()  # what the last blow left over: one backend of the pool is healthy at any time
        victim = chance.choice(engines)
        kind = chance.choice(("kill", "terminate", "terminate", "pause", "reset", "die_mid_stream", "status"))
        times += 1
        if kind == "pause":
            victim.paused = True
            await victim.suspend(chance.choice(("abort", "keep")))
            await asyncio.sleep(chance.uniform(0.3, 0.6))
            victim.paused = False
            victim.engine.freeze(False)
        elif kind in ("kill", "terminate"):
            if kind == "kill":
                victim.kill()
            else:
                victim.terminate()
                await until(lambda victim=victim: not victim.alive)  # type: ignore[misc]
            await asyncio.sleep(chance.uniform(0.05, 0.5))
            await victim.restart()
        elif kind == "die_mid_stream":
            victim.faults.add(kind, count=chance.randint(1, 3), after_tokens=chance.randint(1, 20))
        elif kind == "status":
            victim.faults.add(kind, count=1, status=500)
        else:
            victim.faults.add(kind, count=chance.randint(1, 3))
        await asyncio.sleep(chance.uniform(0.1, 0.5))
    return times


async def test_no_request_fails_and_no_answer_is_wrong() -> None:
    print(f"SOAK_SEED={SEED} SOAK_SECONDS={SECONDS:g}")
    chance = random.Random(SEED)
    asked = questions(chance)
    expected = await undisturbed(asked)
    served = 0
    breaker = {"ejection": 0.5, "longest_ejection": 1.0, "slow_start": 0.5}
    # Four blows a second: an answer that is not streamed begins anew with each that hits it, and may meet a few. No
    # request is to blame for that, however often its engine dies.
    settings = {"timeouts": {"idle": 5}, "breaker": breaker, "retries": {"attempts": 20, "after_cut": 20}}
    async with pools(2, 2, engine=ENGINE, **settings) as (running, prefill, decode):
        ends = monotonic() + SECONDS

        async def client(chance: random.Random) -> None:
            nonlocal served
            while monotonic() < ends:
                number = chance.randrange(len(asked))
                path, body = asked[number]
                response = await running.http.post(path, json=body)
                assert shown_answer(response) == expected[number], f"SOAK_SEED={SEED}: {response.text}"
                served += 1

        async with asyncio.TaskGroup() as group:
            for _ in range(CLIENTS):
                group.create_task(client(random.Random(chance.random())))
            pools_ = (prefill, decode)
            torments = [group.create_task(torment(running, p, random.Random(chance.random()), ends)) for p in pools_]
        await until(running.idle)
        for engine in (*prefill, *decode):
            await until(lambda engine=engine: not engine.engine.running)  # type: ignore[misc]
        metrics = await running.metrics()
    resumed = sum(value for name, value in metrics.items() if name.startswith("pd_proxy_resumes_total"))
    retried = sum(value for name, value in metrics.items() if name.startswith("pd_proxy_retries_total"))
    blows = sum(torment.result() for torment in torments)
    print(f"{served} answered, {resumed:g} resumed, {retried:g} tried again, {blows} blows")
    assert served > 5 * SECONDS
    assert blows > SECONDS / 2
    assert resumed
