"""The bodies of both legs, for every connector."""

from __future__ import annotations

import json
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pd_proxy.errors import BackendGarbled, HandoffInvalid
from pd_proxy.handoff.connector import Connector
from pd_proxy.handoff.connectors.registry import CONNECTORS
from pd_proxy.handoff.coordinates import Coordinates
from pd_proxy.handoff.plan import Plan
from pd_proxy.requests.body import read_body
from pd_proxy.requests.endpoints import Endpoint
from pd_proxy.settings.types import ConnectorName

from tests.handoff.helpers import PARAMS, answer, body_of, without

ASKED = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
EVERY = pytest.mark.parametrize("connector", CONNECTORS.values(), ids=list(CONNECTORS))
PULLS = ["nixl", "mooncake_ascend"]
PULL = pytest.mark.parametrize("connector", [CONNECTORS[name] for name in PULLS], ids=PULLS)
"""The connectors whose prefill answers with the address of its blocks."""
SAMPLES = ["sglang", "tensorrt_llm"]
ONE_TOKEN = [name for name in CONNECTORS if name not in SAMPLES]
MAKES_ONE = pytest.mark.parametrize("connector", [CONNECTORS[name] for name in ONE_TOKEN], ids=ONE_TOKEN)
"""The connectors whose prefill generates a token that is not used. With the others it is the client's first."""
HERE = Coordinates(host="10.0.0.1", port=8998, engine_ids=("engine-0",))


def plan(connector: Connector, endpoint: Endpoint = "chat", **members: Any) -> Plan:
    rendezvous = connector.negotiate(HERE, HERE, "0f" * 16, None) if connector.traits.negotiates else None
    rendezvous = (
        connector.callback_params("http://10.0.0.1/v1/metaserver") if connector.traits.called_back else rendezvous
    )
    return Plan(read_body(json.dumps(members).encode(), endpoint), connector, rendezvous=rendezvous)


def test_a_connector_is_registered_under_its_own_name() -> None:
    assert list(CONNECTORS) == [connector.name for connector in CONNECTORS.values()]
    assert set(CONNECTORS) == set(get_args(ConnectorName))


# The prefill leg


@PULL
@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_prefill_makes_one_token_without_a_stream_and_keeps_its_blocks(
    connector: Connector, endpoint: Endpoint
) -> None:
    body = body_of(plan(connector, endpoint, model="m", stream=True, max_tokens=100).prefill_leg())
    assert body["stream"] is False
    assert body["max_tokens"] == 1
    assert body["ignore_eos"] is True
    assert body["kv_transfer_params"] == ASKED
    assert body["model"] == "m"


@EVERY
def test_prefill_goes_to_the_clients_own_path(connector: Connector) -> None:
    assert plan(connector, "chat").prefill_leg().path == "/v1/chat/completions"
    assert plan(connector, "completions").prefill_leg().path == "/v1/completions"
    assert plan(connector, "chat").decode_leg(None).path == "/v1/chat/completions"


@MAKES_ONE
def test_prefill_overrules_both_bounds_for_chat(connector: Connector) -> None:
    assert body_of(plan(connector, max_completion_tokens=9).prefill_leg())["max_completion_tokens"] == 1
    assert "max_completion_tokens" not in body_of(plan(connector, max_tokens=9).prefill_leg())


DROPPED: dict[str, Any] = {
    "stream_options": {"include_usage": True},
    "n": 1,
    "stop": ["\n"],
    "stop_token_ids": [2],
    "repetition_detection": {"min": 2},
    "logprobs": True,
    "top_logprobs": 3,
    "structured_outputs": {"regex": "a"},
}


@MAKES_ONE
@pytest.mark.parametrize("name", sorted(DROPPED))
def test_prefill_has_no_members_that_shape_or_stop_output(connector: Connector, name: str) -> None:
    made = plan(connector, stream=True, messages=[], **{name: DROPPED[name]})
    assert name not in body_of(made.prefill_leg())
    if name != "stream_options":
        assert body_of(made.decode_leg(None))[name] == DROPPED[name]


