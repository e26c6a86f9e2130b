from __future__ import annotations

import asyncio
import json

import httpx
import msgspec
import pytest
from pd_proxy_simulator import Simulator

from .helpers import PREFILL, Client, Start, chat, greedy


async def test_a_status_fault_hits_as_many_requests_as_its_count(mixed: Simulator, client: Client) -> None:
    fault = mixed.faults.add("status", status=503, count=2, retry_after=3)
    answers = [await client.post(mixed, "/v1/completions", greedy()) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [503, 503, 200]
    assert answers[0].headers["retry-after"] == "3"
    assert fault.hits == 2


async def test_a_status_is_answered_as_often_as_its_probability_says(mixed: Simulator, client: Client) -> None:
    mixed.faults.add("status", status=429, probability=0.5)
    statuses = {(await client.post(mixed, "/v1/completions", greedy(max_tokens=1))).status_code for _ in range(30)}
    assert statuses == {200, 429}


async def test_a_fault_can_be_limited_to_one_leg(mixed: Simulator, client: Client) -> None:
    mixed.faults.add("status", leg="prefill")
    assert (await client.post(mixed, "/v1/completions", greedy())).status_code == 200
    assert (await client.post(mixed, "/v1/completions", greedy(kv_transfer_params=PREFILL))).status_code == 500


async def test_a_fault_that_refuses_connections_can_be_removed(mixed: Simulator, client: Client) -> None:
    await client.text(mixed)
    fault = mixed.faults.add("refuse")
    with pytest.raises(httpx.TransportError):
        await client.http.get(mixed.url + "/health")
    with pytest.raises(httpx.ConnectError):
        await client.http.get(mixed.url + "/health")
    mixed.faults.remove(fault)
    await mixed.wait_for(lambda: mixed.listening)
    assert (await client.get(mixed, "/health")).status_code == 200


async def test_refusing_can_be_switched_on_over_http_for_a_while(mixed: Simulator, client: Client) -> None:
    url = mixed.url + "/simulator/faults"
    assert (await client.http.put(url, json={"kind": "refuse"})).status_code == 400
    assert (await client.http.put(url, json={"kind": "refuse", "duration_s": 0.05})).status_code == 200
    await mixed.wait_for(lambda: not mixed.listening)
    await mixed.wait_for(lambda: mixed.listening)
    assert (await client.get(mixed, "/health")).status_code == 200


async def test_faults_are_listed_replaced_and_switched_off_over_http(mixed: Simulator, client: Client) -> None:
    url = mixed.url + "/simulator/faults"
    put = await client.http.put(
        url, json={"faults": [{"kind": "status", "status": 503}, {"kind": "slow", "factor": 2}]}
    )
    assert put.status_code == 200
    assert [fault["kind"] for fault in (await client.http.get(url)).json()["faults"]] == ["status", "slow"]
    assert (await client.post(mixed, "/v1/completions", greedy())).status_code == 503
    assert (await client.http.get(url)).json()["faults"][0]["hits"] == 1
    assert (await client.http.delete(url)).json() == {"faults": []}
    assert (await client.post(mixed, "/v1/completions", greedy())).status_code == 200
    for wrong in ({"kind": "nonsense"}, {"kind": "status", "colour": 1}, {"kind": "status", "status": 200}, 7):
        assert (await client.http.put(url, json=wrong)).status_code == 400


def test_a_fault_that_does_not_exist_is_refused_in_process() -> None:
    with pytest.raises(msgspec.ValidationError):
        Simulator().faults.add("nonsense")  # type: ignore[arg-type]


async def test_a_reset_comes_instead_of_an_answer(mixed: Simulator, client: Client) -> None:
    mixed.faults.add("reset", count=1)
    with pytest.raises(httpx.ReadError):
        await client.post(mixed, "/v1/completions", greedy())
    assert mixed.requests[-1].status is None
    assert await client.text(mixed)


async def test_a_hanging_leg_is_never_answered_but_health_is(mixed: Simulator, client: Client) -> None:
    mixed.faults.add("hang")
    leg = asyncio.create_task(client.post(mixed, "/v1/completions", greedy()))
    await mixed.wait_for(lambda: len(mixed.requests) == 1)
    assert (await client.get(mixed, "/health")).status_code == 200
    leg.cancel()
    await mixed.wait_for(lambda: mixed.requests[0].aborted)
    mixed.faults.clear()
    mixed.faults.add("hang", leg="health")
    assert await client.text(mixed)
    with pytest.raises(httpx.ReadTimeout):
        await client.http.get(mixed.url + "/health", timeout=0.05)


async def test_slow_makes_steps_longer(start: Start, client: Client) -> None:
    sim = await start(step_time=0.002)
    sim.faults.add("slow", factor=10)
    began = asyncio.get_running_loop().time()
    await client.text(sim, max_tokens=10)
    assert asyncio.get_running_loop().time() - began >= 0.2


async def test_the_first_byte_can_be_late(mixed: Simulator, client: Client) -> None:
    mixed.faults.add("delay_first_byte", delay_s=0.1)
    began = asyncio.get_running_loop().time()
    await client.text(mixed)
    assert asyncio.get_running_loop().time() - began >= 0.1


@pytest.mark.parametrize("ending", ["reset", "close", "truncated", "garbage", "kill"])
async def test_a_stream_breaks_off_after_the_given_number_of_tokens(
    mixed: Simulator, client: Client, ending: str
) -> None:
    mixed.faults.add("die_mid_stream", after_tokens=5, count=1, ending=ending)
    seen = []
    with pytest.raises(httpx.TransportError):
        async for event in client.events(mixed, "/v1/completions", greedy()):
            seen.append(event)  # noqa: PERF401 - the events before the cut are wanted
    assert len(seen) == 5
    await mixed.wait_for(lambda: mixed.engine.running == 0)
    assert mixed.alive == (ending != "kill")
    if mixed.alive:
        assert len(await client.all_events(mixed, "/v1/completions", greedy())) == 25


@pytest.mark.parametrize("ending", ["json", "error", "done", "end"])
async def test_a_stream_can_fail_in_proper_http(mixed: Simulator, client: Client, ending: str) -> None:
    mixed.faults.add("die_mid_stream", after_tokens=5, ending=ending)
    body = greedy(stream=True, stream_options={"include_usage": True})
    answer = await client.post(mixed, "/v1/completions", body)
    said = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    tokens, rest = said[:5], said[5:]
    assert all(json.loads(event)["choices"][0]["finish_reason"] is None for event in tokens)
    if ending in ("json", "error"):
        last = rest.pop(0)
        if ending == "error":
            assert json.loads(last)["error"]["code"] == 500
        else:
            with pytest.raises(ValueError):
                json.loads(last)
    assert rest == ([] if ending == "end" else ["[DONE]"])


@pytest.mark.parametrize(("after", "texts"), [(0, 0), (-1, 12)])
async def test_a_stream_can_die_before_its_first_token_and_after_its_last(
    mixed: Simulator, client: Client, after: int, texts: int
) -> None:
    mixed.faults.add("die_mid_stream", after_tokens=after)
    seen = []
    with pytest.raises(httpx.TransportError):
        async for event in client.events(mixed, "/v1/chat/completions", chat()):
            seen.append(event)  # noqa: PERF401 - the events before the cut are wanted
    role, *tokens = (event["choices"][0] for event in seen)
    assert role["delta"] == {"role": "assistant", "content": ""}
    assert len(tokens) == texts
    assert [token["finish_reason"] for token in tokens if token["finish_reason"]] == ["length"][: texts and 1]


@pytest.mark.parametrize("after", [3, -1])
async def test_an_answer_in_one_piece_can_break_off(mixed: Simulator, client: Client, after: int) -> None:
    mixed.faults.add("die_mid_stream", after_tokens=after, count=1)
    with pytest.raises(httpx.TransportError):
        await client.post(mixed, "/v1/completions", greedy())
    assert await client.text(mixed)


@pytest.mark.parametrize("kind", ["hang", "reset"])
async def test_a_pull_can_fail_and_prefill_keeps_its_blocks(start: Start, client: Client, kind: str) -> None:
    prefill = await start(role="prefill")
    decode = await start(role="decode", handshake_timeout=0.05, load_failure_policy="fail")
    prefill.faults.add(kind, leg="pull", count=1)
    answer = await client.post(decode, "/v1/completions", greedy(kv_transfer_params=await client.prefill(prefill)))
    assert answer.status_code == 500
    assert prefill.engine.stranded_blocks > 0
    prefill.expire_handoffs()
    again = await client.post(decode, "/v1/completions", greedy(kv_transfer_params=await client.prefill(prefill)))
    assert again.status_code == 200
    await prefill.wait_for(lambda: prefill.engine.stranded_blocks == 0)


async def test_a_pull_can_be_late(start: Start, client: Client) -> None:
    prefill, decode = await start(role="prefill"), await start(role="decode")
    prefill.faults.add("delay_first_byte", leg="pull", delay_s=0.1)
    params = await client.prefill(prefill)
    began = asyncio.get_running_loop().time()
    assert (await client.post(decode, "/v1/completions", greedy(kv_transfer_params=params))).status_code == 200
    assert asyncio.get_running_loop().time() - began >= 0.1


async def test_a_stream_stalls_after_the_given_number_of_tokens(mixed: Simulator, client: Client) -> None:
    mixed.faults.add("stall_mid_stream", after_tokens=3)
    stream = client.events(mixed, "/v1/completions", greedy())
    for _ in range(3):
        await anext(stream)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await anext(stream)
    await stream.aclose()
    await mixed.wait_for(lambda: mixed.requests[-1].aborted)


async def test_handoff_parameters_can_be_left_out(mixed: Simulator, client: Client) -> None:
    mixed.faults.add("drop_handoff_params")
    assert await client.prefill(mixed) is None
    assert mixed.engine.stranded_blocks > 0


async def test_an_error_event_can_come_first(mixed: Simulator, client: Client) -> None:
    mixed.faults.add("error_event_first")
    role, error, done = await client.all_events(mixed, "/v1/chat/completions", chat())
    assert role["choices"][0]["delta"]["content"] == ""
    assert error["error"]["code"] == 500
    assert done == "[DONE]"
    assert (await client.post(mixed, "/v1/chat/completions", chat())).status_code == 500


async def test_garbage_comes_in_three_forms(mixed: Simulator, client: Client) -> None:
    mixed.faults.add("garbage", count=1)
    with pytest.raises(httpx.RemoteProtocolError):
        await client.post(mixed, "/v1/completions", greedy())
    mixed.faults.clear()
    mixed.faults.add("garbage", form="json", count=1)
    answer = await client.post(mixed, "/v1/completions", greedy())
    assert answer.status_code == 200
    with pytest.raises(ValueError):
        answer.json()
    mixed.faults.clear()
    mixed.faults.add("garbage", form="truncated", count=1)
    with pytest.raises(httpx.RemoteProtocolError):
        await client.post(mixed, "/v1/completions", greedy())


async def test_a_sequence_can_be_reported_as_recomputed(mixed: Simulator, client: Client) -> None:
    mixed.faults.add("recomputed", after_tokens=3)
    events = await client.all_events(mixed, "/v1/completions", greedy(return_token_ids=True))
    last = events[-2]["choices"][0]
    assert (last["finish_reason"], last["stop_reason"], last["token_ids"], last["text"]) == (
        "stop",
        "recomputed",
        [],
        "",
    )
    assert len(events) == 5


async def test_a_body_can_be_sent_in_small_pieces(mixed: Simulator, client: Client) -> None:
    mixed.faults.add("slow_body", piece_bytes=200, delay_s=0.005)
    began = asyncio.get_running_loop().time()
    whole = await client.text(mixed)
    assert asyncio.get_running_loop().time() - began >= 0.01
    events = await client.all_events(mixed, "/v1/completions", greedy(max_tokens=3))
    assert whole.startswith("".join(event["choices"][0]["text"] for event in events[:-1]))
    assert (await client.get(mixed, "/health")).status_code == 200


async def test_the_engine_can_die_on_demand(mixed: Simulator, client: Client) -> None:
    mixed.faults.add("engine_death")
    assert (await client.post(mixed, "/v1/completions", greedy())).status_code == 500
    await mixed.wait_for(lambda: not mixed.alive)
