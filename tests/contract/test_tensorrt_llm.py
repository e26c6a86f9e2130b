"""The properties of TensorRT-LLM, over sockets."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.contract.answers import PATHS, body, text_of_one, text_of_stream
from tests.contract.cases import CASES, fleet
from tests.support import chat, completion, running_gateway, simulators, text_of, until

CASE = next(case for case in CASES if case.name == "tensorrt_llm")


async def first_token(endpoint: str) -> int:
    """The first token that an engine generates for the test's prompt."""
    async with simulators("mixed") as [single], running_gateway(mixed=[single.url]) as alone:
        request = body(endpoint, return_token_ids=True)
        answer = (await alone.http.post(PATHS[endpoint], json=request)).json()
        token: int = answer["choices"][0]["token_ids"][0]
        return token


@pytest.mark.parametrize("endpoint", PATHS)
async def test_both_legs_know_the_request_by_one_id_and_the_prompt_by_its_tokens(endpoint: str) -> None:
    async with fleet(CASE) as (running, [p], [d]):
        assert (await running.http.post(PATHS[endpoint], json=body(endpoint))).status_code == 200
        asked, told = p.requests[0].body, d.requests[0].body
        request_id = asked["disaggregated_params"]["disagg_request_id"]
        assert told["disaggregated_params"]["disagg_request_id"] == request_id >= 1 << 62
        assert told["disaggregated_params"]["ctx_usage"]["completion_tokens"] == 1
        assert asked["max_tokens"] == told["max_tokens"] == 20
        ids = told["prompt_token_ids"] if endpoint == "chat" else told["prompt"][0]
        assert all(type(token) is int for token in ids)


@pytest.mark.parametrize("endpoint", PATHS)
@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_of_one_token_comes_from_the_context_server(endpoint: str, stream: bool) -> None:
    ending: dict[str, Any] = {"stop_token_ids": [await first_token(endpoint)]}
    more = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    async with simulators("mixed") as [single], running_gateway(mixed=[single.url], resume="off") as alone:
        expected = await alone.http.post(PATHS[endpoint], json=body(endpoint, **ending, **more))
    async with fleet(CASE) as (running, [p], [d]):
        answer = await running.http.post(PATHS[endpoint], json=body(endpoint, **ending, **more))
        assert answer.status_code == 200
        assert len(p.requests) == 1 and not d.requests
        assert "disaggregated_params" not in answer.text
        if stream:
            assert text_of_stream(answer.text) == text_of_stream(expected.text)
            assert finishes(answer.text) == finishes(expected.text) == ["stop"]
            assert usages(answer.text) == usages(expected.text) != []
        else:
            mine, theirs = answer.json()["choices"][0], expected.json()["choices"][0]
            assert mine == theirs
            assert answer.json()["usage"] == expected.json()["usage"]
        await until(running.idle)
        assert p.engine.used_blocks == 0
        found = await running.metrics()
        assert found['pd_proxy_first_tokens_total{reason="whole",source="prefill"}'] == 1


def chunks(text: str) -> list[dict[str, Any]]:
    lines = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def finishes(text: str) -> list[str]:
    return [c["finish_reason"] for chunk in chunks(text) for c in chunk["choices"] if c["finish_reason"]]


def usages(text: str) -> list[int]:
    return [chunk["usage"]["completion_tokens"] for chunk in chunks(text) if chunk.get("usage")]


async def test_without_usable_parameters_the_generation_server_computes_the_prompt_itself() -> None:
    expected = await text_of_one("completions")
    async with fleet(CASE, engine={"lease": 0.5}) as (running, [p], [d]):
        p.faults.add("drop_handoff_params", leg="prefill")
        answer = await running.http.post(PATHS["completions"], json=completion())
        assert text_of(answer.json()) == expected
        assert answer.headers["x-pd-proxy-fallback"] == "handoff_invalid"
        assert [request.leg for request in d.requests] == ["local"]
        rejecting = {"fallback": "reject"}
        async with running_gateway([p.url], [d.url], **CASE.gateway([p, d]), **rejecting) as strict:
            assert (await strict.http.post(PATHS["completions"], json=completion())).status_code == 502


@pytest.mark.parametrize("request_", [completion(["a", "b"]), completion(n=2, temperature=1)])
async def test_several_prompts_or_choices_go_whole_to_one_server(request_: dict[str, Any]) -> None:
    async with fleet(CASE) as (running, [p], [d]):
        answer = await running.http.post(PATHS["completions"], json=request_)
        assert len(answer.json()["choices"]) == 2
        assert answer.headers["x-pd-proxy-fallback"] in ("prompt_list", "n")
        assert "disaggregated_params" not in answer.text
        assert not p.requests and [request.leg for request in d.requests] == ["local"]


async def test_hand_offs_are_signed_with_the_key_that_the_servers_share() -> None:
    async with fleet(CASE, engine={"handoff_key": "shared"}, handoff_key="shared") as (running, _, [d]):
        answer = await running.http.post(PATHS["chat"], json=chat())
        assert answer.status_code == 200 and "x-pd-proxy-fallback" not in answer.headers
        assert d.requests[0].headers["x-trtllm-disagg-auth"].startswith("sha256=")
    async with fleet(CASE, engine={"handoff_key": "shared"}, handoff_key="another") as (running, _, _):
        assert (await running.http.post(PATHS["chat"], json=chat())).status_code == 400


async def test_tensorrt_llm_backends_are_served_like_others() -> None:
    async with fleet(CASE, kind="tensorrt_llm") as (running, _, [d]):
        assert (await running.http.post(PATHS["chat"], json=chat())).status_code == 200
        assert [request.leg for request in d.requests] == ["decode"]


async def test_a_bad_request_is_a_client_error_in_openais_shape() -> None:
    async with fleet(CASE) as (running, _, [d]):
        answer = await running.http.post(PATHS["chat"], json=chat(max_tokens=10**6))
        assert answer.status_code == 400 and not d.requests
        assert set(answer.json()) == {"error"} and "context length" in answer.json()["error"]["message"]


async def test_a_try_after_a_failed_one_has_another_request_id() -> None:
    async with fleet(CASE, decode=2, engine={"lease": 0.5}) as (running, [p], decode):
        for engine in decode:
            engine.faults.add("status", leg="decode", status=500, count=1)
        assert (await running.http.post(PATHS["completions"], json=completion())).status_code == 200
        ids = [request.body["disaggregated_params"]["disagg_request_id"] for request in p.requests]
        assert len(set(ids)) == len(ids) >= 2
