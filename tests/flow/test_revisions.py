"""Engines of two revisions side by side, as while they are being upgraded one by one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from pd_proxy_simulator import Simulator

from tests.support import Running, completion, running_gateway, simulators, text_of, until

UPGRADES = [
    pytest.param({"version": "0.33.0"}, id="version"),
    pytest.param({"root": "/models/sim-2", "weights": 1}, id="root"),
]


@asynccontextmanager
async def upgraded(
    new: dict[str, Any], **settings: Any
) -> AsyncIterator[tuple[Running, list[Simulator], list[Simulator]]]:
    """A gateway before an old and a new pair in one group, all up."""
    async with simulators("prefill", "decode") as old, simulators("prefill", "decode", **new) as fresh:
        prefill, decode = [old[0].url, fresh[0].url], [old[1].url, fresh[1].url]
        policy = {"prefill": "random", "decode": "random"}
        async with running_gateway(prefill, decode, policy=policy, **settings) as running:
            yield running, old, fresh


async def ask(running: Running, count: int) -> list[Any]:
    bodies = [completion(f"{number} comes before what follows. " * 8, ignore_eos=True) for number in range(count)]
    return await asyncio.gather(*(running.http.post("/v1/completions", json=body) for body in bodies))


@pytest.mark.parametrize("new", UPGRADES)
async def test_pairs_are_made_within_a_revision(new: dict[str, Any]) -> None:
    async with upgraded(new) as (running, old, fresh):
        answers = await ask(running, 24)
        assert [answer.status_code for answer in answers] == [200] * 24
        assert not any("x-pd-proxy-fallback" in answer.headers for answer in answers)
        for prefill, decode in (old, fresh):
            assert 0 < len(prefill.requests) == len(decode.requests)
            assert decode.engine.stats.failed_transfers == 0
            assert decode.engine.stats.pulls == len(decode.requests)
        await until(running.idle)


@pytest.mark.parametrize("new", UPGRADES)
async def test_half_of_an_upgraded_pair_serves_by_itself_and_the_answer_says_why(new: dict[str, Any]) -> None:
    async with upgraded(new) as (running, old, fresh):
        expected = text_of((await running.http.post("/v1/completions", json=completion())).json())
        old[0].kill()
        fresh[1].kill()
        await until(lambda: sum(b.up for b in running.gateway.fleet) == 2)
        answer = await running.http.post("/v1/completions", json=completion())
        if "version" in new:
            assert text_of(answer.json()) == expected
        assert answer.headers["x-pd-proxy-fallback"] == "no_matching_pair"
        ready = await running.http.get("/ready")
        assert ready.status_code == 503
        assert "pair_revisions" in ready.json()["error"]["message"]
        metrics = await running.metrics()
        assert any("no_matching_pair" in name and value == 1 for name, value in metrics.items())


async def test_the_setting_lets_revisions_be_mixed() -> None:
    new = {"root": "/elsewhere/sim", "connector": "mooncake_ascend"}
    async with (
        simulators("prefill", "decode", connector="mooncake_ascend") as [p, _],
        simulators("decode", **new) as [d],
        running_gateway([p.url], [d.url], connector="mooncake_ascend", pair_revisions="any") as running,
    ):
        answer = await running.http.post("/v1/completions", json=completion())
        assert answer.status_code == 200
        assert [request.leg for request in p.requests][:1] == ["prefill"], "the pair was made"


async def test_an_engine_that_was_upgraded_in_its_place_is_recognised() -> None:
    async with simulators("prefill", "decode") as [p, d], running_gateway([p.url], [d.url]) as running:
        port, side_port = d.port, d.side_port
        d.kill()
        await until(lambda: not running.gateway.fleet.pool("decode")[0].up)
        async with simulators("decode", port=port, side_port=side_port, version="0.33.0"):
            await until(lambda: running.gateway.fleet.pool("decode")[0].up)
            assert not running.gateway.fleet.pairing.uniform
            answer = await running.http.post("/v1/completions", json=completion())
            assert answer.headers["x-pd-proxy-fallback"] == "no_matching_pair"
            assert not p.requests
