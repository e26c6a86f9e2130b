"""Messages, responses and tokens in, tokens out, as vLLM 0.32 accepts, refuses and answers them."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from pd_proxy_simulator import Simulator

from .helpers import PREFILL, Client, Start, chat

TEXT = "tell me of the river"
TOOL = {"name": "go", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}


def message(**body: Any) -> dict[str, Any]:
    return {
        "model": "sim",
        "messages": [{"role": "user", "content": TEXT}],
        "max_tokens": 12,
        "temperature": 0,
    } | body


def response(**body: Any) -> dict[str, Any]:
    return {"model": "sim", "input": TEXT, "max_output_tokens": 12, "temperature": 0} | body


async def prompt_of(sim: Simulator, client: Client) -> list[int]:
    body = {"messages": chat()["messages"]}
    tokens: list[int] = (await client.post(sim, "/tokenize", body)).json()["tokens"]
    return tokens


async def test_the_same_words_make_the_same_prompt_on_every_route(start: Start, client: Client) -> None:
    sim = await start(scale_out=True)
    said = (await client.post(sim, "/v1/chat/completions", chat())).json()["choices"][0]["message"]["content"]
    assert (await client.post(sim, "/v1/messages", message())).json()["content"] == [{"type": "text", "text": said}]
    answer = (await client.post(sim, "/v1/responses", response())).json()
    assert answer["output"][0]["content"][0]["text"] == said
    ids = await prompt_of(sim, client)
    body = {"token_ids": ids, "output_mode": "text", "sampling_params": {"max_tokens": 12, "temperature": 0}}
    choice = (await client.post(sim, "/inference/v1/generate", body)).json()["choices"][0]
    assert (choice["text"], len(choice["token_ids"])) == (said, 12)


async def test_a_system_prompt_and_tools_make_the_same_prompt_as_in_chat(mixed: Simulator, client: Client) -> None:
    function = {"name": "go", "parameters": TOOL["input_schema"]}
    words = [{"role": "system", "content": "be brief"}, *chat()["messages"]]
    body = chat(messages=words, tools=[{"type": "function", "function": function}], tool_choice="none")
    said = (await client.post(mixed, "/v1/chat/completions", body)).json()["choices"][0]["message"]["content"]
    body = message(system="be brief", tools=[TOOL], tool_choice={"type": "none"})
    assert (await client.post(mixed, "/v1/messages", body)).json()["content"][0]["text"] == said
    body = response(instructions="be brief", tools=[{"type": "function", **function}], tool_choice="none")
    assert (await client.post(mixed, "/v1/responses", body)).json()["output"][0]["content"][0]["text"] == said


async def test_messages_stream_anthropics_events_in_order(mixed: Simulator, client: Client) -> None:
    events = await client.all_events(mixed, "/v1/messages", message())
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert events[-2]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert events[-2]["usage"]["output_tokens"] == 12


async def test_responses_number_their_events_and_end_with_the_whole_response(mixed: Simulator, client: Client) -> None:
    events = await client.all_events(mixed, "/v1/responses", response(request_id="resp_mine"))
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] for event in events[:4]] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    last = events[-1]
    assert last["type"] == "response.completed"
    assert (last["response"]["id"], last["response"]["status"]) == ("resp_mine", "incomplete")
    text = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    assert last["response"]["output"][0]["content"][0]["text"] == text


async def test_each_route_gives_and_takes_hand_offs(start: Start, client: Client) -> None:
    p, d = await start(role="prefill", scale_out=True), await start(role="decode", scale_out=True)
    legs: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("/v1/messages", message(), {"max_tokens": 1}),
        ("/v1/responses", response(input="of the harbour"), {"max_output_tokens": 1}),
        (
            "/inference/v1/generate",
            {"token_ids": list(range(300, 360)), "sampling_params": {"max_tokens": 4}},
            {"sampling_params": {"max_tokens": 1}},
        ),
    ]
    for pulls, (path, body, bound) in enumerate(legs, 1):
        answer = await client.post(p, path, body | bound | {"kv_transfer_params": PREFILL})
        params = answer.json()["kv_transfer_params"]
        assert params["do_remote_prefill"] is True
        answer = await client.post(d, path, body | {"kv_transfer_params": params})
        assert answer.status_code == 200, answer.text
        assert d.engine.stats.pulls == pulls
    assert d.engine.stats.local_compute == 0


async def test_generate_takes_a_hand_off_among_the_sampling_parameters(start: Start, client: Client) -> None:
    """vLLM does so too, which is why the gateway removes a client's hand-off parameters there."""
    sim = await start(scale_out=True)
    body = {
        "token_ids": [300, 301],
        "sampling_params": {"max_tokens": 1, "extra_args": {"kv_transfer_params": PREFILL}},
    }
    answer = await client.post(sim, "/inference/v1/generate", body)
    assert answer.json()["kv_transfer_params"]["remote_block_ids"]


