"""Which pool's budget a retry takes its permit from, and how long the permit is held: one rule for all routes."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support import chat, pools, running_gateway, simulators, until

CHAT = "/v1/chat/completions"
EMBEDDINGS = "/v1/embeddings"
INPUT = {"model": "sim", "input": "the river"}
AUDIO = "/v1/audio/transcriptions"
NONE_LEFT: dict[str, Any] = {"retries": {"share": 0, "floor": 0, "attempts": 2}}


@pytest.mark.parametrize("leg", ["prefill", "decode"])
async def test_two_legs_take_it_from_the_pool_whose_leg_failed(leg: str) -> None:
    async with pools(2, 2, **NONE_LEFT) as (running, prefill, decode):
        for engine in prefill if leg == "prefill" else decode:
            engine.faults.add("status", status=500, leg=leg)
        assert (await running.http.post(CHAT, json=chat())).status_code == 500
        assert running.gateway.fleet.budgets.refusals == {leg: 1}
        await until(running.idle)


@pytest.mark.parametrize(("path", "body"), [(CHAT, chat()), (EMBEDDINGS, INPUT)], ids=["two_leg", "one_leg"])
async def test_a_mixed_backend_that_failed_has_the_permit_of_its_own_pool(path: str, body: dict[str, Any]) -> None:
    async with (
        simulators("mixed", "prefill", "decode", task="any") as [mixed, p, d],
        running_gateway(mixed=[mixed.url], **NONE_LEFT) as alone,
        running_gateway([p.url], [d.url], mixed=[mixed.url], **NONE_LEFT) as beside_others,
    ):
        mixed.faults.add("status", status=500)
        assert (await alone.http.post(path, json=body)).status_code == 500
        assert alone.gateway.fleet.budgets.refusals == {"mixed": 1}
        if path == EMBEDDINGS:  # its next try would go to the prefill pool
            assert (await beside_others.http.post(path, json=body)).status_code == 500
            assert beside_others.gateway.fleet.budgets.refusals == {"mixed": 1}
            assert not p.requests


async def test_a_stream_gives_the_permit_back_when_it_begins() -> None:
    async with (
        simulators("mixed", task="any") as [engine],
        running_gateway(mixed=[engine.url], retries={"share": 0, "floor": 1}) as running,
    ):
        engine.faults.add("status", status=500, count=1)
        stalled = engine.faults.add("stall_mid_stream", after_tokens=2)
        budgets = running.gateway.fleet.budgets
        form = {"data": {"model": "sim", "stream": "true"}, "files": {"file": b"RIFF"}}
        async with running.http.stream("POST", AUDIO, **form) as answer:
            assert answer.status_code == 200
            await until(lambda: stalled.hits)
            assert budgets.in_progress["mixed"] == 0
        await until(running.idle)
