from __future__ import annotations

import asyncio
import json

import pytest
from pd_proxy_simulator import Simulator, SimulatorConfig

from .helpers import PROMPT, Client, Start, greedy


async def test_a_batch_gives_each_sequence_a_token_a_step(start: Start, client: Client) -> None:
    sim = await start(step_time=0.01)
    bodies = [greedy(prompt=f"prompt {number}", max_tokens=10) for number in range(8)]
    began = asyncio.get_running_loop().time()
    await asyncio.gather(*(client.post(sim, "/v1/completions", body) for body in bodies))
    assert 0.1 <= asyncio.get_running_loop().time() - began < 0.6
    assert sim.engine.stats.steps < 25


async def test_prefill_takes_the_time_its_tokens_need(start: Start, client: Client) -> None:
    sim = await start(prefill_rate=1000)
    began = asyncio.get_running_loop().time()
    answer = await client.post(sim, "/v1/completions", greedy(prompt=[100] * 200, max_tokens=1))
    took = asyncio.get_running_loop().time() - began
    assert 0.2 <= took < 0.5
    answer = await client.post(sim, "/v1/completions", greedy(prompt=[100] * 200, max_tokens=1))
    assert answer.json()["usage"]["prompt_tokens_details"] == {"cached_tokens": 192}
    assert asyncio.get_running_loop().time() - began - took < 0.15


async def test_requests_wait_for_a_place_in_the_batch(start: Start, client: Client) -> None:
    sim = await start(max_num_seqs=2, step_time=0.005)
    legs = [asyncio.create_task(client.text(sim, prompt=f"{n}", max_tokens=40)) for n in range(4)]
    await sim.wait_for(lambda: (sim.engine.running, sim.engine.waiting) == (2, 2))
    assert all(await asyncio.gather(*legs))


async def test_requests_wait_for_blocks(start: Start, client: Client) -> None:
    sim = await start(blocks=12, step_time=0.005)
    legs = [asyncio.create_task(client.text(sim, prompt=[97 + n] * 100, max_tokens=4)) for n in range(3)]
    await sim.wait_for(lambda: (sim.engine.running, sim.engine.waiting) == (1, 2))
    assert all(await asyncio.gather(*legs))
    assert sim.engine.used_blocks == 0


async def test_a_preempted_sequence_generates_the_same_text(start: Start, client: Client, mixed: Simulator) -> None:
    sim = await start(blocks=16)
    prompts = [[97 + number] * 40 for number in range(4)]
    texts = await asyncio.gather(*(client.text(sim, prompt=prompt, max_tokens=100) for prompt in prompts))
    assert sim.engine.stats.preemptions > 0
    assert texts == [await client.text(mixed, prompt=prompt, max_tokens=100) for prompt in prompts]
    assert sim.engine.used_blocks == 0


async def test_a_preempted_sequence_can_be_reported_as_recomputed(start: Start, client: Client) -> None:
    sim = await start(blocks=16, preemption="report")
    bodies = [greedy(prompt=[97 + number] * 40, max_tokens=100) for number in range(4)]
    answers = await asyncio.gather(*(client.post(sim, "/v1/completions", body) for body in bodies))
    reasons = [answer.json()["choices"][0]["stop_reason"] for answer in answers]
    assert "recomputed" in reasons


async def test_closing_the_connection_frees_everything_at_once(start: Start, client: Client) -> None:
    sim = await start(step_time=0.01)
    stream = client.events(sim, "/v1/completions", greedy(max_tokens=1000))
    await anext(stream)
    assert sim.engine.running == 1
    await stream.aclose()
    await sim.wait_for(lambda: sim.engine.running == 0)
    assert sim.engine.used_blocks == 0
    assert sim.engine.stats.aborted == 1
    assert sim.requests[-1].aborted
    assert sim.requests[-1].status == 200


