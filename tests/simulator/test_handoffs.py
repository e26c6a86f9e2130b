from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

import httpx
import pytest
from pd_proxy_simulator import Simulator, SimulatorConfig

from .helpers import PREFILL, PROMPT, Client, Start, chat, greedy

Pair = tuple[Simulator, Simulator]


async def test_a_pair_answers_as_one_engine_does(pair: Pair, mixed: Simulator, client: Client) -> None:
    prefill, decode = pair
    for words in (1, 5, 16, 31, 32, 33, 200):
        prompt = " ".join(["river", "stone", "light"][index % 3] for index in range(words))
        params = await client.prefill(prefill, prompt=prompt)
        assert prefill.engine.stranded_blocks > 0
        text = await client.text(decode, prompt=prompt, kv_transfer_params=params)
        assert text == await client.text(mixed, prompt=prompt)
        await prefill.wait_for(lambda: prefill.engine.stranded_blocks == 0)
    assert decode.engine.stats.local_compute == 0
    assert decode.engine.stats.external_kv_transfer > 0
    assert prefill.engine.handoffs.pulled == decode.engine.stats.pulls == 7


async def test_a_pair_answers_a_chat_as_one_engine_does(pair: Pair, mixed: Simulator, client: Client) -> None:
    prefill, decode = pair
    leg = await client.post(prefill, "/v1/chat/completions", chat(max_tokens=1, kv_transfer_params=PREFILL))
    params = leg.json()["kv_transfer_params"]
    answers = [
        (await client.post(sim, "/v1/chat/completions", body)).json()["choices"][0]["message"]["content"]
        for sim, body in ((decode, chat(kv_transfer_params=params)), (mixed, chat()))
    ]
    assert answers[0] == answers[1]


