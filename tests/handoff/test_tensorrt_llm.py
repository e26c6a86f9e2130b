"""TensorRT-LLM's legs, the reading of a context server's answer, and the signature."""

from __future__ import annotations

import hashlib
import hmac
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pd_proxy.errors import BackendGarbled, HandoffInvalid
from pd_proxy.handoff.answer import PrefillAnswer, read_answer
from pd_proxy.handoff.connectors.registry import CONNECTORS, connectors
from pd_proxy.handoff.coordinates import Coordinates
from pd_proxy.handoff.opening import opening_events, whole_answer
from pd_proxy.handoff.plan import Plan
from pd_proxy.requests.body import Endpoint, read_body

from tests.handoff.helpers import body_of

TRTLLM = CONNECTORS["tensorrt_llm"]
P = Coordinates(host="10.0.0.1")
KEY = "shared"
PARAMS: dict[str, Any] = {
    "request_type": "context_only",
    "first_gen_tokens": [71],
    "first_gen_log_probs": None,
    "ctx_request_id": 9,
    "encoded_opaque_state": "b3BhcXVl",
    "draft_tokens": None,
    "disagg_request_id": 9,
    "ctx_dp_rank": 1,
    "ctx_info_endpoint": None,
    "schedule_style": 0,
    "later_member": {"kept": [1.0]},
}
USAGE = {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4}


def plan(endpoint: Endpoint = "chat", name: str = "0f" * 16, key: str = "", **members: Any) -> Plan:
    connector = connectors(key)["tensorrt_llm"]
    rendezvous = connector.negotiate(P, P, name, None)
    return Plan(read_body(json.dumps(members).encode(), endpoint), connector, rendezvous=rendezvous)


def answer(endpoint: Endpoint = "chat", finish: str | None = "length", params: Any = PARAMS, **more: Any) -> bytes:
    told: dict[str, Any] = {"index": 0, "finish_reason": finish, "stop_reason": None, "disaggregated_params": params}
    if endpoint == "chat":
        told["message"] = {"role": "assistant", "content": "Hi", "tool_calls": []}
    else:
        told["text"] = "Hi"
    ids = [1, 2, 3] if endpoint == "chat" else [[1, 2, 3]]
    head = {"id": "x-1", "object": "o", "created": 5, "model": "m", "usage": USAGE, "prompt_token_ids": ids}
    return json.dumps({**head, "choices": [told], **more}).encode()


BODIES: dict[Endpoint, dict[str, Any]] = {
    "chat": {
        "messages": [{"role": "user", "content": "é"}],
        "max_tokens": 9,
        "stop": ["x"],
        "seed": 1,
        "logprobs": True,
    },
    "completions": {"prompt": "once", "max_tokens": 9, "min_tokens": 2, "logprobs": 1, "n": 1},
}


@pytest.mark.parametrize("endpoint", BODIES)
@pytest.mark.parametrize("stream", [False, True])
def test_the_context_leg_is_the_clients_body_in_one_piece(endpoint: Endpoint, stream: bool) -> None:
    leg = body_of(plan(endpoint, **BODIES[endpoint], stream=stream, stream_options={"x": 1}).prefill_leg())
    params = leg.pop("disaggregated_params")
    assert leg == {**BODIES[endpoint], "stream": False}
    assert {name: params[name] for name in ("request_type", "schedule_style")} == {
        "request_type": "context_only",
        "schedule_style": 0,
    }


@given(a=st.integers(0, 2**128 - 1), b=st.integers(0, 2**128 - 1))
def test_each_try_has_an_id_of_its_own_above_those_of_the_engines(a: int, b: int) -> None:
    ids = [
        body_of(plan(name=f"{name:032x}", messages=[]).prefill_leg())["disaggregated_params"]["disagg_request_id"]
        for name in (a, b)
    ]
    assert all(2**62 <= one < 2**63 for one in ids)
    assert (ids[0] == ids[1]) == (a % 2**64 >> 2 == b % 2**64 >> 2)