def test_min_tokens_never_exceeds_prefills_one_token() -> None:
    assert "min_tokens" not in body_of(plan(CONNECTORS["nixl"], min_tokens=50).prefill_leg())
    assert body_of(plan(CONNECTORS["mooncake_ascend"], min_tokens=50).prefill_leg())["min_tokens"] == 1
    for connector in CONNECTORS.values():
        assert body_of(plan(connector, min_tokens=50).decode_leg(None))["min_tokens"] == 50


PROMPT: dict[str, Any] = {
    "messages": [{"role": "user", "content": "é"}],
    "prompt": "once upon",
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "tool_choice": "none",
    "response_format": {"type": "json_object"},
    "chat_template": "{{ x }}",
    "chat_template_kwargs": {"enable_thinking": False},
    "documents": [{"text": "d"}],
    "reasoning_effort": "low",
    "add_generation_prompt": False,
    "continue_final_message": True,
    "add_special_tokens": False,
    "mm_processor_kwargs": {"fps": 1},
    "cache_salt": "pepper",
    "priority": 3,
    "user": "u",
    "model": "m",
}


@EVERY
@pytest.mark.parametrize("name", sorted(PROMPT))
def test_members_that_shape_the_prompt_are_the_same_on_both_legs(connector: Connector, name: str) -> None:
    made = plan(connector, **{name: PROMPT[name]})
    handoff, _ = made.take(answer(PARAMS))
    assert body_of(made.prefill_leg())[name] == PROMPT[name]
    assert body_of(made.decode_leg(handoff))[name] == PROMPT[name]


EDITED = {"stream", "max_tokens", "max_completion_tokens", "min_tokens", "ignore_eos", "kv_transfer_params", *DROPPED}
OWN = {"bootstrap_host", "bootstrap_port", "bootstrap_room", "disaggregated_params", "prompt_token_ids"}
"""Members that connectors add."""
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)
BODIES = st.dictionaries(st.sampled_from(sorted(PROMPT)) | st.text(max_size=6), VALUES, max_size=8).map(
    lambda members: {name: value for name, value in members.items() if name not in EDITED | {"model", "n", "rid"}}
)


@EVERY
@given(members=BODIES, stream=st.booleans(), bound=st.integers(1, 9000))
def test_both_legs_carry_the_same_prompt(
    connector: Connector, members: dict[str, Any], stream: bool, bound: int
) -> None:
    made = plan(connector, **members, stream=stream, max_tokens=bound)
    handoff, _ = made.take(answer(PARAMS))
    prefill, decode = body_of(made.prefill_leg()), body_of(made.decode_leg(handoff))
    for leg in (prefill, decode):
        assert {name: value for name, value in leg.items() if name not in EDITED | OWN} == members
    assert (decode["stream"], decode["max_tokens"]) == (stream, bound)
    assert (prefill["stream"], prefill["max_tokens"]) == (False, bound if connector.name in SAMPLES else 1)


@EVERY
def test_making_a_leg_changes_nothing_for_the_next_try(connector: Connector) -> None:
    made = plan(connector, stream=True, max_tokens=9, messages=[])
    first = made.prefill_leg(), made.decode_leg(made.take(answer(PARAMS))[0])
    made.decode_leg(None)
    assert (made.prefill_leg(), made.decode_leg(made.take(answer(PARAMS))[0])) == first


# The hand-off


@PULL
def test_the_hand_off_goes_to_decode_word_for_word(connector: Connector) -> None:
    odd = b'{ "unknown" : [1.0, "\\u00e9"], ' + json.dumps(PARAMS).encode()[1:]
    made = plan(connector, max_tokens=5)
    handoff, read = made.take(b'{"usage":{"prompt_tokens":3},"choices":[],"kv_transfer_params":' + odd + b"}")
    leg = made.decode_leg(handoff)
    assert odd in b"".join(leg.body)
    assert body_of(leg)["max_tokens"] == 5
    assert bytes(read.usage) == b'{"prompt_tokens":3}'


@PULL
@pytest.mark.parametrize("blocks", [[[33]], [[33], []], [[1, 2], [3]], [33, 34], [[0]]])
def test_blocks_may_be_listed_flat_or_by_group(connector: Connector, blocks: object) -> None:
    assert plan(connector).take(answer({**PARAMS, "remote_block_ids": blocks}))[0] is not None