async def test_closing_a_whole_answers_connection_aborts_it_too(start: Start, client: Client) -> None:
    sim = await start(step_time=0.01)
    leg = asyncio.create_task(client.text(sim, max_tokens=1000))
    await sim.wait_for(lambda: sim.engine.running == 1)
    leg.cancel()
    await sim.wait_for(lambda: sim.engine.running == 0 and sim.requests[-1].aborted)
    assert sim.requests[-1].status is None


@pytest.mark.slow
async def test_a_client_that_reads_slowly_gets_every_token_once(start: Start) -> None:
    sim = await start(max_model_len=131072, blocks=9000)
    count = 60_000
    body = json.dumps(greedy(max_tokens=count, stream=True, return_token_ids=True)).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", sim.port, limit=2**16)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
    await sim.wait_for(lambda: sim.engine.stats.generation_tokens == count, 20)
    received = b""
    while b"[DONE]" not in received[-64:]:
        received += await reader.read(2**20)
    lines = [line for line in received.splitlines() if line.startswith(b"data: {")]
    tokens = sum(len(json.loads(line[6:])["choices"][0]["token_ids"]) for line in lines)
    assert tokens == count
    assert len(lines) < count
    writer.close()


async def test_a_full_queue_refuses_with_503(start: Start, client: Client) -> None:
    sim = await start(max_num_seqs=1, max_queued=1, step_time=0.01)
    legs = [asyncio.create_task(client.text(sim, max_tokens=1000))]
    await sim.wait_for(lambda: sim.engine.running == 1)
    legs.append(asyncio.create_task(client.text(sim, max_tokens=1000)))
    await sim.wait_for(lambda: sim.engine.waiting == 1)
    answer = await client.post(sim, "/v1/completions", greedy())
    assert (answer.status_code, answer.json()["error"]["type"]) == (503, "Service Unavailable")
    for leg in legs:
        leg.cancel()
    await asyncio.gather(*legs, return_exceptions=True)


async def test_the_prefix_cache_keeps_cache_salts_apart(mixed: Simulator, client: Client) -> None:
    cached = []
    for salt in ("a", "a", "b"):
        answer = await client.post(mixed, "/v1/completions", greedy(cache_salt=salt))
        cached.append(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert cached[0] == cached[2] == 0 < cached[1]


async def test_other_weights_generate_another_text(start: Start, mixed: Simulator, client: Client) -> None:
    assert await client.text(await start(weights=1)) != await client.text(mixed)


def test_a_configuration_with_which_no_engine_can_run_is_refused() -> None:
    with pytest.raises(ValueError, match="block_size must be at least 1"):
        SimulatorConfig(block_size=0)
    with pytest.raises(ValueError, match="lease must be positive"):
        SimulatorConfig(lease=0)


async def test_metrics_have_vllms_names(mixed: Simulator, client: Client) -> None:
    await client.text(mixed, prompt=PROMPT)
    page = (await client.get(mixed, "/metrics")).text
    labels = 'engine="0",model_name="sim"'
    for line in (
        f"vllm:num_requests_running{{{labels}}} 0.0",
        f"vllm:num_requests_waiting{{{labels}}} 0.0",
        f"vllm:kv_cache_usage_perc{{{labels}}} 0.0",
        f"vllm:generation_tokens_total{{{labels}}} 24.0",
        f'vllm:request_success_total{{{labels},finished_reason="length"}} 1.0',
        f"vllm:external_prefix_cache_queries_total{{{labels}}} 0.0",
        f"vllm:external_prefix_cache_hits_total{{{labels}}} 0.0",
        f"vllm:nixl_num_kv_expired_reqs_total{{{labels}}} 0.0",
        f"vllm:time_to_first_token_seconds_count{{{labels}}} 1.0",
    ):
        assert line in page.splitlines()
    assert f'vllm:prompt_tokens_by_source_total{{{labels},source="local_compute"}}' in page
    assert 'block_size="16"' in page


async def test_metrics_are_prometheus_text(mixed: Simulator, client: Client) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    await client.text(mixed)
    families = {family.name for family in text_string_to_metric_families((await client.get(mixed, "/metrics")).text)}
    assert {"vllm:num_requests_running", "vllm:prompt_tokens", "vllm:cache_config_info"} <= families