REFUSED: list[tuple[str, dict[str, Any], bool]] = [
    ("/v1/messages", message(max_tokens=0), False),
    ("/v1/messages", {"model": "sim", "messages": []}, False),
    ("/v1/messages", message(messages="hello"), False),
    ("/v1/messages", message(messages=[{"role": "tool", "content": "a"}]), False),
    ("/v1/messages", message(thinking={"type": "enabled", "budget_tokens": 2000}), False),
    ("/v1/messages", message(tool_choice={"type": "some"}, tools=[TOOL]), True),
    ("/v1/messages", message(max_tokens=10**6), True),
    ("/v1/responses", {"model": "sim"}, False),
    ("/v1/responses", response(prompt={"id": "p"}), False),
    ("/v1/responses", response(background=True, store=False), False),
    ("/v1/responses", response(background=True), True),
    ("/inference/v1/generate", {"token_ids": [1]}, False),
    ("/inference/v1/generate", {"token_ids": [], "sampling_params": {}}, False),
    ("/inference/v1/generate", {"token_ids": [-1], "sampling_params": {}}, False),
    ("/inference/v1/generate", {"token_ids": [10**7], "sampling_params": {}}, True),
]


@pytest.mark.parametrize(("path", "body", "late"), REFUSED)
async def test_requests_that_vllm_refuses_are_refused(
    start: Start, client: Client, path: str, body: Any, late: bool
) -> None:
    sim = await start(scale_out=True)
    answer = await client.post(sim, path, body)
    assert answer.status_code == 400, answer.text
    # A request that is refused before the handler gets OpenAI's error shape on every route.
    anthropic = path == "/v1/messages" and "type" in answer.json()
    assert anthropic is (path == "/v1/messages" and late and "tool_choice" not in body)


async def test_a_tool_call_that_was_cut_short_is_refused(mixed: Simulator, client: Client) -> None:
    forced = {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "go"}}
    answer = await client.post(mixed, "/v1/messages", message(max_tokens=1, **forced))
    assert (answer.status_code, answer.json()["type"]) == (400, "error")
    answer = await client.post(mixed, "/v1/messages", message(max_tokens=1, tools=[TOOL], tool_choice={"type": "any"}))
    assert answer.json()["content"] == [{"type": "text", "text": ""}]
    [call] = (await client.post(mixed, "/v1/messages", message(max_tokens=400, **forced))).json()["content"]
    assert call["type"] == "tool_use" and isinstance(call["input"]["city"], str)


async def test_generate_and_the_store_of_responses_are_off_by_default(mixed: Simulator, client: Client) -> None:
    answer = await client.post(mixed, "/inference/v1/generate", {"token_ids": [1], "sampling_params": {}})
    assert (answer.status_code, answer.json()["error"]["type"]) == (403, "PermissionDeniedError")
    made = (await client.post(mixed, "/v1/responses", response())).json()
    assert (await client.get(mixed, f"/v1/responses/{made['id']}")).status_code == 404


async def test_stored_responses_last_as_long_as_their_engine(start: Start, client: Client) -> None:
    sim = await start(responses_store=True)
    made = (await client.post(sim, "/v1/responses", response())).json()
    assert (await client.get(sim, f"/v1/responses/{made['id']}")).json() == made
    more = (await client.post(sim, "/v1/responses", response(previous_response_id=made["id"]))).json()
    assert more["usage"]["input_tokens"] > made["usage"]["input_tokens"] + 12
    await sim.restart()
    assert (await client.get(sim, f"/v1/responses/{made['id']}")).status_code == 404
    assert (await client.post(sim, "/v1/responses", response(previous_response_id=made["id"]))).status_code == 404


async def test_a_failed_stream_of_messages_has_an_error_event_and_one_of_responses_breaks_off(
    mixed: Simulator, client: Client
) -> None:
    mixed.faults.add("die_mid_stream", after_tokens=3, ending="error")
    events = await client.all_events(mixed, "/v1/messages", message())
    assert events[-1]["type"] == "error" and "Internal server error" in json.dumps(events[-1])
    with pytest.raises(httpx.RemoteProtocolError):
        await client.all_events(mixed, "/v1/responses", response())