@pytest.mark.parametrize("endpoint", BODIES)
@pytest.mark.parametrize("finish", ["length", "not_finished"])
def test_the_generation_leg_has_all_parameters_of_the_context_server(endpoint: Endpoint, finish: str) -> None:
    made = plan(endpoint, **BODIES[endpoint], stream=True)
    given_ = answer(endpoint, finish)
    assert TRTLLM.whole(read_answer(given_)) is None
    handoff, read = made.take(given_)
    assert json.loads(bytes(read.usage)) == USAGE
    leg = body_of(made.decode_leg(handoff))
    assert leg.pop("disaggregated_params") == {
        **PARAMS,
        "request_type": "generation_only",
        "schedule_style": 0,
        "ctx_usage": USAGE,
    }
    assert leg.pop("stream_options") == {"include_usage": True}
    if endpoint == "chat":
        assert leg.pop("prompt_token_ids") == [1, 2, 3]
        assert leg == {**BODIES["chat"], "stream": True}
    else:
        assert leg == {**BODIES["completions"], "stream": True, "prompt": [[1, 2, 3]]}


@pytest.mark.parametrize("endpoint", BODIES)
def test_packed_ids_are_passed_on_unchanged(endpoint: Endpoint) -> None:
    made = plan(endpoint, **BODIES[endpoint])
    packed = {"prompt_token_ids_b64": "AQAAAA==", "prompt_token_ids": None}
    leg = body_of(made.decode_leg(made.take(answer(endpoint, **packed))[0]))
    assert leg["prompt_token_ids_b64"] == "AQAAAA=="
    assert "prompt_token_ids" not in leg


@pytest.mark.parametrize("endpoint", BODIES)
def test_without_ids_the_prompt_stays(endpoint: Endpoint) -> None:
    made = plan(endpoint, **BODIES[endpoint])
    leg = body_of(made.decode_leg(made.take(answer(endpoint, prompt_token_ids=None))[0]))
    assert {name: leg[name] for name in BODIES[endpoint]} == BODIES[endpoint]


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in PARAMS.items() if key != name}


@pytest.mark.parametrize(
    "params",
    [
        None,
        "x",
        [PARAMS],
        {},
        without("ctx_request_id"),
        without("disagg_request_id"),
        without("first_gen_tokens"),
        {**PARAMS, "ctx_request_id": None},
        {**PARAMS, "ctx_request_id": "9"},
        {**PARAMS, "first_gen_tokens": []},
        {**PARAMS, "first_gen_tokens": ["a"]},
        {**PARAMS, "encoded_opaque_state": 7},
        {**PARAMS, "ctx_info_endpoint": {"host": "x"}},
    ],
)
def test_parameters_that_a_generation_server_could_not_use_are_not_sent(params: object) -> None:
    with pytest.raises(HandoffInvalid, match="context server"):
        plan(messages=[]).take(answer(params=params))


@pytest.mark.parametrize("ids", ["1,2", [1, "2"], [[1], [2]], [], 7])
def test_ids_of_more_than_one_prompt_or_of_none_are_not_sent(ids: object) -> None:
    if ids == []:
        handoff, _ = plan(messages=[]).take(answer(prompt_token_ids=ids))
        assert handoff is not None
        return
    with pytest.raises(HandoffInvalid):
        plan(messages=[]).take(answer(prompt_token_ids=ids))


@pytest.mark.parametrize("choices", [[], [{"finish_reason": "length"}] * 2, [7], {}])
def test_there_is_exactly_one_choice(choices: object) -> None:
    with pytest.raises(HandoffInvalid):
        plan(messages=[]).take(answer(choices=choices))
    assert TRTLLM.whole(read_answer(answer(choices=choices))) is None


def test_a_choice_that_does_not_say_how_it_ended_must_have_parameters() -> None:
    assert plan(messages=[]).take(answer(finish=None))[0] is not None
    with pytest.raises(HandoffInvalid):
        plan(messages=[]).take(answer(finish=None, params=None))


# Answers that end in the context phase


