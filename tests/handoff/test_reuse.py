"""Decode receives the prompt as prefill has tokenised it, wherever that is the same prompt."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pd_proxy.handoff.connector import Connector
from pd_proxy.handoff.connectors.registry import CONNECTORS
from pd_proxy.handoff.plan import Plan
from pd_proxy.handoff.reuse import reusable
from pd_proxy.requests.body import Endpoint, read_body
from pd_proxy.requests.continuation import Continuation

from tests.handoff.helpers import PARAMS, body_of

NIXL = CONNECTORS["nixl"]
TAKERS = [connector for connector in CONNECTORS.values() if connector.traits.reuses_prompt_ids]
EVERY = pytest.mark.parametrize("connector", TAKERS, ids=lambda connector: connector.name)
MEMBERS: dict[Endpoint, dict[str, Any]] = {
    "chat": {"messages": [{"role": "user", "content": "é"}], "max_tokens": 9},
    "completions": {"prompt": "once upon", "max_tokens": 9},
}
BOTH = pytest.mark.parametrize("endpoint", MEMBERS)
IDS = b"[7, 300,9]"


def plan(connector: Connector = NIXL, endpoint: Endpoint = "chat", **more: Any) -> Plan:
    body = read_body(json.dumps({**MEMBERS[endpoint], **more}).encode(), endpoint)
    assert reusable(body)
    return Plan(body, connector, reuse=True)


def answer(endpoint: Endpoint, ids: bytes = IDS) -> bytes:
    """Prefill's answer, with the ids where vLLM puts them for each endpoint."""
    params = json.dumps(PARAMS).encode()
    if endpoint == "chat":
        return b'{"choices":[{"index":0}],"prompt_token_ids":%b,"kv_transfer_params":%b}' % (ids, params)
    return b'{"choices":[{"index":0,"prompt_token_ids":%b}],"kv_transfer_params":%b}' % (ids, params)


def decoded(made: Plan, answered: bytes) -> dict[str, Any]:
    handoff, _ = made.take(answered)
    return body_of(made.decode_leg(handoff))


@EVERY
@BOTH
def test_prefill_is_asked_for_the_ids(connector: Connector, endpoint: Endpoint) -> None:
    assert body_of(plan(connector, endpoint).prefill_leg())["return_token_ids"] is True
    without = Plan(read_body(json.dumps(MEMBERS[endpoint]).encode(), endpoint), connector)
    assert "return_token_ids" not in body_of(without.prefill_leg())


@EVERY
def test_a_chat_has_the_ids_beside_the_hand_off_parameters(connector: Connector) -> None:
    body = decoded(plan(connector), answer("chat"))
    assert body["kv_transfer_params"] == {"prompt_token_ids": [7, 300, 9], **PARAMS}
    assert body["messages"] == MEMBERS["chat"]["messages"]
    assert "return_token_ids" not in body


@EVERY
def test_completions_have_the_ids_as_their_prompt(connector: Connector) -> None:
    body = decoded(plan(connector, "completions"), answer("completions"))
    assert body["prompt"] == [7, 300, 9]
    assert body["kv_transfer_params"] == PARAMS


@BOTH
def test_the_ids_stay_the_bytes_that_prefill_sent(endpoint: Endpoint) -> None:
    made = plan(endpoint=endpoint)
    handoff, _ = made.take(answer(endpoint))
    assert IDS in b"".join(made.decode_leg(handoff).body)


@BOTH
@pytest.mark.parametrize("ids", [b"null", b"[]", b'"x"', b"{}", b"[1.5]", b'["1"]', b"[null]", b"[[1]]", b"[-1]"])
def test_without_ids_in_prefills_answer_decode_tokenises(endpoint: Endpoint, ids: bytes) -> None:
    body = decoded(plan(endpoint=endpoint), answer(endpoint, ids))
    assert body == {**MEMBERS[endpoint], "kv_transfer_params": PARAMS}


@BOTH
def test_without_the_member_for_ids_in_prefills_answer_decode_tokenises(endpoint: Endpoint) -> None:
    other: Endpoint = "chat" if endpoint == "completions" else "completions"
    body = decoded(plan(endpoint=endpoint), answer(other))
    assert body == {**MEMBERS[endpoint], "kv_transfer_params": PARAMS}


def test_a_chat_with_more_than_text_is_tokenised_by_each_engine_itself() -> None:
    parts = [{"type": "text", "text": "what is it?"}, {"type": "image_url", "image_url": {"url": "data:,"}}]
    made = plan(messages=[{"role": "user", "content": parts}])
    assert decoded(made, answer("chat"))["kv_transfer_params"] == PARAMS


def test_a_chat_of_text_parts_is_text() -> None:
    made = plan(messages=[{"role": "user", "content": [{"type": "text", "text": "hello"}]}])
    assert decoded(made, answer("chat"))["kv_transfer_params"]["prompt_token_ids"] == [7, 300, 9]


@pytest.mark.parametrize("prompt", [[1, 2], [[1, 2]], ["x"], None])
def test_a_completion_without_text_has_nothing_to_tokenise(prompt: Any) -> None:
    assert not reusable(read_body(json.dumps({"prompt": prompt}).encode(), "completions"))
    assert not reusable(read_body(b"{}", "completions"))
    assert not reusable(read_body(b'{"prompt":"x","prompt_embeds":"AAAA"}', "completions"))


@BOTH
def test_the_clients_own_flag_for_ids_and_all_other_members_stay(endpoint: Endpoint) -> None:
    wishes = {"return_token_ids": True, "logprobs": 2, "tools": [], "seed": 3}
    body = decoded(plan(endpoint=endpoint, **wishes), answer(endpoint))
    assert {name: body[name] for name in wishes} == wishes


@BOTH
def test_a_continued_answer_has_ids_of_its_own(endpoint: Endpoint) -> None:
    body = read_body(json.dumps(MEMBERS[endpoint]).encode(), endpoint)
    made = Plan(body, NIXL, Continuation(b"7,300,9,11", 1), reuse=True)
    assert "return_token_ids" not in body_of(made.prefill_leg())
    leg = decoded(made, answer(endpoint))
    assert leg.get("prompt", leg["kv_transfer_params"].get("prompt_token_ids")) == [7, 300, 9, 11]


@BOTH
def test_a_release_leg_has_no_ids(endpoint: Endpoint) -> None:
    made = plan(endpoint=endpoint)
    handoff, _ = made.take(answer(endpoint))
    assert handoff is not None
    leg = made.release_leg(handoff, sent=False)
    assert leg is not None
    assert b"300" not in b"".join(leg.body)


def test_without_a_hand_off_decode_tokenises() -> None:
    handoff, _ = plan().take(b'{"choices":[{"index":0}],"prompt_token_ids":[7,300,9]}')
    assert handoff is None