async def test_prefill_answers_with_every_field_of_the_nixl_connector(pair: Pair, client: Client) -> None:
    prefill, _ = pair
    body = greedy(max_tokens=1, kv_transfer_params=PREFILL)
    answer = await client.post(prefill, "/v1/completions", body, **{"X-Request-Id": "abc"})
    params = answer.json()["kv_transfer_params"]
    tokens = answer.json()["usage"]["prompt_tokens"]
    request_id = params.pop("remote_request_id")
    assert request_id.startswith("cmpl-abc-0-") and len(request_id) == len("cmpl-abc-0-") + 8
    assert len(params.pop("remote_block_ids")[0]) == -(-tokens // 16)
    assert params == {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_engine_id": prefill.engine.id,
        "remote_host": "127.0.0.1",
        "remote_port": prefill.side_port,
        "tp_size": 1,
        "dcp_size": 1,
        "pp_size": 1,
        "remote_num_tokens": tokens,
        "remote_blocks_expiry_time": None,
        "transfer_mode": "pull",
        "remote_prefill_cached_tokens": 0,
    }


async def test_a_streamed_prefill_pins_blocks_but_answers_without_parameters(pair: Pair, client: Client) -> None:
    prefill, _ = pair
    events = await client.all_events(prefill, "/v1/completions", greedy(max_tokens=1, kv_transfer_params=PREFILL))
    assert all(event == "[DONE]" or "kv_transfer_params" not in event for event in events)
    assert prefill.engine.stranded_blocks > 0


async def test_two_choices_pin_two_sets_of_blocks_and_report_one(pair: Pair, client: Client) -> None:
    prefill, _ = pair
    body = greedy(max_tokens=1, n=2, temperature=1, kv_transfer_params=PREFILL)
    answer = await client.post(prefill, "/v1/completions", body)
    assert answer.json()["kv_transfer_params"]["remote_request_id"].startswith("1_cmpl-")
    assert len(prefill.engine.handoffs) == 2


async def test_a_handoff_read_twice_gives_wrong_text_and_200(pair: Pair, client: Client) -> None:
    prefill, decode = pair
    params = await client.prefill(prefill)
    right = await client.text(decode, kv_transfer_params=params)
    await prefill.wait_for(lambda: prefill.engine.stranded_blocks == 0)
    decode.engine.pool.forget()
    assert await client.text(decode, kv_transfer_params=params) != right
    await prefill.wait_for(lambda: prefill.engine.handoffs.late_notifications == 1)


async def test_an_expired_handoff_gives_wrong_text_and_200(start: Start, client: Client, mixed: Simulator) -> None:
    prefill, decode = await start(lease=0.05), await start()
    params = await client.prefill(prefill)
    await prefill.wait_for(lambda: prefill.engine.handoffs.expired == 1)
    assert prefill.engine.stranded_blocks == 0
    assert await client.text(decode, kv_transfer_params=params) != await client.text(mixed)
    metrics = (await client.get(prefill, "/metrics")).text
    assert 'vllm:nixl_num_kv_expired_reqs_total{engine="0",model_name="sim"} 1.0' in metrics


async def test_blocks_that_were_not_reused_still_read_right(start: Start, client: Client) -> None:
    prefill, decode = await start(stale_reads="memory", blocks=64, max_model_len=512), await start(stale_reads="memory")
    params = await client.prefill(prefill)
    prefill.expire_handoffs()
    right = await client.text(decode, kv_transfer_params=params)
    for number in range(16):
        await client.text(prefill, prompt=f"{number} {PROMPT}", max_tokens=2)
    decode.engine.pool.forget()
    assert await client.text(decode, kv_transfer_params=params) != right


async def test_wrong_kv_stays_in_the_prefix_cache_of_decode(pair: Pair, client: Client, mixed: Simulator) -> None:
    prefill, decode = pair
    params = await client.prefill(prefill)
    prefill.expire_handoffs()
    wrong = await client.text(decode, kv_transfer_params=params)
    assert wrong != await client.text(mixed)
    assert await client.text(decode) != await client.text(mixed)
    await client.post(decode, "/reset_prefix_cache", {})
    assert await client.text(decode) == await client.text(mixed)


async def test_another_prompt_of_as_many_blocks_gives_wrong_text(pair: Pair, client: Client, mixed: Simulator) -> None:
    prefill, decode = pair
    params = await client.prefill(prefill, prompt="stone " * 40)
    other = "light " * 40
    assert await client.text(decode, prompt=other, kv_transfer_params=params) != await client.text(mixed, prompt=other)
    assert decode.alive


async def test_prefills_token_can_be_sent_first_and_decode_goes_on(
    pair: Pair, client: Client, mixed: Simulator
) -> None:
    prefill, decode = pair
    body = chat("x" * 31, return_token_ids=True)
    whole = (await client.post(mixed, "/v1/chat/completions", body)).json()
    leg = (
        await client.post(prefill, "/v1/chat/completions", body | {"max_tokens": 1, "kv_transfer_params": PREFILL})
    ).json()
    ids = leg["prompt_token_ids"] + leg["choices"][0]["token_ids"]
    assert len(leg["prompt_token_ids"]) % 16
    params = leg["kv_transfer_params"] | {"prompt_token_ids": ids}
    rest = (
        await client.post(decode, "/v1/chat/completions", body | {"max_tokens": 11, "kv_transfer_params": params})
    ).json()
    assert leg["choices"][0]["token_ids"] + rest["choices"][0]["token_ids"] == whole["choices"][0]["token_ids"]


async def test_a_stream_is_continued_exactly_from_the_tokens_sent(pair: Pair, client: Client, mixed: Simulator) -> None:
    prefill, decode = pair
    whole = (await client.post(mixed, "/v1/completions", greedy(return_token_ids=True))).json()["choices"][0]
    for cut in (1, 7, 20):
        ids = whole["prompt_token_ids"] + whole["token_ids"][:cut]
        params = await client.prefill(prefill, prompt=ids)
        body = greedy(prompt=ids, max_tokens=24 - cut, return_token_ids=True, kv_transfer_params=params)
        rest = (await client.post(decode, "/v1/completions", body)).json()["choices"][0]
        assert rest["token_ids"] == whole["token_ids"][cut:]


@pytest.mark.parametrize(
    "change",
    [
        lambda params: {"do_remote_prefill": True},
        lambda params: dict.fromkeys(params) | {"do_remote_prefill": True},
        lambda params: params | {"remote_block_ids": []},
        lambda params: params | {"remote_block_ids": [params["remote_block_ids"][0][:1]]},
        lambda params: params | {"remote_block_ids": [[10**6] * len(params["remote_block_ids"][0])]},
    ],
    ids=["alone", "nulls", "no blocks", "too few blocks", "blocks out of range"],
)
async def test_incomplete_parameters_kill_the_decode_engine(pair: Pair, client: Client, change: Any) -> None:
    prefill, decode = pair
    params = change(await client.prefill(prefill))
    answer = await client.post(decode, "/v1/completions", greedy(kv_transfer_params=params))
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "InternalServerError")
    assert (await client.get(decode, "/health")).status_code == 503
    await decode.wait_for(lambda: not decode.alive)
    with pytest.raises(httpx.TransportError):
        await client.get(decode, "/health")


async def test_one_block_more_than_prefill_reported_kills_the_decode_engine(pair: Pair, client: Client) -> None:
    prefill, decode = pair
    ids = list(range(97, 97 + 16))
    params = await client.prefill(prefill, prompt=ids)
    answer = await client.post(decode, "/v1/completions", greedy(prompt=[*ids, 100], kv_transfer_params=params))
    assert answer.status_code == 500
    await decode.wait_for(lambda: not decode.alive)