@pytest.mark.parametrize("endpoint", BODIES)
@pytest.mark.parametrize("finish", ["stop", "tool_calls"])
def test_an_answer_that_ends_with_its_first_token_is_sent_to_the_client(endpoint: Endpoint, finish: str) -> None:
    made = answer(endpoint, finish, {**without("ctx_request_id"), "ctx_request_id": None})
    assert plan(endpoint, **BODIES[endpoint]).take(made)[0] is None
    first = TRTLLM.whole(read_answer(made))
    assert first is not None and first.whole
    body = read_body(json.dumps(BODIES[endpoint]).encode(), endpoint)
    told = json.loads(whole_answer(first, body))
    assert "disaggregated_params" not in json.dumps(told)
    assert told["choices"][0]["finish_reason"] == finish
    assert (told["id"], told["usage"], told["prompt_token_ids"]) == ("x-1", USAGE, None)
    events = b"".join(opening_events(first, body)).decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event[6:]) for event in events[:-2]]
    assert "disaggregated_params" not in json.dumps(chunks)
    deltas = [chunk["choices"][0] for chunk in chunks]
    assert "".join(c.get("text", c.get("delta", {}).get("content", "")) for c in deltas) == "Hi"
    assert [c["finish_reason"] for c in deltas][-1] == finish


def test_the_stream_of_a_whole_answer_has_all_of_its_message() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    message = {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [call]}
    choice = {"index": 0, "finish_reason": "tool_calls", "message": message, "disaggregated_params": PARAMS}
    first = TRTLLM.whole(read_answer(answer(choices=[choice])))
    assert first is not None
    _, event, _ = opening_events(first, read_body(b'{"messages":[],"stream":true}', "chat"))
    delta = json.loads(event[6:])["choices"][0]["delta"]
    assert delta == {"content": "", "reasoning_content": "hm", "tool_calls": [{"index": 0, **call}]}


@pytest.mark.parametrize("name", ["id", "created", "model"])
def test_an_answer_that_cannot_be_sent_to_a_client_is_garbled(name: str) -> None:
    members = json.loads(answer(finish="stop"))
    del members[name]
    with pytest.raises(BackendGarbled, match=name):
        TRTLLM.whole(read_answer(json.dumps(members).encode()))


def test_a_whole_answer_may_lack_the_usage() -> None:
    first = TRTLLM.whole(read_answer(answer(finish="stop", usage=None)))
    assert first is not None
    assert b"".join(opening_events(first, read_body(b'{"messages":[],"stream":true}', "chat")))


@given(
    st.binary(max_size=40)
    | st.recursive(st.none() | st.integers(), lambda x: st.lists(x)).map(lambda v: json.dumps(v).encode())
)
def test_an_invalid_answer_is_none(text: bytes) -> None:
    assert TRTLLM.whole(PrefillAnswer(choices=msgspec.Raw(text))) is None


# The signature


def header(key: str, **params: Any) -> bytes:
    made = plan(key=key, messages=[])
    handoff, _ = made.take(answer(params={**PARAMS, **params}))
    assert handoff is not None
    assert key.encode() not in b"".join(made.decode_leg(handoff).body) if key else True
    return made.decode_leg(handoff).headers


def signature(endpoint: str | None, state: str | None) -> bytes:
    def shown(value: str | None) -> str:
        return "null" if value is None else f'"{value}"'

    text = f'{{"ctx_info_endpoint":{shown(endpoint)},"encoded_opaque_state":{shown(state)}}}'
    return b"sha256=" + hmac.new(KEY.encode(), text.encode(), hashlib.sha256).hexdigest().encode()


@pytest.mark.parametrize(
    ("endpoint", "shown", "state"),
    [
        (None, None, "b3BhcXVl"),
        ("tcp://h:1", "tcp://h:1", None),
        (["tcp://h:1", "tcp://h:2"], "tcp://h:1", "eA=="),
        ([], None, "eA=="),
    ],
)
def test_hand_off_parameters_are_signed(endpoint: Any, shown: str | None, state: str | None) -> None:
    made = header(KEY, ctx_info_endpoint=endpoint, encoded_opaque_state=state)
    assert made == b"x-trtllm-disagg-auth: " + signature(shown, state) + b"\r\n"


def test_nothing_is_signed_without_a_key_or_without_what_needs_it() -> None:
    assert header("") == b""
    assert header(KEY, ctx_info_endpoint=None, encoded_opaque_state=None) == b""
