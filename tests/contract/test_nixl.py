"""The properties of NixlConnector: decode receives prefill's token ids, and both legs name a rank."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pd_proxy_simulator import Simulator

from tests.contract.answers import PATHS, body, text_of_one, text_of_stream
from tests.contract.cases import CASES, fleet
from tests.support import chat, completion, running_gateway, simulators, text_of

NIXL = next(case for case in CASES if case.name == "nixl")
BOTH = pytest.mark.parametrize("endpoint", PATHS)
STREAMED = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
# prefill's token would make each decode leg a continuation, which has ids in any case
DECODES = {"first_token": "decode"}
TOOL = {"type": "function", "function": {"name": "measure", "parameters": {"type": "object", "properties": {}}}}


def prompt_at(engine: Simulator) -> Any:
    """The token ids that a decode engine's only request had in place of its text; None where it had none."""
    (request,) = engine.requests
    if request.path == PATHS["completions"]:
        return request.body["prompt"] if isinstance(request.body["prompt"], list) else None
    return request.body["kv_transfer_params"].get("prompt_token_ids")


async def ids_of(endpoint: str) -> list[int]:
    """The prompt's ids, as one engine tokenizes them."""
    async with simulators("mixed") as [single], running_gateway(mixed=[single.url]) as alone:
        answer = (await alone.http.post(PATHS[endpoint], json=body(endpoint, return_token_ids=True))).json()
        found: list[int] = answer.get("prompt_token_ids") or answer["choices"][0]["prompt_token_ids"]
        return found


@BOTH
@STREAMED
async def test_decode_receives_the_prompt_as_prefill_tokenised_it(endpoint: str, stream: bool) -> None:
    async with fleet(NIXL, **DECODES) as (running, [_], [d]):
        answer = await running.http.post(PATHS[endpoint], json=body(endpoint, stream=stream))
        assert prompt_at(d) == await ids_of(endpoint)
        said = text_of_stream(answer.text) if stream else text_of(answer.json())
        assert said == await text_of_one(endpoint)
        assert "token_ids" not in answer.text.replace('"token_ids":null', "").replace('"prompt_token_ids":null', "")
        assert d.engine.pulls == 1


@BOTH
async def test_reuse_of_token_ids_can_be_turned_off(endpoint: str) -> None:
    async with fleet(NIXL, reuse_tokens=False, resume="off", **DECODES) as (running, [p], [d]):
        answer = await running.http.post(PATHS[endpoint], json=body(endpoint))
        assert text_of(answer.json()) == await text_of_one(endpoint)
        assert prompt_at(d) is None
        assert "return_token_ids" not in p.requests[0].body


@BOTH
async def test_a_client_that_asks_for_ids_receives_those_of_its_prompt(endpoint: str) -> None:
    async with fleet(NIXL, **DECODES) as (running, [_], [d]):
        answer = (await running.http.post(PATHS[endpoint], json=body(endpoint, return_token_ids=True))).json()
        given = answer.get("prompt_token_ids") or answer["choices"][0]["prompt_token_ids"]
        assert given == prompt_at(d) == await ids_of(endpoint)
        assert len(answer["choices"][0]["token_ids"]) == answer["usage"]["completion_tokens"]


async def test_tools_are_checked_and_called_with_reused_token_ids() -> None:
    forced = {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "measure"}}}
    async with fleet(NIXL) as (running, [_], [d]):
        answer = (await running.http.post(PATHS["chat"], json=chat(max_tokens=200, **forced))).json()
        assert prompt_at(d)
        assert answer["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "measure"
        wrong = {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "another"}}}
        assert (await running.http.post(PATHS["chat"], json=chat(**wrong))).status_code == 400


async def test_images_are_processed_by_each_engine_itself() -> None:
    parts = [{"type": "text", "text": "what is it?"}, {"type": "image_url", "image_url": {"url": "data:,"}}]
    async with fleet(NIXL) as (running, [_], [d]):
        answer = await running.http.post(PATHS["chat"], json=chat(messages=[{"role": "user", "content": parts}]))
        assert answer.status_code == 200
        assert prompt_at(d) is None
        assert d.engine.pulls == 1


async def test_a_prompt_of_token_ids_stays_unchanged() -> None:
    async with fleet(NIXL, **DECODES) as (running, [p], [d]):
        await running.http.post(PATHS["completions"], json=completion([300, 301, 302] * 20))
        assert "return_token_ids" not in p.requests[0].body
        assert prompt_at(d) == [300, 301, 302] * 20


async def test_the_least_loaded_rank_of_each_engine_is_named_on_its_leg() -> None:
    async with simulators("prefill", "decode", prefill_rate=100.0) as [p, d]:
        places = [{"backend": p.url, "dp": 2}, {"backend": d.url, "dp": 3}]
        async with running_gateway([p.url], [d.url], locations=places) as running:
            backends = {backend.role: backend for backend in running.gateway.fleet}
            backends["prefill"].ranks[0] += 1000
            backends["decode"].ranks[0] += 1000
            backends["decode"].ranks[1] += 500
            answer = await running.http.post(PATHS["chat"], json=chat(stream=True))
            assert text_of_stream(answer.text) == await text_of_one("chat")
            assert p.requests[0].headers["x-data-parallel-rank"] == "1"
            assert d.requests[0].headers["x-data-parallel-rank"] == "2"
            assert backends["prefill"].ranks == [1000, 0]
            assert backends["decode"].ranks == [1000, 500, 0]


async def test_a_leg_to_an_engine_of_one_rank_names_no_rank() -> None:
    async with fleet(NIXL) as (running, [p], [d]):
        await running.http.post(PATHS["chat"], json=chat())
        assert not any("x-data-parallel-rank" in json.dumps(r.headers) for r in (*p.requests, *d.requests))
