"""Load over real requests: the policies as the flow applies them."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.support import chat, pools, until

CHAT = "/v1/chat/completions"


def shares(engines: list[object]) -> list[int]:
    return [len([r for r in e.requests if r.path == CHAT]) for e in engines]  # type: ignore[attr-defined]


async def test_least_loaded_spreads_concurrent_requests_evenly() -> None:
    async with pools(2, 4, engine={"step_time": 0.005}) as (running, prefill, decode):
        requests = [running.http.post(CHAT, json=chat(ignore_eos=True)) for _ in range(40)]
        answers = await asyncio.gather(*requests)
        assert all(a.status_code == 200 for a in answers)
        assert max(shares(decode)) - min(shares(decode)) <= 4
        assert max(shares(prefill)) - min(shares(prefill)) <= 8


async def test_a_backend_with_a_long_answer_gets_less() -> None:
    async with pools(1, 2, engine={"step_time": 0.01}) as (running, _, decode):
        long = asyncio.create_task(running.http.post(CHAT, json=chat(max_tokens=3000, ignore_eos=True)))
        await until(lambda: any(d.engine.running for d in decode))
        busy = 0 if decode[0].engine.running else 1
        for _ in range(6):
            await running.http.post(CHAT, json=chat(max_tokens=2))
        assert shares(decode)[busy] == 1
        long.cancel()


async def test_round_robin_takes_turns() -> None:
    async with pools(2, 2, policy={"prefill": "round_robin", "decode": "round_robin"}) as (running, prefill, decode):
        for _ in range(10):
            await running.http.post(CHAT, json=chat(max_tokens=2))
        assert shares(prefill) == [5, 5] and shares(decode) == [5, 5]


async def test_to_look_for_when_a_request_would_be_served_takes_no_turn() -> None:
    turns: dict[str, Any] = {"policy": {"prefill": "round_robin", "decode": "round_robin"}}
    late = {"targets": {"ttft": 60.0}, "admission": {"slo": "refuse"}}
    async with pools(2, 2, **turns, **late) as (running, prefill, decode):
        for _ in range(6):
            await running.http.post("/admin/explain", json=chat(max_tokens=2))
            await running.http.post(CHAT, json=chat(max_tokens=2))
        assert shares(prefill) == [3, 3] and shares(decode) == [3, 3]


async def test_decode_is_reserved_before_prefill_starts() -> None:
    async with pools(1, 1, engine={"prefill_rate": 20.0}) as (running, [p], _):
        request = asyncio.create_task(running.http.post(CHAT, json=chat()))
        await until(lambda: p.engine.running == 1)
        [decode] = running.gateway.fleet.pool("decode")
        [prefill] = running.gateway.fleet.pool("prefill")
        assert decode.inflight_requests == 1 and decode.inflight_tokens > prefill.inflight_tokens > 0
        request.cancel()
        await until(running.idle)
