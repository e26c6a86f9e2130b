"""SGLang's legs: the client's body on both, and one room."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pd_proxy.handoff.connectors.registry import CONNECTORS
from pd_proxy.handoff.coordinates import Coordinates
from pd_proxy.handoff.plan import Plan
from pd_proxy.requests.body import Endpoint, read_body

from tests.handoff.helpers import body_of

SGLANG = CONNECTORS["sglang"]
P = Coordinates(host="10.0.0.1", port=9001)
D = Coordinates(host="10.0.0.2")
ROOM = ("bootstrap_host", "bootstrap_port", "bootstrap_room")


def legs(
    name: str = "0f" * 16, rank: int | None = None, at: Coordinates = P, endpoint: Endpoint = "chat", **members: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    plan = Plan(
        read_body(json.dumps(members).encode(), endpoint),
        SGLANG,
        rendezvous=SGLANG.negotiate(at, D, name, rank),
        token_ids=False,
    )
    return body_of(plan.prefill_leg()), body_of(plan.decode_leg(plan.handoff))


SHAPING: dict[str, Any] = {
    "messages": [{"role": "user", "content": "é"}],
    "max_tokens": 9,
    "max_completion_tokens": 8,
    "min_tokens": 3,
    "stop": ["x"],
    "stop_token_ids": [2],
    "logprobs": True,
    "top_logprobs": 2,
    "temperature": 0.3,
    "seed": 7,
    "response_format": {"type": "json_object"},
    "ebnf": "root ::= a",
    "n": 1,
}


@pytest.mark.parametrize("stream", [False, True])
def test_both_legs_have_the_clients_body_and_one_room(stream: bool) -> None:
    prefill, decode = legs(**SHAPING, stream=stream)
    assert {name: prefill[name] for name in ROOM} == {name: decode[name] for name in ROOM}
    assert (prefill["bootstrap_host"], prefill["bootstrap_port"]) == ("10.0.0.1", 9001)
    for leg in (prefill, decode):
        more = {"stream_options": {"include_usage": True}} if stream and leg is decode else {}
        wanted = {**SHAPING, "stream": stream and leg is decode, **more}
        assert {name: value for name, value in leg.items() if name not in ROOM} == wanted


def test_prefills_answer_is_in_one_piece_even_if_the_client_streams() -> None:
    prefill, decode = legs(stream=True, stream_options={"include_usage": True}, messages=[])
    assert prefill["stream"] is False and "stream_options" not in prefill
    assert decode["stream"] is True and decode["stream_options"] == {"include_usage": True}


@given(a=st.integers(0, 2**128 - 1), b=st.integers(0, 2**128 - 1))
def test_each_try_has_a_room_of_its_own_with_free_numbers_after_it_for_a_batch(a: int, b: int) -> None:
    rooms = [legs(f"{name:032x}")[0]["bootstrap_room"] for name in (a, b)]
    assert all(type(room) is int and 0 <= room < 2**63 - 2**24 for room in rooms)
    if a >> 64 != b >> 64 and (a >> 64) % (2**63 - 2**24) != (b >> 64) % (2**63 - 2**24):
        assert rooms[0] != rooms[1]


@given(name=st.integers(0, 2**128 - 1), dp=st.integers(2, 64), data=st.data())
def test_decode_receives_prefills_rank_which_the_room_encodes_too(name: int, dp: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, dp - 1))
    at = Coordinates(host="h", port=1, dp=dp)
    prefill, decode = legs(f"{name:032x}", rank, at, messages=[])
    assert decode["disagg_prefill_dp_rank"] == rank
    assert "disagg_prefill_dp_rank" not in prefill
    assert decode["bootstrap_room"] % dp == rank
    assert 0 <= decode["bootstrap_room"] < 2**63 - 2**24 + dp


def test_no_rank_is_named_where_there_is_only_one() -> None:
    assert "disagg_prefill_dp_rank" not in legs(messages=[])[1]


def test_an_ipv6_host_is_in_brackets() -> None:
    assert legs(at=Coordinates(host="fd00::1", port=1))[0]["bootstrap_host"] == "[fd00::1]"


def test_several_prompts_are_sent_unchanged() -> None:
    for leg in legs(endpoint="completions", prompt=["a", "b"]):
        assert leg["prompt"] == ["a", "b"]
        assert type(leg["bootstrap_room"]) is int  # a scalar: the engines count up from it
    assert SGLANG.traits.splittable == {"prompt_list"}


# What an engine reports of itself


def info(**said: Any) -> bytes:
    return json.dumps({"disaggregation_mode": "prefill", "disaggregation_bootstrap_port": 8998, **said}).encode()


def test_the_port_and_the_ranks_are_learnt() -> None:
    here = SGLANG.learn(Coordinates(host="h"), info(disaggregation_bootstrap_port=9000, dp_size=4, model_path="m"))
    assert (here.host, here.port, here.dp) == ("h", 9000, 4)
    assert SGLANG.learn(Coordinates(host="h"), info()).dp == 1


def test_a_port_from_the_settings_is_kept() -> None:
    assert SGLANG.learn(Coordinates(host="h", port=31000), info()).port == 31000


@pytest.mark.parametrize(
    "answer",
    [
        info(disaggregation_mode="decode"),
        info(disaggregation_mode="null"),
        info(disaggregation_bootstrap_port="8998"),
        b'{"dp_size":1}',
        b"[]",
        b"<html>",
    ],
)
def test_a_server_that_is_no_prefill_server_is_recognised(answer: bytes) -> None:
    with pytest.raises(ValueError):
        SGLANG.learn(Coordinates(), answer)