def test_the_older_ascend_connector_names_no_request() -> None:
    older = {name: PARAMS[name] for name in PARAMS if name not in ("remote_request_id", "tp_size")}
    assert plan(CONNECTORS["mooncake_ascend"]).take(answer(older))[0] is not None
    with pytest.raises(HandoffInvalid):
        plan(CONNECTORS["nixl"]).take(answer(older))


HARMFUL: dict[str, object] = {
    "a string": "kv",
    "a list": [PARAMS],
    "a number": 7,
    "true": True,
    "both flags false": {"do_remote_prefill": False, "do_remote_decode": False},
    "do_remote_prefill false": {**PARAMS, "do_remote_prefill": False},
    "do_remote_prefill as text": {**PARAMS, "do_remote_prefill": "true"},
    "do_remote_prefill missing": without("do_remote_prefill"),
    "do_remote_prefill alone": {"do_remote_prefill": True},
    "the parameters of prefill's own request": ASKED,
    "all null": {**dict.fromkeys(PARAMS), "do_remote_prefill": True},
    "no blocks": {**PARAMS, "remote_block_ids": []},
    "empty groups": {**PARAMS, "remote_block_ids": [[], []]},
    "blocks null": {**PARAMS, "remote_block_ids": None},
    "blocks missing": without("remote_block_ids"),
    "blocks negative": {**PARAMS, "remote_block_ids": [[-1]]},
    "blocks as text": {**PARAMS, "remote_block_ids": [["33"]]},
    "blocks with null": {**PARAMS, "remote_block_ids": [[33, None]]},
    "blocks a number": {**PARAMS, "remote_block_ids": 33},
    "blocks an object": {**PARAMS, "remote_block_ids": {"0": [33]}},
    "blocks fractions": {**PARAMS, "remote_block_ids": [[1.5]]},
    "engine missing": without("remote_engine_id"),
    "engine null": {**PARAMS, "remote_engine_id": None},
    "engine empty": {**PARAMS, "remote_engine_id": ""},
    "request empty": {**PARAMS, "remote_request_id": ""},
    "request a number": {**PARAMS, "remote_request_id": 7},
    "host missing": without("remote_host"),
    "host null": {**PARAMS, "remote_host": None},
    "host empty": {**PARAMS, "remote_host": ""},
    "port missing": without("remote_port"),
    "port null": {**PARAMS, "remote_port": None},
    "port as text": {**PARAMS, "remote_port": "22050"},
    "port zero": {**PARAMS, "remote_port": 0},
    "port too high": {**PARAMS, "remote_port": 65536},
}


@PULL
@pytest.mark.parametrize("params", HARMFUL.values(), ids=list(HARMFUL))
def test_parameters_that_would_kill_or_block_decode_are_not_sent(connector: Connector, params: object) -> None:
    with pytest.raises(HandoffInvalid, match=r"prefill's (kv_transfer_params|remote_block_ids) ") as caught:
        plan(connector).take(answer(params))
    assert caught.value.retryable
    assert "127.0.0.1" not in caught.value.public_message


@pytest.mark.parametrize(
    "params",
    [
        without("remote_request_id"),
        {**PARAMS, "remote_request_id": None},
        without("tp_size"),
        {**PARAMS, "tp_size": 0},
        {**PARAMS, "tp_size": "1"},
    ],
)
def test_nixl_needs_the_request_and_the_tensor_parallel_size(params: object) -> None:
    with pytest.raises(HandoffInvalid):
        plan(CONNECTORS["nixl"]).take(answer(params))


@PULL
@pytest.mark.parametrize("params", [None, {}])
def test_no_parameters_are_no_hand_off(connector: Connector, params: object) -> None:
    handoff, read = plan(connector).take(answer(params))
    assert handoff is None
    assert json.loads(bytes(read.usage)) == {"prompt_tokens": 3}


@PULL
def test_an_answer_without_the_member_is_no_hand_off(connector: Connector) -> None:
    handoff, read = plan(connector).take(b'{"choices":[]}')
    assert handoff is None
    assert bytes(read.usage) == b""


@EVERY
@pytest.mark.parametrize("text", [b"", b"<html>", b"[]", b'"x"', b'{"kv_transfer_params":', b"null"])
def test_an_invalid_answer_is_garbled(connector: Connector, text: bytes) -> None:
    with pytest.raises(BackendGarbled, match="prefill's answer is not one"):
        plan(connector).take(text)