async def test_a_decode_leg_without_a_request_id_hangs_and_kills_the_engine_when_its_client_disconnects(
    pair: Pair, client: Client
) -> None:
    prefill, decode = pair
    params = await client.prefill(prefill)
    del params["remote_request_id"]
    leg = asyncio.create_task(client.post(decode, "/v1/completions", greedy(kv_transfer_params=params)))
    await decode.wait_for(lambda: decode.engine.loading == 1)
    assert decode.engine.used_blocks > 0
    leg.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await leg
    await decode.wait_for(lambda: decode.engine.dead is not None)
    assert "remote_request_id" in str(decode.engine.dead)


@pytest.mark.parametrize("params", [{}, {"do_remote_prefill": False, "do_remote_decode": False}, None])
async def test_parameters_that_ask_for_nothing_are_computed_locally(
    mixed: Simulator, client: Client, params: Any
) -> None:
    assert await client.text(mixed, kv_transfer_params=params)
    assert mixed.engine.stats.external_kv_transfer == 0
    assert mixed.engine.stranded_blocks == 0


@pytest.mark.parametrize("params", ["a string", [1]])
async def test_parameters_that_are_no_object_are_refused(mixed: Simulator, client: Client, params: Any) -> None:
    answer = await client.post(mixed, "/v1/completions", greedy(kv_transfer_params=params))
    assert answer.status_code == 400
    assert "Input should be a valid dictionary" in answer.json()["error"]["message"]


async def test_a_wrong_request_id_reads_right_but_nothing_is_released(
    pair: Pair, client: Client, mixed: Simulator
) -> None:
    prefill, decode = pair
    params = await client.prefill(prefill) | {"remote_request_id": "cmpl-other"}
    assert await client.text(decode, kv_transfer_params=params) == await client.text(mixed)
    await prefill.wait_for(lambda: prefill.engine.handoffs.late_notifications == 1)
    assert prefill.engine.stranded_blocks > 0


@pytest.mark.parametrize("how", ["killed", "another engine id"])
async def test_a_pull_that_fails_is_500_after_the_handshake_time(pair: Pair, client: Client, how: str) -> None:
    prefill, decode = pair
    params = await client.prefill(prefill)
    if how == "killed":
        prefill.kill()
    else:
        params["remote_engine_id"] = "other"
    began = asyncio.get_running_loop().time()
    answer = await client.post(decode, "/v1/completions", greedy(kv_transfer_params=params))
    assert asyncio.get_running_loop().time() - began >= 0.1
    assert answer.status_code == 500
    assert answer.json() == {
        "error": {"message": "Internal server error", "type": "InternalServerError", "param": None, "code": 500}
    }
    assert decode.alive and decode.engine.used_blocks == 0


async def test_a_pull_from_a_dead_engine_that_was_known_fails_at_once(start: Start, client: Client) -> None:
    prefill, decode = await start(), await start(handshake_timeout=30)
    await client.text(decode, kv_transfer_params=await client.prefill(prefill))
    params = await client.prefill(prefill, prompt="another " * 30)
    prefill.kill()
    answer = await client.post(decode, "/v1/completions", greedy(prompt="another " * 30, kv_transfer_params=params))
    assert answer.status_code == 500


async def test_a_pull_that_fails_while_streaming_is_an_error_event_under_200(pair: Pair, client: Client) -> None:
    prefill, decode = pair
    leg = await client.post(prefill, "/v1/chat/completions", chat(max_tokens=1, kv_transfer_params=PREFILL))
    params = leg.json()["kv_transfer_params"]
    prefill.kill()
    role, error, done = await client.all_events(decode, "/v1/chat/completions", chat(kv_transfer_params=params))
    assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert error["error"]["code"] == 500
    assert done == "[DONE]"


async def test_policy_recompute_computes_locally_instead(start: Start, client: Client, mixed: Simulator) -> None:
    prefill, decode = await start(), await start(load_failure_policy="recompute")
    params = await client.prefill(prefill)
    prefill.kill()
    assert await client.text(decode, kv_transfer_params=params) == await client.text(mixed)
    assert decode.engine.stats.local_compute > 0


async def test_a_decode_leg_closed_while_queued_frees_prefills_blocks(start: Start, client: Client) -> None:
    prefill, decode = await start(), await start(max_num_seqs=1, step_time=0.01)
    params = await client.prefill(prefill)
    busy = asyncio.create_task(client.text(decode, prompt="busy", max_tokens=1000))
    await decode.wait_for(lambda: decode.engine.running == 1)
    leg = asyncio.create_task(client.text(decode, kv_transfer_params=params))
    await decode.wait_for(lambda: decode.engine.waiting == 1)
    leg.cancel()
    await prefill.wait_for(lambda: prefill.engine.stranded_blocks == 0)
    assert prefill.engine.handoffs.released_unread == 1
    assert prefill.engine.handoffs.expired == 0
    busy.cancel()
    await decode.wait_for(lambda: decode.engine.used_blocks == 0)


