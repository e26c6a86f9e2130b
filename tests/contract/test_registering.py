"""Connectors whose engines register, over sockets: an engine that has not registered gets no request, and messages
from other senders are ignored."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import msgspec
import pytest
import zmq
from pd_proxy.app import build
from pd_proxy.fleet.readiness import not_ready
from pd_proxy.fleet.zmq.listener import CannotListen
from pd_proxy.settings.tree import build_settings

from tests.contract.cases import CASES, Case, fleet
from tests.fleet.zmq_peers import sender
from tests.support import completion, running_gateway, simulators, text_of, until

pytestmark = pytest.mark.cross_product

REGISTERING = [case for case in CASES if case.hears == "registrations"]
EVERY = pytest.mark.parametrize("case", REGISTERING, ids=lambda case: case.name)
QUICK: dict[str, Any] = {"register_every": 0.05}


def named(name: str) -> Case:
    return next(case for case in REGISTERING if case.name == name)


async def ask(running: Any, **more: Any) -> Any:
    return await running.http.post("/v1/completions", json=completion(**more))


@EVERY
async def test_an_engine_is_in_the_rotation_when_it_has_registered(case: Case) -> None:
    with case.engines() as told:
        silent = {**told, "proxy": ""}
        async with (
            simulators("prefill", **told) as [p],
            simulators("decode", **silent) as [d],
            running_gateway([p.url], [d.url], ready=False, **case.gateway([p, d])) as running,
        ):
            backends = {backend.url: backend for backend in running.gateway.fleet}
            await until(lambda: backends[p.url].up)
            await until(lambda: "registered" in backends[d.url].reason)
            assert not backends[d.url].up
            assert (await ask(running)).status_code == 503
            assert not p.requests and not d.requests


@EVERY
async def test_an_engine_that_stops_registering_is_out_of_the_rotation_until_it_registers_again(case: Case) -> None:
    async with fleet(case, 2, 1, engine=QUICK) as (running, [first, second], _):
        registrations = running.gateway.messages.registrations
        backends = {backend.url: backend for backend in running.gateway.fleet}
        # The first engine stops registering, while its API answers.
        for task in [task for task in first.engine._tasks if "_register" in repr(task.get_coro())]:
            task.cancel()
        await until(lambda: sum("_register" in repr(t.get_coro()) for t in first.engine._tasks) == 0)
        registrations._until[backends[first.url]] = 0.0
        registrations._sweep()
        assert not backends[first.url].up
        assert backends[second.url].up
        for _ in range(4):
            assert (await ask(running)).status_code == 200
        assert not first.requests
        first.engine.side.start()
        await until(lambda: backends[first.url].up)


@EVERY
async def test_an_empty_fleet_grows_by_registrations(case: Case) -> None:
    with case.engines() as told:
        async with simulators("prefill", "decode", **{**told, **QUICK}) as [p, d]:
            more = case.gateway([p, d])
            more["zmq"] = {**more["zmq"], "networks": ["127.0.0.0/8"], "expiry": 0.4}
            async with running_gateway(ready=False, **more) as running:
                await until(lambda: not not_ready(running.gateway.fleet))
                answer = await ask(running)
                assert answer.status_code == 200
                assert d.engine.stats.pulls == 1
                assert "x-pd-proxy-fallback" not in answer.headers
                await until(running.idle)
                p.kill()
                await until(lambda: [backend.url for backend in running.gateway.fleet] == [d.url])


@EVERY
async def test_unknown_senders_neither_join_nor_replace_an_engine(case: Case) -> None:
    async with fleet(case, engine=QUICK) as (running, [p], [d]):
        before = {backend.url: backend.coordinates for backend in running.gateway.fleet}
        own = p.engine.side.registration()  # type: ignore[attr-defined]
        evil = {
            "a stranger": {**own, "http_address": "10.6.6.6:8000"},
            "KV to a stranger": {**own, "zmq_address": own["zmq_address"].replace("127.0.0.1", "10.6.6.6")},
            "another role": {**own, "type": "D"},
        }
        with sender(p.config.proxy, zmq.DEALER) as out:
            for said in evil.values():
                out.send(msgspec.msgpack.encode(said))
            counts = running.gateway.messages.registrations.counts
            await until(lambda: counts["unknown"] == 1 and counts["refused"] == 2)
        assert {backend.url: backend.coordinates for backend in running.gateway.fleet} == before
        assert (await ask(running)).status_code == 200
        metrics = await running.metrics()
        assert metrics['pd_proxy_engine_messages_total{message="registration",result="refused"}'] == 2
        assert "10.6.6.6" not in json.dumps([request.body for request in (*p.requests, *d.requests)])


@pytest.mark.parametrize(("ours", "theirs"), [("moriio_read", "moriio_write"), ("moriio_write", "moriio_read")])
async def test_an_engine_of_the_other_mode_is_not_registered(ours: str, theirs: str) -> None:
    case = named(ours)
    with case.engines() as told:
        wrong = {**told, **QUICK, "connector": theirs}
        async with (
            simulators("prefill", **{**told, **QUICK}) as [p],
            simulators("decode", **wrong) as [d],
            running_gateway([p.url], [d.url], ready=False, **case.gateway([p, d])) as running,
        ):
            counts = running.gateway.messages.registrations.counts
            await until(lambda: counts["taken"] > 2 and counts["refused"] > 2)
            assert not_ready(running.gateway.fleet)
            assert not d.requests


async def test_both_legs_of_p2p_nccl_have_the_same_id_and_each_try_its_own() -> None:
    async with fleet(named("p2p_nccl")) as (running, [p], [d]):
        for _ in range(2):
            assert (await ask(running)).status_code == 200
        ids = [[request.headers["x-request-id"] for request in engine.requests] for engine in (p, d)]
        assert ids[0] == ids[1]
        assert len(set(ids[0])) == 2
        pattern = rf"___prefill_addr_127.0.0.1:{p.side_port}___decode_addr_127.0.0.1:{d.side_port}_[0-9a-f]{{32}}"
        assert all(re.fullmatch(pattern, name) for name in ids[0])


@pytest.mark.parametrize("name", ["p2p_nccl", "moriio_read"])
@pytest.mark.parametrize("body", [{"n": 2, "temperature": 1}, {"prompt": ["a", "b"]}, {"echo": True}])
async def test_an_unsplittable_request_is_refused_where_decode_needs_a_hand_off(name: str, body: Any) -> None:
    async with fleet(named(name)) as (running, [p], [d]):
        answer = await ask(running, **body)
        assert answer.status_code == 400
        assert not p.requests and not d.requests


@pytest.mark.parametrize("name", ["p2p_nccl", "moriio_read"])
async def test_repeated_prefill_failures_never_lead_to_a_request_without_a_hand_off(name: str) -> None:
    async with fleet(named(name)) as (running, [p], [d]):
        p.faults.add("status", leg="prefill", status=500)
        answer = await ask(running)
        assert answer.status_code == 500
        assert not d.requests


async def test_in_read_mode_prefill_without_parameters_leads_to_no_request_without_a_hand_off() -> None:
    async with fleet(named("moriio_read")) as (running, [p], [d]):
        p.faults.add("drop_handoff_params", leg="prefill")
        answer = await ask(running)
        assert answer.status_code == 502
        assert answer.json()["error"]["code"] == "handoff_invalid"
        assert not d.requests


async def test_in_write_mode_a_request_without_a_hand_off_is_answered_right() -> None:
    async with fleet(named("moriio_write")) as (running, [p], [d]):
        expected = text_of((await ask(running)).json())
        d.engine.pool.forget()
        p.faults.add("status", leg="prefill", status=500)
        answer = await ask(running)
        assert text_of(answer.json()) == expected
        assert answer.headers["x-pd-proxy-fallback"] == "prefill_failed"


async def test_in_read_mode_an_unneeded_hand_off_is_freed_at_once() -> None:
    async with fleet(named("moriio_read"), engine={"lease": 30.0}) as (running, [p], [d]):
        d.faults.add("delay_first_byte", leg="decode", delay_s=1.0)
        asked = asyncio.create_task(ask(running, stream=True))
        await p.wait_for(lambda: p.engine.stranded_blocks > 0)
        asked.cancel()
        await p.wait_for(lambda: p.engine.stranded_blocks == 0)
        assert p.engine.expired == 0


async def test_an_address_that_is_taken_ends_the_start() -> None:
    case = named("p2p_nccl")
    async with fleet(case) as (running, [p], [d]):
        again = build(build_settings({"prefill": [p.url], "decode": [d.url], **case.gateway([p, d])}, {}))
        with pytest.raises(CannotListen, match=r"cannot listen for engines on 127\.0\.0\.1"):
            again.listen()
        assert not_ready(running.gateway.fleet) == ""
