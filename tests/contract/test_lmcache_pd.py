"""LMCache's prefill-decode mode over sockets: decode waits for the notification, and for nothing else."""

from __future__ import annotations

import asyncio
import json

import msgspec
import pytest
import zmq
from pd_proxy.fleet.backend import Lease

from tests.contract.cases import CASES, fleet
from tests.support import completion, text_of, until

CASE = next(case for case in CASES if case.name == "lmcache_pd")


async def test_decode_begins_only_when_the_cache_has_arrived() -> None:
    # So slowly that the cache is written about a second after prefill's answer.
    async with fleet(CASE, engine={"transfer_rate": 50.0}) as (running, [p], [d]):
        asked = asyncio.create_task(running.http.post("/v1/completions", json=completion(stream=True)))
        await p.wait_for(lambda: p.engine.stranded_blocks > 0)
        assert not d.requests
        answer = await asked
        assert answer.status_code == 200
        assert d.engine.stats.pulls == 1
        assert p.engine.pulled == 1
        notices = running.gateway.messages.notices
        assert notices.counts == {"taken": 1}
        assert notices.waiting == {}


async def test_decode_waits_for_the_notification_of_every_rank() -> None:
    async with fleet(CASE, engine={"tp": 4}) as (running, [p], [d]):
        assert (await running.http.post("/v1/completions", json=completion())).status_code == 200
        assert running.gateway.messages.notices.counts == {"taken": 4}
        assert d.engine.stats.pulls == 1
        assert len(p.requests[0].body["kv_transfer_params"]["disagg_spec"]["receiver_init_port"]) == 4


async def test_a_missing_notification_leads_to_a_try_with_another_pair() -> None:
    async with fleet(CASE, 2, 2, timeouts={"notice": 0.3}) as (running, _, [first, second]):
        expected = text_of((await running.http.post("/v1/completions", json=completion())).json())
        for engine in (first, second):
            engine.engine.pool.forget()
            engine.requests.clear()
        first.faults.add("hang", leg="pull")  # it accepts no cache any more; its API answers
        spare = next(backend for backend in running.gateway.fleet if backend.url == second.url)
        with Lease(spare, 1_000_000):  # so that it is the second choice
            answer = await running.http.post("/v1/completions", json=completion())
        assert text_of(answer.json()) == expected
        assert "x-pd-proxy-fallback" not in answer.headers
        assert (len(first.requests), second.engine.stats.pulls > 0) == (0, True)
        assert (await running.metrics())['pd_proxy_retries_total{leg="prefill",reason="handoff_unconfirmed"}'] >= 1
        await until(running.idle)


async def test_a_prefill_that_dies_while_it_writes_is_not_waited_for_and_its_decode_engine_is_not_used() -> None:
    quick = {"timeouts": {"notice": 60.0}, "health": {"interval": 0.1, "failures": 1}}
    async with fleet(CASE, 2, 2, engine={"transfer_rate": 20.0}, **quick) as (running, prefill, decode):
        asked = asyncio.create_task(running.http.post("/v1/completions", json=completion()))
        await until(lambda: any(engine.engine.side._received for engine in decode))  # type: ignore[attr-defined]
        dying = next(engine for engine in prefill if engine.requests)
        written = next(engine for engine in decode if engine.engine.side._received)  # type: ignore[attr-defined]
        dying.kill()
        answer = await asked
        assert answer.status_code == 200
        assert "x-pd-proxy-fallback" not in answer.headers
        assert not written.requests
        await until(running.idle)


@pytest.mark.parametrize("fallback", ["local_prefill", "reject"])
async def test_without_any_notification_decode_prefills_or_the_request_fails(fallback: str) -> None:
    async with fleet(CASE, timeouts={"notice": 0.1}, fallback=fallback) as (running, [p], _):
        p.engine.side._proxy = None  # type: ignore[attr-defined]  # its connection to the gateway is blocked
        answer = await running.http.post("/v1/completions", json=completion())
        if fallback == "local_prefill":
            assert answer.status_code == 200
            assert answer.headers["x-pd-proxy-fallback"] == "prefill_failed"
        else:
            assert answer.status_code == 504
            assert answer.json()["error"]["code"] == "handoff_unconfirmed"
        await until(running.idle)
        assert running.gateway.messages.notices.waiting == {}


async def test_notifications_from_other_senders_do_not_start_decode() -> None:
    async with fleet(CASE, engine={"transfer_rate": 100.0}) as (running, [p], [d]):
        context = zmq.Context()
        stranger = context.socket(zmq.PUSH)
        stranger.setsockopt(zmq.LINGER, 0)
        stranger.connect(f"tcp://{p.config.proxy}")
        try:
            for name in ("r1", "0" * 32, "*", ""):
                stranger.send(msgspec.msgpack.encode({"type": "ProxyNotif", "req_id": name}))
            stranger.send(b"\xc1")
            answer = await running.http.post("/v1/completions", json=completion())
            assert answer.status_code == 200
            counts = running.gateway.messages.notices.counts
            assert counts == {"unexpected": 3, "garbage": 2, "taken": 1}
            assert d.engine.stats.pulls == 1
        finally:
            context.destroy(linger=0)


async def test_a_client_cannot_name_a_receiver() -> None:
    evil = {"disagg_spec": {"req_id": "x", "receiver_host": "10.6.6.6", "receiver_init_port": [1]}, "lmcache.tag": "y"}
    async with fleet(CASE) as (running, [p], [d]):
        body = completion(kv_transfer_params=evil, vllm_xargs={"kv_transfer_params": json.dumps(evil)})
        await running.http.post("/v1/completions", json=body)
        for engine in (p, d):
            assert "10.6.6.6" not in json.dumps([request.body for request in engine.requests])
