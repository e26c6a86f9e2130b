"""The properties of NixlPushConnector: the first try with an engine is sequential, later ones are concurrent."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from pd_proxy.fleet.backend import Backend
from pd_proxy_simulator import ReceivedRequest, Simulator

from tests.contract.answers import PATHS, text_of_one
from tests.contract.cases import CASES, fleet
from tests.support import Running, completion, running_gateway, simulators, text_of, until

PUSH = next(case for case in CASES if case.name == "nixl_push")
PATH = PATHS["completions"]


def backend(running: Running, engine: Simulator) -> Backend:
    return next(b for b in running.gateway.fleet if b.url == engine.url)


def params(request: ReceivedRequest) -> dict[str, Any]:
    found: dict[str, Any] = request.body["kv_transfer_params"]
    return found


async def asked(running: Running, number: int) -> None:
    prompt = {"prompt": f"{number}: another prompt, so that no cache helps, long enough for some blocks of sixteen"}
    answer = await running.http.post(PATH, json=completion(**prompt))
    assert answer.status_code == 200, answer.text
    assert text_of(answer.json()) == await text_of_one("completions", **prompt)
    assert "x-pd-proxy-fallback" not in answer.headers


async def test_an_engine_has_one_sequential_try_and_then_concurrent_ones() -> None:
    async with fleet(PUSH) as (running, [p], [d]):
        for number in range(3):
            await asked(running, number)
        assert backend(running, p).coordinates.engine_ids == (p.engine.id,)
        told = [params(request) for request in d.requests]
        assert ["remote_block_ids" in one for one in told] == [True, False, False]
        assert {one["remote_port"] for one in told} == {p.side_port}
        for ours, theirs in zip(p.requests, d.requests, strict=True):
            assert ours.headers["x-request-id"] == theirs.headers["x-request-id"]
        transfers = [params(request)["transfer_id"] for request in p.requests]
        assert [one["transfer_id"] for one in told[1:]] == transfers[1:]
        assert len(set(transfers)) == 3
        assert d.engine.pulls == 3


async def test_settings_for_the_engine_make_the_first_try_concurrent() -> None:
    async with simulators("prefill", "decode", connector="nixl_push") as [p, d]:
        place = {"backend": p.url, "port": p.side_port, "engine_ids": [p.engine.id]}
        async with running_gateway([p.url], [d.url], connector="nixl_push", locations=[place]) as running:
            await asked(running, 0)
            assert "remote_block_ids" not in params(d.requests[0])
            assert d.engine.pulls == 1


async def test_decode_is_sent_its_leg_while_prefill_computes() -> None:
    async with fleet(PUSH, engine={"prefill_rate": 400.0}) as (running, [p], [d]):
        await asked(running, 0)
        d.requests.clear()
        asking = asyncio.create_task(asked(running, 1))
        await d.wait_for(lambda: d.engine.loading == 1)
        assert p.engine.running == 1
        await asking


async def test_a_warm_up_counts_as_the_first_try() -> None:
    async with fleet(PUSH, warmup=True) as (running, [p], [d]):
        await until(lambda: backend(running, p).coordinates.engine_ids == (p.engine.id,))
        await until(running.idle)
        d.requests.clear()
        await asked(running, 0)
        assert "remote_block_ids" not in params(d.requests[0])


async def test_an_engine_that_comes_back_has_a_sequential_try_again() -> None:
    async with fleet(PUSH) as (running, [p], [d]):
        await asked(running, 0)
        before = p.engine.id
        p.kill()
        await until(lambda: not backend(running, p).up)
        assert backend(running, p).coordinates.engine_ids == ()
        await p.restart()
        await until(lambda: backend(running, p).up)
        d.requests.clear()
        await asked(running, 1)
        assert params(d.requests[0])["remote_engine_id"] == p.engine.id != before
        assert d.engine.pulls == 2


async def test_an_engine_that_came_back_unnoticed_fails_no_request() -> None:
    async with fleet(PUSH, health={"interval": 60}) as (running, [p], _):
        await asked(running, 0)
        p.kill()
        await p.restart()
        backend(running, p).attention.clear()
        await asked(running, 1)
        assert backend(running, p).coordinates.engine_ids == (p.engine.id,)
        await until(running.idle)


async def test_each_rank_has_one_sequential_try() -> None:
    async with fleet(PUSH) as (running, [p], [d]):
        engine = backend(running, p)
        engine.locate(msgspec.structs.replace(engine.coordinates, dp=2))
        await asked(running, 0)
        engine.ranks[0] += 1000  # so that the next request goes to the other rank
        await running.http.post(PATH, json=completion("rank one"))
        ranks = [request.headers["x-data-parallel-rank"] for request in p.requests]
        assert ranks[:2] == ["0", "1"]
        assert "remote_block_ids" in params(d.requests[1])
