"""Whether prefill's token may be the client's first is decided from bytes alone."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pd_proxy.handoff.answer import read_answer
from pd_proxy.handoff.connectors.registry import CONNECTORS
from pd_proxy.handoff.first_token import FirstToken, inexact_because, read, sampled_token
from pd_proxy.handoff.opening import joined_answer, opening_events, whole_answer
from pd_proxy.handoff.plan import Plan
from pd_proxy.requests.body import Body, read_body
from pd_proxy.requests.endpoints import Endpoint

from tests.handoff.helpers import body_of


def body(endpoint: Endpoint = "chat", **members: Any) -> Body:
    asked = {"messages": [{"role": "user", "content": "x"}]} if endpoint == "chat" else {"prompt": "x"}
    return read_body(json.dumps({"model": "m", "max_tokens": 9, **asked, **members}).encode(), endpoint)


def answer(tokens: int = 20, *, blocks: int | None = None, **more: Any) -> bytes:
    """A prefill engine's answer to a chat, as vLLM 0.32 writes it."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": " word", "refusal": None, "reasoning": None},
        "logprobs": None,
        "finish_reason": "length",
        "stop_reason": None,
        "token_ids": [207],
        **more.pop("choice", {}),
    }
    params = {
        "do_remote_prefill": True,
        "remote_block_ids": [list(range(-(-tokens // 16) if blocks is None else blocks))],
        "remote_engine_id": "engine_dp1",
        "remote_num_tokens": tokens,
        "dcp_size": 1,
        "pp_size": 1,
        **more.pop("params", {}),
    }
    whole = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 5,
        "model": "m",
        "choices": [choice],
        "system_fingerprint": "vllm-0.32.0",
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens + 1, "completion_tokens": 1, "details": None},
        "prompt_token_ids": list(range(tokens)),
        "prompt_text": None,
        "kv_transfer_params": params,
        **more,
    }
    return json.dumps(whole, separators=(",", ":")).encode()


@pytest.mark.parametrize("name", ["id", "created", "model"])
def test_an_answer_that_lacks_what_clients_need_is_not_used(name: str) -> None:
    members = json.loads(answer())
    del members[name]
    assert taken(json.dumps(members).encode()) == "unreadable"


def taken(raw: bytes, asked: Body | None = None, **known: int) -> FirstToken | str:
    return read(read_answer(raw), asked or body(), **{"block_size": 16, "context": 2048, "limit": 1 << 20, **known})


def token(raw: bytes, asked: Body | None = None) -> FirstToken:
    found = taken(raw, asked)
    assert isinstance(found, FirstToken), found
    return found


def test_a_good_answer_gives_its_token_and_the_prompt() -> None:
    first = token(answer())
    assert (first.token, first.text, first.whole, first.engine) == (b"207", " word", False, "engine")
    assert first.prompt == ",".join(map(str, range(20))).encode()


@pytest.mark.parametrize("tokens", range(1, 50))
def test_only_a_prompt_that_leaves_room_in_its_last_block_is_safe(tokens: int) -> None:
    found = taken(answer(tokens))
    assert (found == "full_blocks") == (tokens % 16 == 0)
    assert isinstance(found, FirstToken) == (tokens % 16 != 0)


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (answer(blocks=3), "unlike_blocks"),
        (answer(blocks=1), "unlike_blocks"),
        (answer(params={"remote_num_tokens": 21}), "unlike_blocks"),
        (answer(params={"remote_block_ids": [[0, 1], [2, 3]]}), "unlike_blocks"),
        (answer(params={"dcp_size": 2}), "unlike_blocks"),
        (answer(params={"pp_size": 2}), "unlike_blocks"),
        (answer(usage={"prompt_tokens": 19}), "unlike_blocks"),
        (answer(params={"remote_block_ids": [1, 2]}), "unreadable"),
        (answer(usage=None), "unreadable"),
        (answer(choices=[]), "unreadable"),
        (answer(choices={}), "unreadable"),
        (answer(choice={"finish_reason": "error"}), "unreadable"),
        (answer(choice={"finish_reason": "stop", "stop_reason": "recomputed", "token_ids": []}), "no_token_ids"),
        (answer(choice={"token_ids": None}), "no_token_ids"),
        (answer(choice={"token_ids": [1, 2]}), "no_token_ids"),
        (answer(prompt_token_ids=None), "no_token_ids"),
        (answer(prompt_token_ids=["a"]), "no_token_ids"),
        (answer(choice={"message": {"content": ""}}), "no_text"),
        (answer(choice={"message": {"content": None}}), "no_text"),
        (answer(choice={"message": {"content": "a\ufffd"}}), "no_text"),
        (answer(choice={"message": {"content": None, "reasoning": "hm"}}), "reasoning"),
        (answer(choice={"message": {"content": None, "reasoning_content": "hm"}}), "reasoning"),
        (answer(choice={"message": {"content": None, "tool_calls": [{}]}}), "tool_calls"),
        (answer(choice={"message": {"content": "<think>"}}), "markup"),
        (answer(choice={"message": {"content": " [THINK]"}}), "markup"),
    ],
)
def test_an_answer_that_cannot_be_used_has_a_reason(raw: bytes, why: str) -> None:
    assert taken(raw) == why


def test_an_answer_of_an_unknown_engine_or_a_too_long_prompt_has_a_reason() -> None:
    assert taken(answer(), block_size=0) == "unknown_engine"
    assert taken(answer(), context=28) == "context"
    assert isinstance(taken(answer(), context=29), FirstToken)
    assert taken(answer(), limit=10) == "too_long"


def test_an_answer_that_has_ended_is_whole_whatever_its_blocks() -> None:
    first = token(answer(32, choice={"finish_reason": "stop", "message": {"content": ""}}, kv_transfer_params=None))
    assert (first.whole, first.text, first.engine) == (True, "", "")


