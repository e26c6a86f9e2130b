"""The properties of connectors whose decode engines call the gateway back, over sockets."""

from __future__ import annotations

import asyncio
import json

from pd_proxy.fleet.backend import Lease

from tests.contract.answers import text_of_one, text_of_stream
from tests.contract.cases import CASES, fleet
from tests.handoff.helpers import CALL
from tests.support import completion, text_of, until

CASE = next(case for case in CASES if case.name == "ascend_layerwise")
PATH = "/v1/completions"


async def test_decode_is_asked_first_and_prefill_only_once_it_has_called() -> None:
    async with fleet(CASE) as (running, [p], [d]):
        d.faults.add("delay_first_byte", leg="decode", delay_s=0.3)
        asking = asyncio.ensure_future(running.http.post(PATH, json=completion(stream=True)))
        await d.wait_for(lambda: len(d.requests) == 1)
        await asyncio.sleep(0.05)
        assert not p.requests
        assert text_of_stream((await asking).text) == await text_of_one("completions")
        [asked], [told] = d.requests, p.requests
        assert asked.headers["x-request-id"] == told.headers["x-request-id"]
        assert asked.body["kv_transfer_params"]["metaserver"] == f"{running.url}/v1/metaserver"
        assert told.body["kv_transfer_params"]["remote_port"] == d.side_port
        assert d.engine.side.calls == [200]  # type: ignore[attr-defined]


async def test_a_call_is_answered_while_prefill_has_yet_to_begin() -> None:
    async with fleet(CASE) as (running, [p], [d]):
        p.faults.add("delay_first_byte", leg="prefill", delay_s=1.0)
        asking = asyncio.ensure_future(running.http.post(PATH, json=completion()))
        await until(lambda: d.engine.side.calls == [200])  # type: ignore[attr-defined]
        assert not asking.done()
        assert not p.engine.stats.steps
        assert (await asking).status_code == 200


async def test_a_second_call_and_one_after_the_end_do_nothing() -> None:
    async with fleet(CASE) as (running, [p], [d]):
        answer = await running.http.post(PATH, json=completion())
        name = d.requests[0].headers["x-request-id"]
        again = await running.http.post("/v1/metaserver", json={**CALL, "request_id": f"cmpl-{name}-0"})
        assert (answer.status_code, again.status_code) == (200, 404)
        assert len(p.requests) == 1


async def test_a_decode_engine_that_never_calls_is_replaced_by_another() -> None:
    expected = await text_of_one("completions")
    async with fleet(CASE, decode=2, timeouts={"first_token": 0.3}) as (running, [p], decode):
        decode[0].faults.add("hang", leg="decode")
        spare = running.gateway.fleet.find(decode[1].url, "decode")
        assert spare is not None
        with Lease(spare, 1_000_000):  # so that the other one is chosen first
            answer = await running.http.post(PATH, json=completion())
        assert text_of(answer.json()) == expected
        assert len(p.requests) == 1
        await until(running.idle)
        assert (await running.metrics())['pd_proxy_retries_total{leg="decode",reason="timeout"}'] == 1


async def test_a_prefill_that_is_lost_before_the_call_is_not_waited_for() -> None:
    expected = await text_of_one("completions")
    async with fleet(CASE, prefill=2) as (running, prefill, [d]):
        d.faults.add("delay_first_byte", leg="decode", delay_s=5.0, count=1)
        asking = asyncio.ensure_future(running.http.post(PATH, json=completion()))
        await d.wait_for(lambda: len(d.requests) == 1)
        [chosen] = [b for b in running.gateway.fleet.pool("prefill") if b.inflight_requests]
        next(engine for engine in prefill if engine.url == chosen.url).kill()
        answer = await asyncio.wait_for(asking, 4)
        assert text_of(answer.json()) == expected
        await until(running.idle)


async def test_a_client_that_leaves_before_the_call_costs_no_prefill() -> None:
    async with fleet(CASE, engine={"lease": 2.0}) as (running, [p], [d]):
        d.faults.add("delay_first_byte", leg="decode", delay_s=0.4)
        data = json.dumps(completion()).encode()
        _, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data)
        await d.wait_for(lambda: len(d.requests) == 1)
        writer.close()
        await until(running.idle)
        await d.wait_for(lambda: d.requests[0].aborted)
        assert not p.requests


async def test_a_prefill_leg_that_was_sent_runs_to_its_end_so_that_decode_frees_its_blocks() -> None:
    async with fleet(CASE, engine={"prefill_rate": 200.0}) as (running, [p], [d]):
        data = json.dumps(completion(stream=True)).encode()
        _, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data)
        await p.wait_for(lambda: len(p.requests) == 1)
        writer.close()
        await d.wait_for(lambda: d.requests[0].aborted)
        assert d.engine.used_blocks, "freed while prefill may still write to them"
        await d.wait_for(lambda: d.engine.used_blocks == 0)  # the lease is 480 s
        assert not p.requests[0].aborted
        await until(running.idle)


async def test_a_prefill_leg_that_outlives_its_request_still_counts_as_load() -> None:
    async with fleet(CASE, engine={"prefill_rate": 1000.0}) as (running, [p], [d]):
        [backend] = running.gateway.fleet.pool("prefill")
        data = json.dumps(completion("a word " * 200, stream=True)).encode()
        _, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data)
        await p.wait_for(lambda: len(p.requests) == 1)
        writer.close()
        await d.wait_for(lambda: d.requests[0].aborted)
        assert backend.speeds.outstanding > 256
        await until(running.idle)
        assert backend.speeds.prefills  # its answer has shown how fast it is


async def test_a_list_of_prompts_goes_whole_to_one_engine_without_a_call() -> None:
    async with fleet(CASE) as (running, [p], [d]):
        answer = await running.http.post(PATH, json=completion(["one prompt", "and another"]))
        assert len(answer.json()["choices"]) == 2
        assert answer.headers["x-pd-proxy-fallback"] == "prompt_list"
        assert "kv_transfer_params" not in d.requests[0].body
        assert not p.requests
