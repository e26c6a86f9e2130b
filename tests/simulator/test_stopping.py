"""How requests end when the engine is stopped, paused or put to sleep, as observed of vLLM 0.32."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from pd_proxy_simulator import Simulator

from .helpers import PREFILL, Client, Start, chat, greedy

LONG = {"max_tokens": 2000}
STEP = {"step_time": 0.002}
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


async def running(sim: Simulator, count: int = 1) -> None:
    await sim.wait_for(lambda: sim.engine.running == count and sim.engine.stats.generation_tokens > 3 * count)


async def begun(client: Client, sim: Simulator, path: str, body: dict[str, Any]) -> asyncio.Task[httpx.Response]:
    """A request that has generated some tokens already."""
    task = asyncio.create_task(client.post(sim, path, body))
    await running(sim)
    return task


def ends(events: list[Any]) -> list[Any]:
    return [choice["finish_reason"] for event in events[:-1] for choice in event["choices"] if choice["finish_reason"]]


ABORTS = pytest.mark.parametrize("how", ["sigterm", "/pause", "/pause?mode=abort", "/sleep?level=0"])


async def stop(client: Client, sim: Simulator, how: str) -> None:
    if how == "sigterm":
        sim.terminate()
    else:
        assert (await client.post(sim, how, {})).status_code == 200


@ABORTS
@pytest.mark.parametrize(("path", "body"), [(CHAT, chat(**LONG)), (COMPLETIONS, greedy(**LONG))])
async def test_a_stream_ends_with_finish_reason_abort_under_status_200(
    start: Start, client: Client, how: str, path: str, body: dict[str, Any]
) -> None:
    sim = await start(**STEP)
    task = asyncio.create_task(client.all_events(sim, path, {**body, "stream_options": {"include_usage": True}}))
    await running(sim)
    await stop(client, sim, how)
    events = await task
    assert events[-1] == "[DONE]" and events[-2]["usage"]["completion_tokens"] < 2000
    assert ends(events[:-1]) == ["abort"]
    assert not sim.engine.used_blocks and not sim.engine.running


@ABORTS
async def test_an_answer_in_one_piece_has_the_tokens_so_far(start: Start, client: Client, how: str) -> None:
    sim = await start(**STEP)
    task = await begun(client, sim, COMPLETIONS, greedy(**LONG))
    await stop(client, sim, how)
    answer = (await task).json()
    assert answer["choices"][0]["finish_reason"] == "abort" and answer["choices"][0]["text"]
    assert 3 < answer["usage"]["completion_tokens"] < 2000


async def test_each_route_reports_the_abort_in_its_own_form(start: Start, client: Client) -> None:
    sim = await start(**STEP, scale_out=True)
    messages = {"model": "sim", "max_tokens": 2000, "messages": [{"role": "user", "content": "hello"}]}
    response = {"model": "sim", "input": "hello", "max_output_tokens": 2000, "temperature": 0, "ignore_eos": True}
    generate = {"token_ids": [5, 6, 7], "sampling_params": {"max_tokens": 2000, "ignore_eos": True}}
    asked = [("/v1/messages", messages), ("/v1/responses", response), ("/inference/v1/generate", generate)]
    tasks = [asyncio.create_task(client.post(sim, path, body)) for path, body in asked]
    await sim.wait_for(lambda: sim.engine.running == 3)
    sim.terminate()
    message, responded, generated = [(await task).json() for task in tasks]
    assert message["type"] == "message" and "stop_reason" not in message
    assert responded["status"] == "cancelled"
    assert generated["choices"][0]["finish_reason"] == "abort"


async def test_text_that_was_held_back_comes_with_the_abort(start: Start, client: Client) -> None:
    sim = await start(**STEP)
    body = greedy(**LONG, stop=["\x00" * 3000])  # so long that no text is ever shown
    task = asyncio.create_task(client.all_events(sim, COMPLETIONS, body))
    await running(sim)
    sim.terminate()
    said = [event["choices"][0] for event in (await task)[:-1]]
    assert not any(choice["text"] for choice in said[:-1])
    assert said[-1]["text"] and said[-1]["finish_reason"] == "abort"


async def test_a_stopped_engine_reports_healthy_for_a_moment_and_then_ends(start: Start, client: Client) -> None:
    sim = await start(exit_delay=0.05)
    sim.terminate()
    assert (await client.get(sim, "/health")).status_code == 200
    with pytest.raises(httpx.ReadError):
        await client.post(sim, COMPLETIONS, greedy())  # accepted, and reset when the process goes
    with pytest.raises(httpx.ConnectError):
        await client.get(sim, "/health")
    assert not sim.alive


@pytest.mark.parametrize(("out", "back"), [("/pause", "/resume"), ("/sleep", "/wake_up")])
async def test_new_requests_wait_on_a_paused_engine(start: Start, client: Client, out: str, back: str) -> None:
    sim = await start()
    assert (await client.post(sim, out, {})).status_code == 200
    for path in ("/is_sleeping", "/is_paused"):
        assert (await client.get(sim, path)).json() == {path[1:]: True}
    assert (await client.get(sim, "/health")).status_code == 200
    task = asyncio.create_task(client.text(sim))
    await sim.wait_for(lambda: len(sim.requests) == 1)
    await asyncio.sleep(0)
    assert not sim.engine.running and not task.done()
    await client.post(sim, back, {})
    assert await task
    assert (await client.get(sim, "/is_paused")).json() == {"is_paused": False}


@pytest.mark.parametrize(("out", "back"), [("/pause?mode=keep", "/resume"), ("/sleep?mode=keep", "/wake_up")])
async def test_requests_that_a_pause_keeps_go_on_later(start: Start, client: Client, out: str, back: str) -> None:
    sim = await start(**STEP)
    whole = await client.text(sim, max_tokens=200)
    task = await begun(client, sim, COMPLETIONS, greedy(max_tokens=200))
    await client.post(sim, out, {})
    steps = sim.engine.stats.steps
    await client.get(sim, "/health")
    assert sim.engine.stats.steps <= steps + 1 and not task.done()
    await client.post(sim, back, {})
    choice = (await task).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (whole, "length")


@pytest.mark.parametrize("how", ["/pause?mode=wait", "/sleep?mode=wait"])
async def test_a_pause_that_waits_answers_when_all_have_ended(start: Start, client: Client, how: str) -> None:
    sim = await start(**STEP)
    task = await begun(client, sim, COMPLETIONS, greedy(max_tokens=60))
    assert (await client.post(sim, how, {})).status_code == 200
    assert not sim.engine.running
    assert (await task).json()["choices"][0]["finish_reason"] == "length"


async def test_a_drain_finishes_running_requests_refuses_new_ones_and_reports_healthy(
    start: Start, client: Client
) -> None:
    sim = await start(**STEP, shutdown_timeout=30)
    whole = await client.text(sim, max_tokens=100)
    task = await begun(client, sim, COMPLETIONS, greedy(max_tokens=100))
    sim.terminate()
    refused = await client.post(sim, COMPLETIONS, greedy())
    assert refused.status_code == 500
    assert refused.json()["error"]["message"] == "cannot schedule new futures after shutdown"
    ids = (await client.post(sim, COMPLETIONS, greedy(prompt=[5, 6, 7]))).json()
    assert (ids["choices"][0]["finish_reason"], ids["choices"][0]["text"]) == ("abort", "")
    assert (await client.get(sim, "/health")).status_code == 200
    assert (await task).json()["choices"][0]["text"] == whole
    await sim.wait_for(lambda: not sim.alive)


async def test_a_drain_goes_on_while_a_hand_off_is_kept_and_serves_it(
    pair: tuple[Simulator, Simulator], start: Start, client: Client
) -> None:
    prefill, decode = await start(role="prefill", shutdown_timeout=30), pair[1]
    params = await client.prefill(prefill)
    prefill.terminate()
    assert (await client.get(prefill, "/health")).status_code == 200
    answer = await client.post(decode, COMPLETIONS, greedy(kv_transfer_params=params))
    assert answer.json()["choices"][0]["finish_reason"] == "length" and decode.engine.pulls == 1
    await prefill.wait_for(lambda: not prefill.alive)


async def test_a_prefill_leg_that_is_given_up_has_no_parameters(start: Start, client: Client) -> None:
    sim = await start(role="prefill", prefill_rate=100.0)
    leg = greedy(max_tokens=1, kv_transfer_params=PREFILL)
    task = asyncio.create_task(client.post(sim, COMPLETIONS, leg))
    await sim.wait_for(lambda: sim.engine.running + sim.engine.waiting == 1)
    sim.terminate()
    answer = (await task).json()
    assert answer["choices"][0]["finish_reason"] == "abort" and not answer.get("kv_transfer_params")
    assert not sim.engine.used_blocks


async def test_requests_that_outlast_the_drain_hang(start: Start, client: Client) -> None:
    sim = await start(**STEP, shutdown_timeout=0.05)
    reader, writer = await asyncio.open_connection("127.0.0.1", sim.port)
    body = json.dumps(greedy(max_tokens=2000, stream=True)).encode()
    writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
    await running(sim)
    sim.terminate()
    await sim.wait_for(lambda: not sim.alive)
    with pytest.raises(httpx.ConnectError):
        await client.get(sim, "/health")
    said = b""
    with pytest.raises(TimeoutError):  # no last chunk, no error, no end
        async with asyncio.timeout(0.1):
            while piece := await reader.read(65536):
                said += piece
    assert b'"finish_reason":null' in said and b"[DONE]" not in said
    writer.close()
    await sim.wait_for(lambda: not sim.connections)