def test_the_usage_of_a_whole_stream_has_no_nulls_at_any_depth() -> None:
    """As in vLLM's own streams; in a whole answer the usage's details have nulls."""
    usage: dict[str, Any] = {"prompt_tokens": 3, "total_tokens": 4, "completion_tokens": 1, "details": None}
    usage["prompt_tokens_details"] = {"cached_tokens": 0, "created_cache_tokens": None}
    first = token(answer(3, choice={"finish_reason": "stop", "message": {"content": ""}}, usage=usage))
    _, _, end = opening_events(first, body(stream=True, stream_options={"include_usage": True}))
    told = json.loads(end.split(b"\n\n")[0].removeprefix(b"data: "))["usage"]
    counts = {"prompt_tokens": 3, "total_tokens": 4, "completion_tokens": 1}
    assert told == {**counts, "prompt_tokens_details": {"cached_tokens": 0}}


def test_the_prefill_leg_keeps_what_decides_its_token() -> None:
    asked = body(
        stream=True,
        stream_options={"include_usage": True},
        max_completion_tokens=7,
        min_tokens=3,
        n=1,
        stop_token_ids=[5],
        logprobs=True,
        temperature=0.5,
        logit_bias={"1": 2},
        ignore_eos=False,
    )
    leg = {name: json.loads(bytes(raw)) for name, raw in sampled_token(asked.members).items()}
    del leg["messages"]
    assert leg == {
        "model": "m",
        "stream": False,
        "max_tokens": 1,
        "max_completion_tokens": 1,
        "min_tokens": 1,
        "stop_token_ids": [5],
        "logprobs": True,
        "temperature": 0.5,
        "logit_bias": {"1": 2},
        "ignore_eos": False,
        "return_token_ids": True,
    }


def test_the_decode_leg_continues_after_the_token() -> None:
    asked = body(min_tokens=3, stream=True)
    plan = Plan(asked, CONNECTORS["nixl"], first_token=True)
    first = token(answer(2))
    leg = body_of(plan.behind(first).decode_leg(None))
    assert leg["kv_transfer_params"] == {"prompt_token_ids": [0, 1, 207]}
    assert (leg["max_tokens"], leg["min_tokens"]) == (8, 2)


@pytest.mark.parametrize(
    ("asked", "why", "even_inexact"),
    [
        (body(), "", ""),
        (body(seed=1), "seed", ""),
        (body(seed=1, temperature=0), "", ""),
        (body(presence_penalty=1), "penalties", ""),
        (body(stop=["x"]), "stop", "stop"),
        (body(response_format={"type": "json_object"}), "structured_output", "structured_output"),
        (body(tools=[{}]), "tool_calls", "tool_calls"),
        (body("completions", logprobs=1), "", ""),
        (body("completions", logprobs=1, stream=True), "logprobs", ""),
        (body(stream_options={"include_usage": 1}), "", ""),
        (body(stream_options={"other": 1}), "options", "options"),
        (body(min_tokens=10), "options", "options"),
        (body(min_tokens=9), "", ""),
        (body(n=2), "n", "n"),
        (body(max_tokens=1), "one_token", "one_token"),
        (body(max_tokens=2), "", ""),
    ],
)
def test_whether_a_request_can_be_exact_follows_from_the_request_alone(
    asked: Body, why: str, even_inexact: str
) -> None:
    assert inexact_because(asked, even_inexact=False) == why
    assert inexact_because(asked, even_inexact=True) == even_inexact


def test_a_streams_first_events_are_as_vllm_writes_them() -> None:
    asked = body(stream=True, return_token_ids=True)
    role, said, end = opening_events(token(answer(2)), asked)
    head = b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":5,"model":"m","choices":[{"index":0,'
    assert role == head + (
        b'"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],'
        b'"prompt_token_ids":[0,1],"prompt_text":null}\n\n'
    )
    assert said == head + (b'"delta":{"content":" word"},"logprobs":null,"finish_reason":null,"token_ids":[207]}]}\n\n')
    assert end == b""


def test_nothing_that_names_an_engine_reaches_the_client() -> None:
    ended = answer(2, choice={"finish_reason": "stop"})
    for asked in (body(), body(stream=True), body(stream=True, return_token_ids=True)):
        first = token(ended, asked)
        shown = whole_answer(first, asked) + b"".join(opening_events(first, asked))
        assert b"transfer_params" not in shown and b"remote_" not in shown
    assert b'"token_ids":null' in whole_answer(token(ended), body())
    assert b'"prompt_token_ids":null' in whole_answer(token(ended), body())


def test_two_answers_become_one() -> None:
    rest = answer(3, choice={"message": {"role": "assistant", "content": " more"}, "token_ids": [8, 9]}, created=6)
    asked = body(return_token_ids=True)
    joined = json.loads(joined_answer(token(answer(2)), rest, asked, lambda usage: {**usage, "completion_tokens": 3}))
    [choice] = joined["choices"]
    assert choice["message"]["content"] == " word more"
    assert (choice["token_ids"], joined["prompt_token_ids"]) == ([207, 8, 9], [0, 1])
    assert (joined["created"], joined["usage"]["completion_tokens"]) == (5, 3)
    assert "kv_transfer_params" not in joined


@pytest.mark.parametrize(
    "rest", [b"{}", b"[]", answer(choices=[{}, {}]), answer(choice={"message": None}), answer(usage=None)]
)
def test_answers_that_cannot_be_joined_are_an_error(rest: bytes) -> None:
    with pytest.raises(ValueError, match=r"joined|choices"):
        joined_answer(token(answer(2)), rest, body(), dict)