@PULL
@given(params=VALUES | st.fixed_dictionaries({}, optional=dict.fromkeys(PARAMS, VALUES)))
def test_any_parameters_are_accepted_or_refused(connector: Connector, params: object) -> None:
    made = plan(connector)
    try:
        handoff, _ = made.take(answer(params))
    except HandoffInvalid:
        return
    if handoff is not None:
        assert body_of(made.decode_leg(handoff))["kv_transfer_params"] == params


# The decode leg


@EVERY
def test_decode_alone_has_no_hand_off_parameters(connector: Connector) -> None:
    body = body_of(plan(connector, messages=[], max_tokens=9, n=3, stop=["a"]).decode_leg(None))
    assert body == {"messages": [], "max_tokens": 9, "n": 3, "stop": ["a"]}


@EVERY
@pytest.mark.parametrize(
    ("members", "options"),
    [
        ({"stream": True}, {"include_usage": True}),
        ({"stream": True, "stream_options": None}, {"include_usage": True}),
        ({"stream": True, "stream_options": {}}, {"include_usage": True}),
        ({"stream": True, "stream_options": {"include_usage": False, "x": 1}}, {"x": 1, "include_usage": True}),
        ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, {"include_usage": True}),
        (
            {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
            {"include_usage": True, "continuous_usage_stats": True},
        ),
    ],
)
def test_a_stream_always_closes_with_usage(connector: Connector, members: dict[str, Any], options: object) -> None:
    made = plan(connector, **members)
    for handoff in (None, made.take(answer(PARAMS))[0]):
        assert body_of(made.decode_leg(handoff))["stream_options"] == options


@EVERY
@pytest.mark.parametrize("members", [{}, {"stream": False}, {"stream": None}])
def test_an_answer_in_one_piece_has_no_stream_options(connector: Connector, members: dict[str, Any]) -> None:
    assert "stream_options" not in body_of(plan(connector, **members).decode_leg(None))


@EVERY
def test_a_lease_outlives_a_hand_off_many_times(connector: Connector) -> None:
    assert connector.traits.lease >= 30.0


@EVERY
def test_large_messages_go_to_both_engines_byte_for_byte(connector: Connector) -> None:
    messages = b'[ {"role" : "user", "content":"%b\\u00e9\\/"} ]' % (b"word " * 10_000)
    made = Plan(read_body(b'{"messages":' + messages + b"}", "chat"), connector)
    for leg in (made.prefill_leg(), made.decode_leg(None)):
        assert messages in leg.body  # a piece of its own
        assert body_of(leg)["messages"] == json.loads(messages)
    assert body_of(made.decode_leg(None)) == json.loads(b'{"messages":%b}' % messages)


@EVERY
@pytest.mark.parametrize("prompt", ["word " * 10_000, list(range(5_000))], ids=["text", "ids"])
def test_large_prompts_go_to_both_engines(connector: Connector, prompt: object) -> None:
    made = plan(connector, "completions", prompt=prompt, max_tokens=5, stream=True, seed=7)
    prefill, decode = body_of(made.prefill_leg()), body_of(made.decode_leg(None))
    assert prefill["prompt"] == decode["prompt"] == prompt
    assert (prefill["max_tokens"], decode["max_tokens"]) == (5 if connector.name in SAMPLES else 1, 5)
    assert prefill["seed"] == decode["seed"] == 7


@EVERY
def test_a_long_request_without_a_prompt_is_sent_without_a_prompt(connector: Connector) -> None:
    """The size of a prompt includes that of its tools."""
    tools = [{"type": "function", "function": {"name": "f", "description": "word " * 10_000}}]
    leg = plan(connector, tools=tools, model="m").prefill_leg()
    assert body_of(leg)["tools"] == tools
    assert "messages" not in body_of(leg)


def test_a_hand_off_is_raw_bytes() -> None:
    handoff, _ = plan(CONNECTORS["nixl"]).take(answer(PARAMS))
    assert handoff is not None
    assert isinstance(handoff.members["kv_transfer_params"], msgspec.Raw)