async def test_a_queued_decode_leg_keeps_its_lease_alive(start: Start, client: Client) -> None:
    prefill, decode = await start(lease=0.3), await start(lease=0.3, max_num_seqs=1, step_time=0.01)
    params = await client.prefill(prefill)
    busy = asyncio.create_task(client.text(decode, prompt="busy", max_tokens=1000))
    await decode.wait_for(lambda: decode.engine.running == 1)
    leg = asyncio.create_task(client.text(decode, kv_transfer_params=params))
    await prefill.wait_for(lambda: prefill.engine.handoffs.renewals >= 10)
    assert prefill.engine.handoffs.expired == 0
    busy.cancel()
    assert await leg
    assert prefill.engine.handoffs.pulled == 1


async def test_a_decode_leg_closed_as_soon_as_it_was_sent_frees_prefills_blocks(pair: Pair, client: Client) -> None:
    prefill, decode = pair
    body = json.dumps(greedy(kv_transfer_params=await client.prefill(prefill))).encode()
    _, writer = await asyncio.open_connection("127.0.0.1", decode.port)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
    writer.close()
    await prefill.wait_for(lambda: prefill.engine.stranded_blocks == 0)
    assert prefill.engine.expired == 0
    await decode.wait_for(lambda: decode.engine.used_blocks == 0)


async def test_a_decode_leg_refused_by_a_full_queue_can_be_taken_elsewhere(
    start: Start, client: Client, mixed: Simulator
) -> None:
    prefill, full, other = await start(), await start(max_num_seqs=1, max_queued=1, step_time=0.01), await start()
    params = await client.prefill(prefill)
    busy = []
    for state in ((1, 0), (1, 1)):
        busy.append(asyncio.create_task(client.text(full, prompt="busy", max_tokens=1000)))
        await full.wait_for(lambda state=state: (full.engine.running, full.engine.waiting) == state)
    answer = await client.post(full, "/v1/completions", greedy(kv_transfer_params=params))
    assert answer.status_code == 503
    assert await client.text(other, kv_transfer_params=params) == await client.text(mixed)
    for leg in busy:
        leg.cancel()
    await asyncio.gather(*busy, return_exceptions=True)


async def test_a_handoff_names_a_host_that_others_can_reach(start: Start, client: Client) -> None:
    assert (await client.prefill(await start(side_host="prefill-0")))["remote_host"] == "prefill-0"
    assert SimulatorConfig(host="0.0.0.0").advertised_host == "localhost"


async def test_a_refused_decode_leg_frees_prefills_blocks(pair: Pair, client: Client) -> None:
    prefill, decode = pair
    params = await client.prefill(prefill)
    answer = await client.post(decode, "/v1/completions", greedy(max_tokens=10**6, kv_transfer_params=params))
    assert answer.status_code == 400
    await prefill.wait_for(lambda: prefill.engine.stranded_blocks == 0)


async def test_mooncake_ascend_hands_off_only_what_ended_by_length(start: Start, client: Client) -> None:
    prefill, decode = await start(connector="mooncake_ascend"), await start(connector="mooncake_ascend")
    leg = greedy(max_tokens=1, kv_transfer_params=PREFILL, return_token_ids=True)
    answer = (await client.post(prefill, "/v1/completions", leg)).json()
    params = answer["kv_transfer_params"]
    assert set(params) == {
        "do_remote_prefill",
        "do_remote_decode",
        "remote_block_ids",
        "remote_engine_id",
        "remote_request_id",
        "remote_host",
        "remote_port",
        "remote_pcp_size",
        "remote_dcp_size",
        "remote_ptp_size",
        "last_token_id",
        "remote_multi_nodes_meta_mapping",
        "num_prompt_blocks",
        "remote_block_size",
    }
    assert await client.text(decode, kv_transfer_params=params)
    stopping = leg | {"stop_token_ids": answer["choices"][0]["token_ids"]}
    answer = (await client.post(prefill, "/v1/completions", stopping)).json()
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["kv_transfer_params"] is None


async def test_an_engine_without_a_connector_makes_no_hand_off(start: Start, client: Client) -> None:
    sim = await start(connector="none")
    answer = await client.post(sim, "/v1/completions", greedy(max_tokens=1, kv_transfer_params=PREFILL))
    assert answer.json()["kv_transfer_params"] is None
    assert sim.engine.stranded_blocks == 0
