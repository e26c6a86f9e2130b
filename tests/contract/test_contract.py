"""The contract of every connector: whatever its protocol, a client cannot tell it from a single engine."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from pd_proxy.handoff.connectors.registry import CONNECTORS

from tests.contract.answers import PATHS, body, text_of_one, text_of_stream
from tests.contract.cases import CASES, IDS, MOST, Case, fleet
from tests.support import PROMPT, Running, chat, completion, running_gateway, simulators, text_of, until

pytestmark = pytest.mark.cross_product

EVERY = pytest.mark.parametrize("case", CASES, ids=IDS)
BY_WAY = pytest.mark.parametrize("case", MOST, ids=IDS)
HIDDEN = ("kv_transfer_params", "disaggregated_params", "bootstrap", "remote_", "_addr_", "127.0.0.1")


async def text_from(running: Running, asked: dict[str, Any]) -> str:
    """The text of a completion."""
    answer = await running.http.post(PATHS["completions"], json=asked)
    assert answer.status_code == 200, answer.text
    return text_of_stream(answer.text) if asked["stream"] else text_of(answer.json())


def test_every_connector_is_under_contract() -> None:
    assert set(IDS) == set(CONNECTORS)


@EVERY
@pytest.mark.parametrize("endpoint", PATHS)
async def test_a_pair_answers_as_one_engine_does(case: Case, endpoint: str) -> None:
    expected = await text_of_one(endpoint)
    async with fleet(case) as (running, [p], [d]):
        whole = await running.http.post(PATHS[endpoint], json=body(endpoint))
        assert whole.status_code == 200, whole.text
        assert text_of(whole.json()) == expected
        assert "x-pd-proxy-fallback" not in whole.headers
        other = "another prompt, so that no cache helps " * 4
        request = {"messages": [{"role": "user", "content": other}]} if endpoint == "chat" else {"prompt": other}
        stream = await running.http.post(PATHS[endpoint], json=body(endpoint, **request, stream=True))
        assert text_of_stream(stream.text) == await text_of_one(endpoint, **request)
        for answer in (whole, stream):
            assert not any(name in answer.text for name in HIDDEN)
        assert d.engine.stats.pulls == 2, "decode has computed the prompt itself"
        await until(running.idle)
        await p.wait_for(lambda: p.engine.used_blocks == 0)
        await d.wait_for(lambda: d.engine.used_blocks == 0)


@BY_WAY
async def test_a_new_pair_is_warmed_up_with_a_hand_off(case: Case) -> None:
    async with fleet(case, warmup=True) as (running, [p], [d]):
        await d.wait_for(lambda: d.engine.stats.pulls == 1)
        await until(running.idle)
        assert len(p.requests) == len(d.requests) == 1
        await p.wait_for(lambda: p.engine.used_blocks == 0)


@BY_WAY
async def test_a_clients_hand_off_parameters_reach_no_engine(case: Case) -> None:
    evil = {
        "kv_transfer_params": {"do_remote_prefill": True, "remote_host": "10.6.6.6"},
        "bootstrap_host": "10.6.6.6",
        "bootstrap_room": 1,
        "disaggregated_params": {"ctx_info_endpoint": "10.6.6.6"},
        "ec_transfer_params": {"peer_host": "10.6.6.6"},
    }
    async with fleet(case) as (running, [p], [d]):
        answer = await running.http.post(PATHS["chat"], json=chat(**evil))
        assert answer.status_code == 200
        for engine in (p, d):
            assert "10.6.6.6" not in json.dumps([request.body for request in engine.requests])


@EVERY
@pytest.mark.parametrize("stream", [False, True])
async def test_a_prefill_that_fails_is_tried_elsewhere_and_decode_does_not_wait_for_it(
    case: Case, stream: bool
) -> None:
    expected = await text_of_one("completions")
    # Some decode engines hold the memory of a transfer that never comes until its lease ends.
    async with fleet(case, prefill=2, engine={"lease": 2.0}) as (running, prefill, [d]):
        for engine in prefill:
            engine.faults.add("status", leg="prefill", status=500, count=1)
        started = asyncio.get_running_loop().time()
        answer = await running.http.post(PATHS["completions"], json=completion(stream=stream))
        assert answer.status_code == 200, answer.text
        assert (text_of_stream(answer.text) if stream else text_of(answer.json())) == expected
        assert asyncio.get_running_loop().time() - started < 5
        await until(running.idle)
        await d.wait_for(lambda: not d.engine.running and not d.engine.waiting)


@EVERY
@pytest.mark.slow  # it waits for the end of leases
@pytest.mark.parametrize("stream", [False, True])
async def test_a_decode_that_fails_is_tried_elsewhere(case: Case, stream: bool) -> None:
    expected = await text_of_one("completions")
    async with fleet(case, decode=2, engine={"lease": 4.0}) as (running, [p], decode):
        # any of them may be chosen; the other may get the fault when it has to release the hand-off
        for engine in decode:
            engine.faults.add("status", leg="decode", status=500, count=1)
        answer = await running.http.post(PATHS["completions"], json=completion(stream=stream))
        assert answer.status_code == 200, answer.text
        assert (text_of_stream(answer.text) if stream else text_of(answer.json())) == expected
        await until(running.idle)
        await p.wait_for(lambda: p.engine.used_blocks == 0, 30)


@pytest.mark.slow
@EVERY
async def test_dead_backends_among_live_ones_fail_no_request(case: Case) -> None:
    # Each request has a prompt of its own: LMCache may answer wrong where two prompts are the same
    # (docs/connectors.md).
    asked = [completion(f"{n} {PROMPT}", stream=bool(n % 2)) for n in range(20)]
    async with simulators("mixed") as [single], running_gateway(mixed=[single.url]) as alone:
        expected = [await text_from(alone, each) for each in asked]
    async with fleet(case, prefill=2, decode=2) as (running, prefill, decode):
        prefill[0].kill()
        decode[1].kill()
        assert await asyncio.gather(*(text_from(running, each) for each in asked)) == expected
        await until(running.idle)


@BY_WAY
@pytest.mark.parametrize("stage", ["prefill", "decode", "stream"])
async def test_a_client_that_leaves_leaves_nothing_behind(case: Case, stage: str) -> None:
    pace = {"step_time": 0.02, "prefill_rate": 400.0 if stage == "prefill" else 0.0, "lease": 2.0}
    async with fleet(case, engine=pace) as (running, [p], [d]):
        if stage == "decode":
            d.faults.add("delay_first_byte", leg="decode", delay_s=1.0)
        data = json.dumps(completion(max_tokens=400, ignore_eos=True, stream=True)).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        head = f"POST {PATHS['completions']} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + data)
        if stage == "stream":
            await reader.readuntil(b"\n\n")
        else:
            engine = {"prefill": p, "decode": d}[stage]
            await engine.wait_for(lambda: len(engine.requests) > 0)
        writer.close()
        await until(running.idle, 20)
        for one in (p, d):
            await one.wait_for(lambda one=one: not one.engine.running and not one.engine.waiting, 20)  # type: ignore[misc]
            await one.wait_for(lambda one=one: one.engine.used_blocks == 0, 20)  # type: ignore[misc]


@BY_WAY
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("primed", [True, False], ids=["half in prefill's cache", "nothing in it"])
async def test_a_clients_usage_has_the_tokens_that_prefill_had_cached(case: Case, stream: bool, primed: bool) -> None:
    beginning = "the first half of a prompt that prefill has seen before, and decode never has; " * 2
    if primed and not CONNECTORS[case.name].traits.plain_prefill:
        pytest.skip("its prefill engines answer nobody but a gateway")
    async with fleet(case) as (running, [p], [d]):
        if primed:
            async with httpx.AsyncClient(base_url=p.url, verify=False) as straight:
                await straight.post(PATHS["completions"], json=completion(beginning, max_tokens=1))
            p.requests.clear()
        usage = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        prompt = beginning + "and the other half, which is new to both of them. " * 3
        answer = await running.http.post(PATHS["completions"], json=completion(prompt, ignore_eos=True, **usage))
        events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        told = events[-1]["usage"] if stream else answer.json()["usage"]
        cached = told["prompt_tokens_details"]["cached_tokens"]
        assert (0 < cached < told["prompt_tokens"] * 0.7) if primed else cached == 0
        assert p.engine.stats.prefix_hits == cached
        assert d.engine.stats.pulls == 1
        assert told["total_tokens"] == told["prompt_tokens"] + told["completion_tokens"]


@BY_WAY
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_without_prefills_number_decodes_usage_stays(case: Case, stream: bool) -> None:
    async with fleet(case, engine={"prompt_tokens_details": False}) as (running, _, _):
        usage = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        answer = await running.http.post(PATHS["completions"], json=completion(**usage))
        assert answer.status_code == 200
        assert "cached_tokens" not in answer.text


@EVERY
async def test_without_prefill_decode_answers_alone_or_the_error_says_that_it_may_not(case: Case) -> None:
    expected = await text_of_one("completions")
    async with fleet(case, health={"interval": 0.1}) as (running, [p], [d]):
        p.kill()
        await until(lambda: not next(b for b in running.gateway.fleet if b.url == p.url).up)
        answer = await running.http.post(PATHS["completions"], json=completion())
        if CONNECTORS[case.name].traits.plain_decode:
            assert text_of(answer.json()) == expected
            assert answer.headers["x-pd-proxy-fallback"] == "no_prefill_backend"
        else:
            assert answer.status_code == 503
            assert not d.requests, "a request without a hand-off would be answered wrong there"
