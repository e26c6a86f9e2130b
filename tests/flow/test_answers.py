"""The ordinary path: the answer of a pair is that of one engine."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support import Running, chat, completion, pools, running_gateway, simulators, text_of

PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}


def body(endpoint: str, **more: Any) -> dict[str, Any]:
    return chat(**more) if endpoint == "chat" else completion(**more)


async def events(running: Running, path: str, request: dict[str, Any]) -> list[Any]:
    """The payloads of a stream, parsed, `[DONE]` as text."""
    answer = await running.http.post(path, json={**request, "stream": True})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    payloads = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    return [json.loads(p) if p != "[DONE]" else p for p in payloads]


def streamed_text(found: list[Any], index: int = 0) -> str:
    choices = [c for e in found[:-1] for c in e["choices"] if c["index"] == index]
    return "".join(c["text"] if "text" in c else c["delta"].get("content") or "" for c in choices)


@pytest.mark.parametrize("connector", ["nixl", "mooncake_ascend"])
@pytest.mark.parametrize("endpoint", PATHS)
async def test_the_answer_of_a_pair_is_that_of_one_engine(endpoint: str, connector: str) -> None:
    async with (
        simulators("mixed") as [single],
        pools(engine={"connector": connector}, connector=connector) as (running, [p], [d]),
        running_gateway(mixed=[single.url]) as alone,
    ):
        expected = (await alone.http.post(PATHS[endpoint], json=body(endpoint))).json()
        answer = await running.http.post(PATHS[endpoint], json=body(endpoint))
        assert "x-pd-proxy-fallback" not in answer.headers
        assert text_of(answer.json()) == text_of(expected)
        for count in ("prompt_tokens", "completion_tokens", "total_tokens"):
            assert answer.json()["usage"][count] == expected["usage"][count]
        found = await events(running, PATHS[endpoint], body(endpoint))
        assert streamed_text(found) == text_of(expected)
        assert found[-1] == "[DONE]"
        assert d.engine.handoffs is not None and p.engine.stranded_blocks == 0
        assert [r.body["max_tokens"] for r in p.requests if r.path.startswith("/v1/c")] == [1, 1]
        assert running.idle()


async def test_only_a_client_that_asked_for_it_gets_the_closing_usage_event() -> None:
    async with pools() as (running, _, _):
        plain = await events(running, PATHS["chat"], chat())
        asked = await events(running, PATHS["chat"], chat(stream_options={"include_usage": True}))
        assert all("usage" not in e or e["usage"] is None for e in plain[:-1])
        assert all(e["choices"] for e in plain[:-1])
        assert asked[-2]["choices"] == [] and asked[-2]["usage"]["completion_tokens"] == 20
        metrics = await running.metrics()
        assert metrics['pd_proxy_tokens_total{kind="completion",model="sim"}'] == 40


async def test_several_prompts_and_several_choices_are_answered_whole_by_one_backend() -> None:
    async with (
        simulators("mixed") as [single],
        pools() as (running, [p], _),
        running_gateway(mixed=[single.url]) as alone,
    ):
        for request in (
            completion(["one prompt", "another prompt", "a third"]),
            completion(n=3, temperature=1.0, seed=7),
            completion([[1, 2, 3], [4, 5, 6]]),
        ):
            expected = (await alone.http.post(PATHS["completions"], json=request)).json()
            answer = await running.http.post(PATHS["completions"], json=request)
            assert answer.headers["x-pd-proxy-fallback"] in ("prompt_list", "n")
            assert [c["index"] for c in answer.json()["choices"]] == [c["index"] for c in expected["choices"]]
            assert [c["text"] for c in answer.json()["choices"]] == [c["text"] for c in expected["choices"]]
            assert answer.json()["usage"] == expected["usage"]
            found = await events(running, PATHS["completions"], request)
            for choice in expected["choices"]:
                assert streamed_text(found, choice["index"]) == choice["text"]
        assert not [r for r in p.requests if r.path.startswith("/v1/c")], "nothing may be pinned on prefill"


async def test_one_prompt_in_a_list_goes_through_the_pair() -> None:
    async with pools() as (running, [p], _):
        answer = await running.http.post(PATHS["completions"], json=completion(["only one"]))
        assert "x-pd-proxy-fallback" not in answer.headers
        assert text_of(answer.json()) == text_of(
            (await running.http.post(PATHS["completions"], json=completion("only one"))).json()
        )
        assert len([r for r in p.requests if r.path == PATHS["completions"]]) == 2


async def test_unknown_fields_reach_both_engines_and_hand_off_fields_of_a_client_reach_none() -> None:
    request = chat(
        some_new_field={"a": [1, 2.5, None]},
        kv_transfer_params={"do_remote_prefill": True, "remote_host": "203.0.113.9"},
        ec_transfer_params={"x": 1},
        bootstrap_host="203.0.113.9",
        request_id="mine",
        vllm_xargs={"keep": 1, "kv_transfer_params": "x"},
    )
    async with pools() as (running, [p], [d]):
        answer = await running.http.post(PATHS["chat"], json=request, headers={"x-request-id": "my-id"})
        assert answer.status_code == 200
        assert answer.headers["x-request-id"] == "my-id"
        assert "transfer_params" not in answer.text
        for engine in (p, d):
            [seen] = [r for r in engine.requests if r.path == PATHS["chat"]]
            assert seen.body["some_new_field"] == {"a": [1, 2.5, None]}
            assert seen.body["vllm_xargs"] == {"keep": 1}
            assert "203.0.113.9" not in json.dumps(seen.body)
            assert not {"ec_transfer_params", "bootstrap_host", "request_id"} & seen.body.keys()
            assert seen.headers["x-request-id"] not in ("my-id", "mine")
            assert "authorization" not in seen.headers


async def test_mixed_backends_alone_need_no_pair_and_count_no_fallback() -> None:
    async with simulators("mixed", "mixed") as engines, running_gateway(mixed=[e.url for e in engines]) as running:
        answer = await running.http.post(PATHS["chat"], json=chat())
        assert answer.status_code == 200 and "x-pd-proxy-fallback" not in answer.headers


async def test_prefill_and_decode_carry_the_same_prompt() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    request = chat(tools=tools, tool_choice="auto", chat_template_kwargs={"enable_thinking": False}, stop=["zzz"])
    async with pools() as (running, [p], [d]):
        assert (await running.http.post(PATHS["chat"], json=request)).status_code == 200
        [prefill] = [r.body for r in p.requests if r.path == PATHS["chat"]]
        [decode] = [r.body for r in d.requests if r.path == PATHS["chat"]]
        for name in ("messages", "tools", "tool_choice", "chat_template_kwargs"):
            assert prefill[name] == decode[name] == request[name]
        assert prefill["stream"] is False and prefill["max_tokens"] == 1 and "stop" not in prefill
        assert decode["stop"] == ["zzz"] and decode["max_tokens"] == 20
