from __future__ import annotations

import json
from typing import Any

import pytest
from pd_proxy_simulator import Simulator
from pd_proxy_simulator.tokens import detokenize

from .helpers import Client, Start, chat, greedy

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer", "minimum": 1, "maximum": 5},
                "unit": {"enum": ["celsius", "fahrenheit"]},
            },
        },
    },
}


async def test_a_stream_has_the_text_of_the_whole_answer(mixed: Simulator, client: Client) -> None:
    whole = (await client.post(mixed, "/v1/chat/completions", chat(max_tokens=80))).json()
    events = await client.all_events(mixed, "/v1/chat/completions", chat(max_tokens=80))
    assert events.pop() == "[DONE]"
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert len(events) == 81
    deltas = [event["choices"][0]["delta"]["content"] for event in events]
    assert "".join(deltas) == whole["choices"][0]["message"]["content"]
    assert "" in deltas[1:], "some tokens hold back an incomplete character"
    assert [event["choices"][0]["finish_reason"] for event in events[-2:]] == [None, "length"]


async def test_token_ids_sit_where_vllm_puts_them_in_chat(mixed: Simulator, client: Client) -> None:
    body = chat(return_token_ids=True)
    whole = (await client.post(mixed, "/v1/chat/completions", body)).json()
    events = (await client.all_events(mixed, "/v1/chat/completions", body))[:-1]
    assert events[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    assert all("prompt_token_ids" not in event for event in events[1:])
    ids = [token for event in events[1:] for token in event["choices"][0]["token_ids"]]
    assert ids == whole["choices"][0]["token_ids"]
    assert detokenize(ids).startswith(whole["choices"][0]["message"]["content"])


async def test_token_ids_sit_where_vllm_puts_them_in_completions(mixed: Simulator, client: Client) -> None:
    body = greedy(return_token_ids=True)
    whole = (await client.post(mixed, "/v1/completions", body)).json()["choices"][0]
    events = (await client.all_events(mixed, "/v1/completions", body))[:-1]
    assert events[0]["choices"][0]["prompt_token_ids"] == whole["prompt_token_ids"]
    assert events[1]["choices"][0]["prompt_token_ids"] is None
    assert [token for event in events for token in event["choices"][0]["token_ids"]] == whole["token_ids"]


async def test_usage_comes_last_and_on_every_chunk_if_asked_for(mixed: Simulator, client: Client) -> None:
    body = chat(stream_options={"include_usage": True})
    events = await client.all_events(mixed, "/v1/chat/completions", body)
    assert events[-2]["choices"] == []
    assert events[-2]["usage"]["completion_tokens"] == 12
    assert "usage" not in events[-3]
    body = chat(stream_options={"include_usage": True, "continuous_usage_stats": True})
    events = await client.all_events(mixed, "/v1/chat/completions", body)
    assert [event["usage"]["completion_tokens"] for event in events[:-2]] == list(range(13))


async def test_request_ids_are_made_from_the_header(mixed: Simulator, client: Client) -> None:
    answer = await client.post(mixed, "/v1/chat/completions", chat(), **{"X-Request-Id": "abc"})
    assert answer.json()["id"] == "chatcmpl-abc"
    assert "x-request-id" not in answer.headers
    answer = await client.post(mixed, "/v1/completions", greedy(request_id="def"))
    assert answer.json()["id"] == "cmpl-def"


async def test_max_completion_tokens_wins(mixed: Simulator, client: Client) -> None:
    answer = await client.post(mixed, "/v1/chat/completions", chat(max_tokens=1, max_completion_tokens=5))
    assert answer.json()["usage"]["completion_tokens"] == 5
    body = greedy()
    del body["max_tokens"]
    assert (await client.post(mixed, "/v1/completions", body)).json()["usage"]["completion_tokens"] == 16


async def test_a_stop_string_is_left_out_and_named(mixed: Simulator, client: Client) -> None:
    text = await client.text(mixed)
    stop = text.split()[5]
    body = greedy(stop=[stop])
    choice = (await client.post(mixed, "/v1/completions", body)).json()["choices"][0]
    assert choice["text"] == text[: text.index(stop)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    events = (await client.all_events(mixed, "/v1/completions", body))[:-1]
    assert "".join(event["choices"][0]["text"] for event in events) == choice["text"]
    assert events[-1]["choices"][0]["stop_reason"] == stop
    body = greedy(stop=stop, include_stop_str_in_output=True)
    choice = (await client.post(mixed, "/v1/completions", body)).json()["choices"][0]
    assert choice["text"] == text[: text.index(stop) + len(stop)]


async def test_a_stop_token_ends_the_answer_unless_min_tokens_forbids(mixed: Simulator, client: Client) -> None:
    ids = (await client.post(mixed, "/v1/completions", greedy(return_token_ids=True))).json()["choices"][0]["token_ids"]
    at = ids.index(ids[4])
    choice = (await client.post(mixed, "/v1/completions", greedy(stop_token_ids=[ids[4]]))).json()["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", ids[at])
    body = greedy(stop_token_ids=[ids[0]], min_tokens=1)
    if ids[0] not in ids[1:]:
        choice = (await client.post(mixed, "/v1/completions", body)).json()["choices"][0]
        assert choice["finish_reason"] == "length"


async def test_the_end_of_sequence_token_ends_it_unless_ignored(start: Start, client: Client) -> None:
    sim = await start(eos_rate=0.2)
    choice = (await client.post(sim, "/v1/completions", greedy(max_tokens=500, ignore_eos=False))).json()["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)
    answer = (await client.post(sim, "/v1/completions", greedy(max_tokens=100))).json()
    assert answer["usage"]["completion_tokens"] == 100
    body = greedy(max_tokens=100, min_tokens=100, ignore_eos=False)
    assert (await client.post(sim, "/v1/completions", body)).json()["usage"]["completion_tokens"] == 100


async def test_prompts_and_choices_are_numbered(mixed: Simulator, client: Client) -> None:
    body = greedy(prompt=["one", "two"], n=2, temperature=0.7, seed=5)
    answer = (await client.post(mixed, "/v1/completions", body)).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert len({choice["text"] for choice in answer["choices"]}) == 4
    assert answer["usage"]["completion_tokens"] == 4 * 24
    one = (await client.post(mixed, "/v1/completions", greedy(prompt="two", temperature=0.7, seed=6))).json()
    assert one["choices"][0]["text"] == answer["choices"][3]["text"]
    events = (await client.all_events(mixed, "/v1/completions", body))[:-1]
    texts = dict.fromkeys(range(4), "")
    for event in events:
        texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert texts == {choice["index"]: choice["text"] for choice in answer["choices"]}


async def test_prompts_can_be_token_ids(mixed: Simulator, client: Client) -> None:
    ids = (await client.post(mixed, "/tokenize", {"prompt": "some text"})).json()
    assert ids["count"] == len(ids["tokens"])
    assert ids["max_model_len"] == 32768
    answers = {await client.text(mixed, prompt=prompt) for prompt in ("some text", ids["tokens"], [ids["tokens"]])}
    assert len(answers) == 1


async def test_echo_gives_the_prompt_back(mixed: Simulator, client: Client) -> None:
    alone = (await client.post(mixed, "/v1/completions", greedy(prompt="some text", echo=True, max_tokens=0))).json()
    assert alone["choices"][0]["text"] == "some text"
    answer = (await client.post(mixed, "/v1/completions", greedy(prompt="some text", echo=True, logprobs=2))).json()
    choice = answer["choices"][0]
    assert choice["text"].startswith("some text")
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert len(choice["logprobs"]["tokens"]) == answer["usage"]["total_tokens"]


async def test_a_tool_that_must_be_called_is_called_with_valid_arguments(mixed: Simulator, client: Client) -> None:
    for choice, reason in (
        ("required", "tool_calls"),
        ({"type": "function", "function": {"name": "get_weather"}}, "stop"),
    ):
        body = chat(tools=[WEATHER], tool_choice=choice, max_tokens=200, ignore_eos=False)
        whole = (await client.post(mixed, "/v1/chat/completions", body)).json()["choices"][0]
        assert whole["finish_reason"] == reason
        call = whole["message"]["tool_calls"][0]["function"]
        arguments = json.loads(call["arguments"])
        assert call["name"] == "get_weather"
        assert set(arguments) == {"city", "days", "unit"}
        assert 1 <= arguments["days"] <= 5
        events = (await client.all_events(mixed, "/v1/chat/completions", body))[1:-1]
        deltas = [event["choices"][0]["delta"].get("tool_calls", []) for event in events]
        functions = [call["function"] for delta in deltas for call in delta]
        assert functions[0]["name"] == "get_weather"
        assert len(functions) > 3
        assert "".join(function["arguments"] for function in functions) == call["arguments"]
        assert events[-1]["choices"][0]["finish_reason"] == reason


async def test_response_formats_give_valid_json(mixed: Simulator, client: Client) -> None:
    schema = {"type": "object", "properties": {"names": {"type": "array", "items": {"type": "string"}}}}
    for form in ({"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}):
        body = chat(response_format=form, max_tokens=200, ignore_eos=False)
        choice = (await client.post(mixed, "/v1/chat/completions", body)).json()["choices"][0]
        assert isinstance(json.loads(choice["message"]["content"]), dict)
        assert choice["finish_reason"] == "stop"


async def test_schemas_can_refer_to_their_definitions(mixed: Simulator, client: Client) -> None:
    schema = {
        "$defs": {"Part": {"type": "object", "properties": {"size": {"type": "integer"}}}},
        "$ref": "#/$defs/Part",
    }
    body = chat(structured_outputs={"json": schema}, max_tokens=200, ignore_eos=False)
    content = (await client.post(mixed, "/v1/chat/completions", body)).json()["choices"][0]["message"]["content"]
    assert isinstance(json.loads(content)["size"], int)


@pytest.mark.parametrize("schema", [{"$ref": "#/nowhere"}, {"type": "array", "minItems": "x"}, {"$ref": "#"}])
async def test_a_schema_that_cannot_be_followed_is_refused(mixed: Simulator, client: Client, schema: Any) -> None:
    answer = await client.post(mixed, "/v1/chat/completions", chat(structured_outputs={"json": schema}))
    assert answer.status_code in (200, 400)
    assert mixed.engine.dead is None


@pytest.mark.parametrize(
    ("path", "body", "status", "kind", "param"),
    [
        ("chat", chat(model="other"), 404, "NotFoundError", "model"),
        ("chat", chat(stream_options={"include_usage": True}), 400, "BadRequestError", "stream_options"),
        ("chat", chat(min_tokens=13), 400, "BadRequestError", "min_tokens"),
        ("chat", chat(messages="hello"), 400, "Bad Request", "messages"),
        ("chat", chat(messages=[{"content": "no role"}]), 400, "Bad Request", "messages"),
        ("chat", chat(max_tokens="many"), 400, "Bad Request", "max_tokens"),
        ("chat", chat(max_tokens=0), 400, "BadRequestError", "max_tokens"),
        ("chat", chat(top_logprobs=2), 400, "BadRequestError", "top_logprobs"),
        ("chat", chat(logprobs=True, top_logprobs=21), 400, "BadRequestError", "logprobs"),
        ("chat", chat(tool_choice="required"), 400, "BadRequestError", "tool_choice"),
        ("chat", chat(n=2), 400, "BadRequestError", "n"),
        ("chat", {"model": "sim"}, 400, "Bad Request", "messages"),
        ("completion", greedy(prompt=[]), 400, "BadRequestError", "prompt"),
        ("completion", greedy(prompt=[10**6]), 400, "BadRequestError", "prompt"),
        ("completion", greedy(prompt="river " * 40000), 400, "BadRequestError", "input_tokens"),
        ("completion", greedy(max_tokens=40000), 400, "BadRequestError", "input_tokens"),
        ("completion", greedy(prompt_logprobs=1, stream=True), 400, "BadRequestError", "prompt_logprobs"),
        ("completion", greedy(temperature=-1), 400, "BadRequestError", "temperature"),
    ],
)
async def test_requests_that_vllm_refuses_are_refused(
    mixed: Simulator, client: Client, path: str, body: Any, status: int, kind: str, param: str
) -> None:
    route = {"chat": "/v1/chat/completions", "completion": "/v1/completions"}[path]
    answer = await client.post(mixed, route, body)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"], error["code"]) == (status, kind, param, status)
    assert mixed.requests[-1].status == status


@pytest.mark.parametrize("ids", [[], [10**6], "1", [1.5]])
async def test_bad_prompt_token_ids_in_chat_are_refused(mixed: Simulator, client: Client, ids: Any) -> None:
    answer = await client.post(mixed, "/v1/chat/completions", chat(kv_transfer_params={"prompt_token_ids": ids}))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "kv_transfer_params.prompt_token_ids"


async def test_bodies_that_are_not_json_are_refused(mixed: Simulator, client: Client) -> None:
    answer = await client.http.post(
        mixed.url + "/v1/completions", content=b"{", headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400
    answer = await client.http.post(
        mixed.url + "/v1/completions", content=b"{}", headers={"content-type": "text/plain"}
    )
    assert answer.status_code == 415
    assert (await client.get(mixed, "/v1/completions")).status_code == 405
    assert (await client.get(mixed, "/nothing")).json()["error"]["code"] == 404


async def test_probes_and_models_answer(mixed: Simulator, client: Client) -> None:
    assert (await client.get(mixed, "/health")).status_code == 200
    assert (await client.get(mixed, "/ping")).status_code == 200
    assert (await client.get(mixed, "/version")).json() == {"version": "0.32.0"}
    card = (await client.get(mixed, "/v1/models")).json()["data"][0]
    assert (card["id"], card["root"], card["max_model_len"]) == ("sim", "sim", 32768)


async def test_an_api_key_is_required_on_v1_only(start: Start, client: Client) -> None:
    sim = await start(api_key="secret")
    answer = await client.get(sim, "/v1/models")
    assert (answer.status_code, answer.json()) == (401, {"error": "Unauthorized"})
    assert (await client.get(sim, "/health")).status_code == 200
    answer = await client.post(sim, "/v1/completions", greedy(), authorization="Bearer secret")
    assert answer.status_code == 200
