"""New pairs are warmed up behind the users' backs."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from proxy.fleet.backend import Backend
from proxy.flow import warmup
from proxy.flow.warmup import model_of
from proxy.simulator import Simulator
from tests.support import Running, chat, pools, running_gateway, simulators, text_of, until

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


def warmed(*engines: Simulator) -> int:
    """How many warm-up legs engines were given: the tests' own requests are chats."""
    return sum(request.path == COMPLETIONS for engine in engines for request in engine.requests)


def at_rest(running: Running, *engines: Simulator) -> bool:
    """Whether everything is over, on both sides of the gateway."""
    return running.idle() and not any(e.engine.running or e.engine.waiting or e.engine.stranded_blocks for e in engines)


async def test_each_pair_is_warmed_up_once_and_no_metric_of_clients_shows_it() -> None:
    async with pools(2, 3, warmup=True) as (running, prefill, decode):
        await until(lambda: warmed(*prefill) == 6 and warmed(*decode) == 6)
        await until(lambda: at_rest(running, *prefill, *decode))
        assert [warmed(engine) for engine in decode] == [2, 2, 2]
        metrics = await running.metrics()
        for name in ("requests_total", "tokens_total", "time_to_first_token_seconds_count", "prefill_duration_seconds"):
            assert not [key for key in metrics if key.startswith(f"pd_proxy_{name}")], name
        answer = await running.http.post(CHAT, json=chat())
        assert answer.status_code == 200
        assert warmed(*prefill, *decode) == 12


async def test_each_decode_engine_has_met_each_prefill_engine() -> None:
    async with pools(2, 2, warmup=True) as (running, prefill, decode):
        await until(lambda: warmed(*decode) == 4 and at_rest(running, *prefill, *decode))
        for engine in decode:
            sent = [request for request in engine.requests if request.path == COMPLETIONS]
            ports = {request.body["kv_transfer_params"]["remote_port"] for request in sent}
            assert len(ports) == 2
            assert all(request.body["max_tokens"] == 1 for request in sent)
        assert all(engine.engine.stats.local_cache_hit == 0 for engine in decode)


async def test_a_backend_that_joins_or_comes_back_is_warmed_up_with_the_others() -> None:
    async with pools(1, 1, warmup=True) as (running, [p], [d]), simulators("decode") as [late]:
        await until(lambda: warmed(d) == 1 and at_rest(running, p, d))
        await running.http.post("/instances/add", json={"type": "decode", "instances": [late.url]})
        await until(lambda: warmed(late) == 1)
        assert warmed(d) == 1
        await until(lambda: at_rest(running, p, d, late))
        before = warmed(p)
        late.kill()
        [backend] = [b for b in running.gateway.fleet if b.url == late.url]
        await until(lambda: not backend.up)
        await late.restart()
        await until(lambda: warmed(p) == before + 1)


async def test_nobody_waits_for_a_warm_up() -> None:
    async with (
        simulators("prefill", "decode", "decode") as [p, first, second],
        running_gateway([p.url], [first.url, second.url], ready=False, warmup=True) as running,
    ):
        p.faults.add("hang", leg="prefill", count=2)
        await until(lambda: warmed(p) == 2)
        assert (await running.http.get("/ready")).status_code == 200
        for _ in range(4):
            answer = await running.http.post(CHAT, json=chat())
            assert answer.status_code == 200
        assert warmed(first, second) == 0


async def test_what_waits_for_its_turn_is_left_out_once_a_real_request_was_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(warmup, "_AT_ONCE", 1)
    monkeypatch.setattr(warmup, "_PATIENCE", 0.5)
    async with simulators("prefill", "decode", "decode") as [p, *decode]:
        p.faults.add("hang", leg="prefill", count=1)
        urls = [engine.url for engine in decode]
        settings: dict[str, Any] = {"warmup": True, "policy": {"decode": "round_robin"}}
        async with running_gateway([p.url], urls, **settings) as running:
            await until(lambda: warmed(p) == 1)
            for _ in range(4):
                assert (await running.http.post(CHAT, json=chat())).status_code == 200
            await until(lambda: at_rest(running, p, *decode))
            assert warmed(p) == 1, "both pairs had served a user before the second one's turn came"


async def test_a_warm_up_that_fails_is_held_against_nobody() -> None:
    breaker = {"consecutive_failures": 1}
    async with simulators("prefill", "decode", "decode") as [p, *decode]:
        for engine in decode:
            engine.faults.add("status", status=500, leg="decode", count=1)
        urls = [engine.url for engine in decode]
        async with running_gateway([p.url], urls, warmup=True, breaker=breaker) as running:
            await until(lambda: warmed(*decode) == 2)
            await until(running.idle)
            fleet = running.gateway.fleet
            assert [fleet.state(backend) for backend in fleet] == ["up", "up", "up"]
            assert not fleet.ejections
            assert text_of((await running.http.post(CHAT, json=chat())).json())


async def test_many_newcomers_are_bounded_in_number_and_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warmup, "_PEERS", 2)
    monkeypatch.setattr(warmup, "_AT_ONCE", 3)
    most = 0
    async with simulators(*["prefill"] * 5, *["decode"] * 5, prefill_rate=10_000.0) as engines:
        prefill, decode = engines[:5], engines[5:]
        async with running_gateway([e.url for e in prefill], [e.url for e in decode], warmup=True) as running:
            fleet = running.gateway.fleet

            def over() -> bool:
                nonlocal most
                most = max(most, sum(backend.inflight_requests for backend in fleet.pool("decode")))
                return warmed(*decode) >= 10 and at_rest(running, *engines)

            await until(over)
            assert 1 <= most <= 3
            assert 10 <= warmed(*decode) <= 20, "each brings two pairs at most, and many are brought by both"


async def test_stopping_ends_what_is_running() -> None:
    async with simulators("prefill", "decode") as [p, d]:
        p.faults.add("hang", leg="prefill")
        async with running_gateway([p.url], [d.url], warmup=True) as running:
            await until(lambda: warmed(p) == 1)
        assert running.idle()
        assert not [task for task in asyncio.all_tasks() if task.get_name() == "warm-up"]


@pytest.mark.parametrize(
    ("prefill", "decode", "model"),
    [
        (None, None, ""),
        ({"m": {}}, None, "m"),
        (None, {"m": {}}, "m"),
        ({"a": {}, "b": {}}, {"lora": {}, "b": {}}, "b"),
        ({"a": {}}, {"b": {}}, None),
        ({}, {"b": {}}, None),
    ],
)
def test_a_warm_up_asks_for_a_model_that_both_serve(
    prefill: dict[str, Any] | None, decode: dict[str, Any] | None, model: str | None
) -> None:
    p, d = Backend("http://p", "prefill"), Backend("http://d", "decode")
    p.models, d.models = prefill, decode
    assert model_of(p, d) == model
