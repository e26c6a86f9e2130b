"""The legs of each endpoint, and why some requests go whole to one backend."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pd_proxy.errors import InvalidRequest
from pd_proxy.handoff.connector import Connector, Handoff
from pd_proxy.handoff.connectors.registry import CONNECTORS
from pd_proxy.handoff.plan import Plan
from pd_proxy.requests.body import Body, read_body
from pd_proxy.requests.continuation import inexact
from pd_proxy.requests.endpoints import LAYOUTS, Endpoint

from tests.handoff.helpers import PARAMS, answer, body_of

PULL = ("nixl", "mooncake_ascend")
BOTH = pytest.mark.parametrize("connector", [CONNECTORS[name] for name in PULL], ids=PULL)
NIXL = CONNECTORS["nixl"]
ASKED: dict[Endpoint, dict[str, Any]] = {
    "messages": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 9},
    "responses": {"input": "a", "max_output_tokens": 9},
    "generate": {"token_ids": [1, 2, 3], "sampling_params": {"max_tokens": 9}},
}
NEW = pytest.mark.parametrize("endpoint", ASKED)


def body(endpoint: Endpoint, **more: Any) -> Body:
    return read_body(json.dumps({"model": "m", **ASKED[endpoint], **more}).encode(), endpoint)


def plan(endpoint: Endpoint, connector: Connector = NIXL, **more: Any) -> Plan:
    return Plan(body(endpoint, **more), connector, answer_id="7")


def handoff(connector: Connector = NIXL) -> Handoff:
    taken, _ = Plan(read_body(b'{"prompt": "a"}', "completions"), connector).take(answer(PARAMS))
    assert taken is not None
    return taken


# Prefill


@BOTH
def test_messages_are_prefilled_for_one_token_without_what_shapes_output(connector: Connector) -> None:
    prompt = {"system": "s", "tools": [{"name": "t", "input_schema": {}}], "thinking": {"type": "adaptive"}}
    more = {"stream": True, "stop_sequences": ["x"], "top_k": 4, "metadata": {"user_id": "u"}}
    leg = plan("messages", connector, **prompt, **more).prefill_leg()
    assert leg.path == "/v1/messages"
    members = body_of(leg)
    assert members.pop("kv_transfer_params")["do_remote_decode"] is True
    assert members == {
        "model": "m",
        "messages": [{"role": "user", "content": "a"}],
        **prompt,
        "top_k": 4,
        "max_tokens": 1,
        "stream": False,
    }


@pytest.mark.parametrize(
    ("choice", "why"),
    [
        ({"type": "tool", "name": "t"}, "tool_choice"),
        ({"type": "any"}, ""),
        ({"type": "auto"}, ""),
        ({"type": "none"}, ""),
        (None, ""),
        (5, ""),
        ({"type": 5}, ""),
    ],
)
def test_prefill_is_not_forced_to_generate_a_certain_tool_call(choice: object, why: str) -> None:
    assert body("messages", tool_choice=choice).unsplittable == why


def test_members_that_templates_may_write_into_the_prompt_stay() -> None:
    more: dict[str, Any] = {"tool_choice": {"type": "any"}, "output_config": {"format": {"type": "json_schema"}}}
    assert body_of(plan("messages", **more).prefill_leg()).items() >= more.items()
    more = {"tool_choice": "required", "text": {"format": {"type": "json_object"}}}
    assert body_of(plan("responses", **more).prefill_leg()).items() >= more.items()


@BOTH
def test_responses_are_prefilled_unstored_and_under_the_gateways_own_name(connector: Connector) -> None:
    prompt = {"instructions": "i", "tools": [{"type": "function", "name": "t"}], "reasoning": {"effort": "low"}}
    more = {
        **{"stream": True, "store": True, "include": ["message.output_text.logprobs"], "top_logprobs": 3, "stop": "x"},
        **{"metadata": {"a": "b"}, "request_id": "mine"},
    }
    leg = plan("responses", connector, **prompt, **more).prefill_leg()
    assert leg.path == "/v1/responses"
    members = body_of(leg)
    assert members.pop("kv_transfer_params")["do_remote_decode"] is True
    assert members == {
        "model": "m",
        "input": "a",
        **prompt,
        "max_output_tokens": 1,
        "stream": False,
        "store": False,
        "background": False,
        "ignore_eos": True,
        "request_id": "resp_7",
    }


def test_generate_has_its_bounds_and_stops_in_the_sampling_parameters() -> None:
    sampling = {
        **{"max_tokens": 9, "min_tokens": 4, "n": 1, "temperature": 0.5, "seed": 3, "stop": ["x"], "logprobs": 2},
        **{"stop_token_ids": [5], "structured_outputs": {"json": {}}, "extra_args": {"kv_transfer_params": {}, "a": 1}},
    }
    members = body_of(plan("generate", sampling_params=sampling, stream=True, output_mode="text").prefill_leg())
    assert members.pop("kv_transfer_params")["do_remote_decode"] is True
    assert members == {
        "model": "m",
        "token_ids": [1, 2, 3],
        "stream": False,
        "sampling_params": {
            **{"temperature": 0.5, "seed": 3, "extra_args": {"a": 1}},
            **{"max_tokens": 1, "ignore_eos": True},
        },
    }


def test_a_connectors_token_bounds_are_in_the_sampling_parameters_too() -> None:
    sampling = body_of(plan("generate", CONNECTORS["mooncake_ascend"]).prefill_leg())["sampling_params"]
    assert sampling == {"max_tokens": 1, "min_tokens": 1, "ignore_eos": True}


# Prefill's answer


@pytest.mark.parametrize(("endpoint", "member"), [("messages", "content"), ("responses", "output")])
def test_prefills_answer_is_recognised_by_its_own_member(endpoint: Endpoint, member: str) -> None:
    whole = {member: [], "kv_transfer_params": PARAMS, "usage": {"input_tokens": 3, "output_tokens": 1}}
    taken, read = plan(endpoint).take(json.dumps(whole).encode())
    assert taken is not None and json.loads(bytes(read.usage)) == {"input_tokens": 3, "output_tokens": 1}


# Decode


@NEW
@BOTH
def test_decode_gets_the_clients_request_and_the_handoff(endpoint: Endpoint, connector: Connector) -> None:
    more: dict[str, Any] = {"stream": True, "priority": 0}
    leg = plan(endpoint, connector, **more).decode_leg(handoff(connector))
    assert leg.path == LAYOUTS[endpoint].path
    members = body_of(leg)
    assert members.pop("kv_transfer_params") == PARAMS
    name = members.pop("request_id", None)
    assert name == ("resp_7" if endpoint == "responses" else None)
    options = members.pop("stream_options", None)
    assert options == ({"include_usage": True} if endpoint == "generate" else None)
    assert members == {"model": "m", **ASKED[endpoint], **more}


def test_a_clients_response_id_is_not_sent_to_the_engine() -> None:
    assert body_of(plan("responses", request_id="mine").decode_leg(None))["request_id"] == "resp_7"


# Release


@NEW
def test_a_release_that_engines_refuse_goes_to_an_endpoint_that_refuses_it_late(endpoint: Endpoint) -> None:
    leg = plan(endpoint).release_leg(handoff(), sent=True)
    assert leg is not None and leg.path == "/v1/completions"
    members = body_of(leg)
    assert members["min_tokens"] > members["max_tokens"]
    assert (members["model"], members["kv_transfer_params"]) == ("m", PARAMS)
    assert not members.keys() & ASKED[endpoint].keys() - {"max_tokens"}


@NEW
def test_a_release_that_engines_serve_has_the_same_prompt(endpoint: Endpoint) -> None:
    connector = CONNECTORS["mooncake_ascend"]
    leg = plan(endpoint, connector).release_leg(handoff(connector), sent=False)
    assert leg is not None and leg.path == LAYOUTS[endpoint].path
    members = body_of(leg)
    prompt = LAYOUTS[endpoint].prompt[0]
    assert members[prompt] == ASKED[endpoint][prompt] and members["kv_transfer_params"] == PARAMS
    bound = members["sampling_params"] if endpoint == "generate" else members
    assert bound["max_output_tokens" if endpoint == "responses" else "max_tokens"] == 1
    assert plan(endpoint, connector).release_leg(handoff(connector), sent=True) is None


# Reading


@NEW
def test_answers_of_endpoints_that_take_no_token_ids_are_not_continued(endpoint: Endpoint) -> None:
    assert inexact(body(endpoint)) == "endpoint"


@NEW
def test_the_bound_and_the_size_of_the_prompt_are_read(endpoint: Endpoint) -> None:
    read = body(endpoint)
    assert (read.max_tokens, read.model, read.unsplittable, read.stream) == (9, "m", "", False)
    assert read.wants_usage is (endpoint != "generate")
    long = {"messages": [{"role": "user", "content": "word " * 900}], "input": "word " * 900, "token_ids": [7] * 1100}
    prompt = LAYOUTS[endpoint].prompt[0]
    assert 1000 <= body(endpoint, **{prompt: long[prompt]}).prompt_tokens <= 1250


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({}, ""),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"background": False, "previous_response_id": None, "truncation": "disabled", "tools": None}, ""),
        ({"truncation": "auto"}, "truncation"),
        ({"tools": [{"type": "function", "name": "a"}, {"type": "custom", "name": "b"}, {"type": "namespace"}]}, ""),
        ({"tools": [{"type": "function", "name": "a"}, {"type": "mcp"}]}, "builtin_tools"),
        ({"tools": [{"type": "web_search"}]}, "builtin_tools"),
        ({"tools": 5}, ""),
        ({"tools": [5]}, "builtin_tools"),
    ],
)
def test_why_a_response_is_not_split(more: dict[str, Any], why: str) -> None:
    assert body("responses", **more).unsplittable == why


def test_the_previous_response_and_the_flag_store_are_read() -> None:
    assert (body("responses").follows, body("responses").stored) == ("", True)
    read = body("responses", store=False, previous_response_id="resp_1")
    assert (read.follows, read.stored) == ("resp_1", False)
    assert body("responses", store=None).stored
    assert not body("messages", store=True).stored


@pytest.mark.parametrize(
    ("endpoint", "more", "param"),
    [
        ("messages", {"max_tokens": "nine"}, "max_tokens"),
        ("messages", {"stream": "maybe"}, "stream"),
        ("responses", {"max_output_tokens": 1.5}, "max_output_tokens"),
        ("responses", {"previous_response_id": 5}, "previous_response_id"),
        ("responses", {"store": "never"}, "store"),
        ("responses", {"background": 2}, "background"),
        ("generate", {"sampling_params": None}, "sampling_params"),
        ("generate", {"sampling_params": []}, "sampling_params"),
        ("generate", {"sampling_params": {"max_tokens": "9"}}, "sampling_params"),
        ("generate", {"sampling_params": {"n": 1.5}}, "sampling_params"),
    ],
)
def test_a_member_of_the_wrong_type_is_refused_by_its_name(
    endpoint: Endpoint, more: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        body(endpoint, **more)
    assert refused.value.param == param


@pytest.mark.parametrize(
    ("sampling", "why"),
    [
        ({"n": 2}, "n"),
        ({"n": 1, "prompt_logprobs": None}, ""),
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
        ({"prompt_logprob_token_ids": [4]}, "prompt_logprob_token_ids"),
    ],
)
def test_why_a_generate_request_is_not_split(sampling: dict[str, Any], why: str) -> None:
    assert body("generate", sampling_params=sampling).unsplittable == why
