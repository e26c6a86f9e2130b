"""The bounds on an answer's length."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pd_proxy.errors import InvalidRequest
from pd_proxy.requests.endpoints import Endpoint
from pd_proxy.requests.members import read_members
from pd_proxy.requests.output_bounds import bound_output

from tests.support import chat, pools

CASES: list[tuple[Endpoint, str]] = [
    ("chat", "max_tokens"),
    ("chat", "max_completion_tokens"),
    ("completions", "max_tokens"),
    ("messages", "max_tokens"),
    ("responses", "max_output_tokens"),
    ("generate", "sampling_params.max_tokens"),
    ("sglang_generate", "sampling_params.max_new_tokens"),
]


def bounded(body: Any, endpoint: Endpoint, default: int | None, most: int | None) -> Any:
    """The request that an engine receives."""
    members = read_members(json.dumps(body).encode())
    bound_output(members, endpoint, default, most)
    return {name: json.loads(bytes(value)) for name, value in members.items()}


def asking(name: str, value: Any) -> dict[str, Any]:
    nested, _, leaf = name.rpartition(".")
    return {nested: {leaf: value, "top_k": 1}} if nested else {leaf: value, "top_k": 1}


@pytest.mark.parametrize(("endpoint", "name"), CASES)
def test_a_bound_above_the_limit_is_refused_under_each_of_its_names(endpoint: Endpoint, name: str) -> None:
    for value in (101, 100.5, 10**30):
        with pytest.raises(InvalidRequest, match="is above 100") as caught:
            bounded(asking(name, value), endpoint, 10, 100)
        assert caught.value.param == name.rpartition(".")[2]
    for value in (100, 1, 0, -1):  # the engine refuses values that are no number of tokens
        assert bounded(asking(name, value), endpoint, 10, 100) == asking(name, value)


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize(("endpoint", "name"), [case for case in CASES if case[1] != "max_completion_tokens"])
def test_a_request_without_a_bound_gets_the_default(endpoint: Endpoint, name: str, missing: bool) -> None:
    body = {} if missing else asking(name, None)
    rest = {} if missing else {"top_k": 1}
    nested, _, leaf = name.rpartition(".")
    for default, most, applied in ((10, 100, 10), (None, 100, 100), (10, None, 10)):
        wanted = {leaf: applied, **rest}
        assert bounded(body, endpoint, default, most) == ({nested: wanted} if nested else wanted)
    assert bounded(body, endpoint, None, None) == body


def test_both_names_of_one_bound_are_limited() -> None:
    with pytest.raises(InvalidRequest):
        bounded({"max_tokens": 1000, "max_completion_tokens": 1}, "chat", None, 100)
    assert bounded({"max_completion_tokens": 5}, "chat", 10, 100) == {"max_completion_tokens": 5}


def test_each_of_several_prompts_is_limited() -> None:
    body = {"sampling_params": [{"max_new_tokens": 5}, {}]}
    assert bounded(body, "sglang_generate", 10, 100) == {
        "sampling_params": [{"max_new_tokens": 5}, {"max_new_tokens": 10}]
    }
    with pytest.raises(InvalidRequest):
        bounded({"sampling_params": [{}, {"max_new_tokens": 500}]}, "sglang_generate", 10, 100)


async def test_clients_get_the_error_and_answers_end_at_the_limit() -> None:
    async with pools(limits={"max_tokens": 8, "default_max_tokens": 4}) as (running, [p], [d]):
        refused = await running.http.post("/v1/chat/completions", json=chat(max_tokens=9))
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "max_tokens"
        assert not p.requests and not d.requests
        body = chat(ignore_eos=True)
        del body["max_tokens"]
        for path in ("/v1/chat/completions", "/invocations"):
            answer = (await running.http.post(path, json=body)).json()
            assert answer["usage"]["completion_tokens"] == 4
            assert answer["choices"][0]["finish_reason"] == "length"
        batch = {**body, "messages": [body["messages"]] * 2}
        answer = await running.http.post("/v1/chat/completions/batch", json={**batch, "max_tokens": 9})
        assert answer.status_code == 400
