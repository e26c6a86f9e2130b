"""Clients that connect and disconnect at any moment leave nothing behind."""

from __future__ import annotations

import asyncio
import random

import httpx
import pytest

from .helpers import PREFILL, Client, Start, greedy


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.slow
async def test_whatever_clients_do_every_block_is_freed(start: Start, client: Client, seed: int) -> None:
    chance = random.Random(seed)
    prefill = await start(blocks=96, max_num_seqs=6, step_time=0.001, prefill_rate=50_000)
    decode = await start(blocks=64, max_num_seqs=4, step_time=0.001, transfer_rate=20_000, max_queued=24)

    async def one(number: int) -> str:
        prompt = f"{number % 5} " + "river stone light " * chance.randrange(1, 12)
        body = greedy(prompt=prompt, max_tokens=chance.randrange(1, 60))
        leg = await client.post(prefill, "/v1/completions", body | {"max_tokens": 1, "kv_transfer_params": PREFILL})
        params = leg.json()["kv_transfer_params"]
        if chance.random() < 0.1:
            return "forgotten"
        body["kv_transfer_params"] = params
        if chance.random() < 0.1:
            body["max_tokens"] = 10**6
        if chance.random() < 0.5:
            count = 0
            async for _ in client.events(decode, "/v1/completions", body):
                count += 1
            return "streamed"
        answer = await client.post(decode, "/v1/completions", body)
        return str(answer.status_code)

    async def impatient(number: int) -> str:
        try:
            async with asyncio.timeout(chance.choice((0.005, 0.02, 0.05, 10))):
                return await one(number)
        except TimeoutError:
            return "left"
        except (httpx.HTTPError, AssertionError):
            return "refused"

    results = await asyncio.gather(*(impatient(number) for number in range(80)))
    assert {"left", "200"} <= set(results) or len(set(results)) > 2
    for sim in (prefill, decode):
        await sim.wait_for(lambda sim=sim: sim.engine.running == sim.engine.waiting == 0)
    prefill.expire_handoffs()
    await decode.wait_for(lambda: decode.engine.used_blocks == 0)
    assert prefill.engine.used_blocks == prefill.engine.stranded_blocks == 0
    assert prefill.engine.dead is decode.engine.dead is None
    handoffs = prefill.engine.handoffs
    assert handoffs.pinned_total == handoffs.pulled + handoffs.released_unread + handoffs.expired
    assert len(await client.text(decode)) > 0
