"""What simulated TensorRT-LLM context and generation servers accept and refuse."""

from __future__ import annotations

import asyncio
import base64
import struct
from typing import Any

import pytest
from pd_proxy_simulator import Simulator

from .helpers import Client, Start, chat, greedy, start_pair

ASKED = {"request_type": "context_only", "disagg_request_id": 1 << 62, "schedule_style": 0}
PATH = "/v1/completions"


async def context(client: Client, sim: Simulator, path: str = PATH, **body: Any) -> dict[str, Any]:
    made = greedy(**body) if path == PATH else chat(**body)
    answer = await client.post(sim, path, made | {"disaggregated_params": ASKED})
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


def generation(told: dict[str, Any], **more: Any) -> dict[str, Any]:
    params = told["choices"][0]["disaggregated_params"]
    return {"disaggregated_params": {**params, "request_type": "generation_only", "ctx_usage": told["usage"], **more}}


async def test_a_pair_answers_as_one_server_does(start: Start, client: Client) -> None:
    p, d = await start_pair(start, "tensorrt_llm")
    expected = await client.text(await start())
    told = await context(client, p)
    choice = told["choices"][0]
    assert choice["finish_reason"] == "length" and told["usage"]["completion_tokens"] == 1
    assert "kv_transfer_params" not in told and p.engine.stranded_blocks > 0
    answer = await client.post(d, PATH, greedy(prompt=told["prompt_token_ids"]) | generation(told))
    assert answer.json()["choices"][0]["text"] == expected
    assert answer.json()["choices"][0]["disaggregated_params"] is None
    await p.wait_for(lambda: p.engine.used_blocks == 0)


@pytest.mark.parametrize("packed", [False, True])
async def test_a_chat_is_continued_from_the_ids_in_its_parameters(start: Start, client: Client, packed: bool) -> None:
    p, d = await start_pair(start, "tensorrt_llm")
    whole = await client.post(await start(), "/v1/chat/completions", chat())
    told = await context(client, p, "/v1/chat/completions")
    ids = told["prompt_token_ids"]
    given: dict[str, Any] = {"prompt_token_ids": ids}
    if packed:
        given = {"prompt_token_ids_b64": base64.b64encode(struct.pack(f"<{len(ids)}i", *ids)).decode()}
    body = chat() | {"messages": [{"role": "user", "content": "not read"}]} | given | generation(told)
    answer = await client.post(d, "/v1/chat/completions", body)
    assert answer.json()["choices"][0]["message"] == whole.json()["choices"][0]["message"]


async def test_the_first_token_is_the_one_in_the_generation_servers_parameters(start: Start, client: Client) -> None:
    p, d = await start_pair(start, "tensorrt_llm")
    told = await context(client, p)
    right = await client.post(d, PATH, greedy() | generation(told))
    d.engine.pool.forget()
    told = await context(client, p)
    first = told["choices"][0]["disaggregated_params"]["first_gen_tokens"][0]
    wrong = await client.post(d, PATH, greedy() | generation(told, first_gen_tokens=[first + 1]))
    assert wrong.json()["choices"][0]["text"] != right.json()["choices"][0]["text"]


async def test_an_answer_that_ends_in_the_context_phase_keeps_nothing(start: Start, client: Client) -> None:
    p, _ = await start_pair(start, "tensorrt_llm")
    told = await context(client, p)
    token = told["choices"][0]["disaggregated_params"]["first_gen_tokens"][0]
    p.expire_handoffs()
    told = await context(client, p, stop_token_ids=[token])
    assert told["choices"][0]["finish_reason"] == "stop"
    assert told["choices"][0]["disaggregated_params"] is None
    assert p.engine.used_blocks == 0


@pytest.mark.parametrize(
    "params",
    [
        "x",
        {},
        {"request_type": "decode_only"},
        {"request_type": "context_only", "schedule_style": 0},
        {"request_type": "context_only", "disagg_request_id": 1},
        {**ASKED, "disagg_request_id": "1"},
    ],
)
async def test_an_incomplete_context_request_is_refused(start: Start, client: Client, params: object) -> None:
    p, _ = await start_pair(start, "tensorrt_llm")
    answer = await client.post(p, PATH, greedy() | {"disaggregated_params": params})
    assert (answer.status_code, answer.json()["object"]) == (400, "error")


@pytest.mark.parametrize("more", [{"stream": True}, {"n": 2, "temperature": 1}])
async def test_a_context_request_has_one_choice_in_one_piece(start: Start, client: Client, more: Any) -> None:
    p, _ = await start_pair(start, "tensorrt_llm")
    assert (await client.post(p, PATH, greedy(**more) | {"disaggregated_params": ASKED})).status_code == 400


@pytest.mark.parametrize(
    "name", ["ctx_request_id", "disagg_request_id", "first_gen_tokens", "encoded_opaque_state", "ctx_usage"]
)
async def test_an_incomplete_generation_request_fails(start: Start, client: Client, name: str) -> None:
    p, d = await start_pair(start, "tensorrt_llm")
    body = generation(await context(client, p))
    del body["disaggregated_params"][name]
    answer = await client.post(d, PATH, greedy() | body)
    assert answer.status_code >= 400 and answer.json()["object"] == "error"


async def test_kv_can_be_fetched_only_once(start: Start, client: Client) -> None:
    p, d = await start_pair(start, "tensorrt_llm", lease=0.3)
    body = greedy() | generation(await context(client, p))
    assert (await client.post(d, PATH, body)).status_code == 200
    d.engine.pool.forget()
    assert (await client.post(d, PATH, body)).status_code == 500


async def test_the_kv_of_another_prompt_gives_wrong_text(start: Start, client: Client) -> None:
    p, d = await start_pair(start, "tensorrt_llm")
    other = "quite another prompt of some length " * 8
    right = await client.text(await start(), prompt=other)
    told = await context(client, p)
    answer = await client.post(d, PATH, greedy(prompt=other) | generation(told))
    assert answer.status_code != 200 or answer.json()["choices"][0]["text"] != right


async def test_a_context_server_frees_kv_that_is_not_fetched(start: Start, client: Client) -> None:
    p, _ = await start_pair(start, "tensorrt_llm", lease=0.1)
    await context(client, p)
    await p.wait_for(lambda: p.engine.expired == 1 and p.engine.used_blocks == 0)


async def test_an_ordinary_request_is_served_by_either_server(start: Start, client: Client) -> None:
    p, d = await start_pair(start, "tensorrt_llm")
    assert await asyncio.gather(client.text(p), client.text(d)) == [await client.text(await start())] * 2


async def test_a_server_with_a_key_requires_signed_parameters(start: Start, client: Client) -> None:
    p, d = await start(role="prefill", connector="tensorrt_llm"), await start(connector="tensorrt_llm", handoff_key="k")
    body = greedy() | generation(await context(client, p))
    assert (await client.post(d, PATH, body)).status_code == 400
    forged = await client.post(d, PATH, body, **{"x-trtllm-disagg-auth": "sha256=" + "0" * 64})
    assert forged.status_code == 400
