"""SGLang's own `/generate`: what is read of a request and of prefill's answer, and the legs' bodies."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pd_proxy.errors import BackendGarbled, InvalidRequest
from pd_proxy.handoff.connectors.registry import CONNECTORS
from pd_proxy.handoff.coordinates import Coordinates
from pd_proxy.handoff.plan import Leg, Plan
from pd_proxy.requests.body import Body, read_body
from pd_proxy.requests.sglang_generate import usage_of

from tests.handoff.helpers import body_of

SGLANG = CONNECTORS["sglang"]


def body(**members: Any) -> Body:
    return read_body(json.dumps(members).encode(), "sglang_generate")


def generate_body(leg: Leg) -> dict[str, Any]:
    assert leg.path == "/generate"
    return body_of(leg)


def legs(rank: int | None = None, dp: int = 1, **members: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    read = body(**members)
    prefill = Coordinates(host="10.0.0.1", port=9001, dp=dp)
    rendezvous = SGLANG.negotiate(prefill, Coordinates(host="10.0.0.2"), "0f" * 16, rank)
    if read.prompts:
        rendezvous = SGLANG.per_prompt(rendezvous, read.prompts, dp)
    plan = Plan(read, SGLANG, rendezvous=rendezvous, answer_id="named")
    return generate_body(plan.prefill_leg()), generate_body(plan.decode_leg(plan.handoff))


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ({"text": "[not a list]"}, 0),
        ({"text": ["a"]}, 1),
        ({"text": ["a", "b, c"]}, 2),
        ({"text": []}, 0),
        ({"input_ids": [1, 2, 3]}, 0),
        ({"input_ids": [[1, 2, 3]]}, 1),
        ({"input_ids": [[1], [2, 3]]}, 2),
        ({"input_ids": []}, 0),
        ({"input_embeds": [[0.5, 1.0], [0.5, 1.0]]}, 0),
        ({"input_embeds": [[[0.5, 1.0]], [[0.5, 1.0]]]}, 2),
        ({"text": None, "input_ids": [[1], [2]]}, 2),
        ({"text": "a", "input_ids": [[1], [2]]}, 0),
        ({}, 0),
    ],
)
def test_a_batch_is_recognised_by_its_list(prompt: dict[str, Any], prompts: int) -> None:
    assert body(**prompt).prompts == prompts


@given(prompts=st.lists(st.lists(st.integers(0, 10**6), min_size=1), min_size=1), indent=st.sampled_from([None, 0, 3]))
def test_a_batch_of_ids_is_counted_with_any_white_space(prompts: list[list[int]], indent: int | None) -> None:
    raw = json.dumps({"input_ids": prompts}, indent=indent).encode()
    read = read_body(raw, "sglang_generate")
    assert read.prompts == len(prompts)
    assert read.prompt_tokens == sum(map(len, prompts))


def test_the_bound_is_of_all_answers_together() -> None:
    assert body(text="a").max_tokens == 128
    assert body(text="a", sampling_params={"max_new_tokens": 7}).max_tokens == 7
    assert body(text=["a", "b"], sampling_params={"max_new_tokens": 7}).max_tokens == 14
    assert body(text=["a", "b"], sampling_params=[{"max_new_tokens": 7}, {}]).max_tokens == 135
    assert body(text="a", sampling_params=None).max_tokens == 128


@pytest.mark.parametrize(
    ("members", "why"),
    [
        ({}, ""),
        ({"sampling_params": {"n": 1}}, ""),
        ({"sampling_params": {"n": 2}}, "n"),
        ({"sampling_params": [{"n": 2}, {"n": 2}]}, "n"),
        ({"sampling_params": {"beam_width": 4}}, "beam_width"),
        ({"session_params": {"id": "s"}}, "session_params"),
        ({"session_params": None}, ""),
        ({"session_id": "s"}, "session_id"),
    ],
)
def test_unsplittable_requests_are_recognised(members: dict[str, Any], why: str) -> None:
    assert body(text="a", **members).unsplittable == why


@pytest.mark.parametrize(
    ("asked", "wanted"), [(None, False), (False, False), (True, True), ([False, True], True), ([False], False)]
)
def test_prompt_logprobs_are_wanted_with_any_of_a_batch(asked: Any, wanted: bool) -> None:
    assert body(text="a", return_logprob=asked).prompt_logprobs is wanted


@pytest.mark.parametrize(
    ("members", "param"),
    [
        ({"sampling_params": 5}, "sampling_params"),
        ({"sampling_params": [5]}, "sampling_params"),
        ({"sampling_params": {"max_new_tokens": "5"}}, "sampling_params"),
        ({"return_logprob": "yes"}, "return_logprob"),
        ({"stream": 2}, "stream"),
        ({"model": 5}, "model"),
    ],
)
def test_members_that_the_gateway_reads_must_have_the_right_type(members: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        body(text="a", **members)
    assert refused.value.param == param


@pytest.mark.parametrize("stream", [False, True])
def test_both_legs_have_the_clients_body_and_one_room(stream: bool) -> None:
    shaping = {"text": "é", "sampling_params": {"max_new_tokens": 3, "regex": "a"}, "return_logprob": True}
    prefill, decode = legs(**shaping, stream=stream, model="m", lora_path="l")
    room = {name: decode[name] for name in decode if name.startswith("bootstrap_")}
    assert room == {"bootstrap_host": "10.0.0.1", "bootstrap_port": 9001, "bootstrap_room": room["bootstrap_room"]}
    assert decode == {**shaping, **room, "stream": stream, "lora_path": "l", "rid": "named"}
    assert prefill == {**decode, "stream": False}


def test_each_prompt_of_a_batch_has_its_room_and_its_name() -> None:
    prefill, decode = legs(text=["a", "b", "c"])
    for leg in (prefill, decode):
        first = leg["bootstrap_room"][0]
        assert leg["bootstrap_room"] == [first, first + 1, first + 2]
        assert (leg["bootstrap_host"], leg["bootstrap_port"]) == (["10.0.0.1"] * 3, [9001] * 3)
        assert leg["rid"] == ["named_0", "named_1", "named_2"]


def test_the_rank_is_in_the_body_since_engines_may_not_read_the_header() -> None:
    prefill, decode = legs(rank=1, text="a")
    assert prefill["routed_dp_rank"] == 1 and "routed_dp_rank" not in decode
    assert decode["disagg_prefill_dp_rank"] == 1 and "disagg_prefill_dp_rank" not in prefill


@given(dp=st.integers(2, 64), data=st.data())
def test_every_room_of_a_batch_encodes_the_rank(dp: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, dp - 1))
    prefill, decode = legs(rank=rank, dp=dp, text=["a", "b", "c"])
    rooms = prefill["bootstrap_room"]
    assert rooms == decode["bootstrap_room"] and len(set(rooms)) == 3
    assert {room % dp for room in rooms} == {rank} and max(rooms) < 1 << 63


def test_of_a_batchs_sampling_parameters_each_is_stripped() -> None:
    evil = {"max_new_tokens": 1, "custom_params": {"bootstrap_host": "x", "kept": 1}, "rid": "mine"}
    prefill, _ = legs(text=["a", "b"], sampling_params=[evil, evil])
    assert prefill["sampling_params"] == [{"max_new_tokens": 1, "custom_params": {"kept": 1}}] * 2


def answer(**meta: Any) -> dict[str, Any]:
    told = {"prompt_tokens": 5, "completion_tokens": 1, "cached_tokens": 4, "finish_reason": {"type": "length"}}
    return {"text": "a", "meta_info": {**told, **meta}}


def test_prefills_usage_is_the_sum_over_all_prompts() -> None:
    usage = json.loads(bytes(usage_of(json.dumps(answer()).encode(), 0)))
    assert (usage["prompt_tokens"], usage["prompt_tokens_details"]) == (5, {"cached_tokens": 4})
    usage = json.loads(bytes(usage_of(json.dumps([answer(), answer(cached_tokens=0)]).encode(), 2)))
    assert (usage["prompt_tokens"], usage["prompt_tokens_details"]) == (10, {"cached_tokens": 4})


@pytest.mark.parametrize(
    ("said", "prompts"),
    [
        ({"error": {"message": "no"}}, 0),
        ({"text": "a"}, 0),
        ([answer()], 0),
        (answer(), 1),
        ([answer()], 2),
        (answer(finish_reason={"type": "abort", "message": "Aborted"}), 0),
        ([answer(), answer(finish_reason={"type": "abort"})], 2),
        (5, 0),
    ],
)
def test_an_invalid_prefill_answer_is_rejected(said: Any, prompts: int) -> None:
    with pytest.raises(BackendGarbled):
        usage_of(json.dumps(said).encode(), prompts)


@pytest.mark.parametrize("name", ["text", "input_ids", "input_embeds", "sampling_params", "return_logprob"])
def test_the_number_of_a_batchs_prompts_is_bounded(name: str) -> None:
    each = {"text": "a", "input_ids": [1], "input_embeds": [[1]], "sampling_params": {}, "return_logprob": True}[name]
    others = {} if name in ("text", "input_ids", "input_embeds") else {"text": "a"}
    for count, good in ((4096, True), (4097, False), (20_000, False)):
        said = json.dumps({name: [each] * count, **others}).encode()
        if good:
            read_body(said, "sglang_generate")
            continue
        with pytest.raises(InvalidRequest, match=rf"`{name}` has more than 4096 elements"):
            read_body(said, "sglang_generate")
