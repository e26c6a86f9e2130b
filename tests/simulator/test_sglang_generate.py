"""SGLang's `/generate` on an engine without disaggregation."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from pd_proxy_simulator import Simulator
from pd_proxy_simulator.tokens import tokenize

from tests.support import PROMPT, completion, events_of, simulators

SAMPLING = {"max_new_tokens": 8, "temperature": 0}


@pytest.fixture
async def engine() -> AsyncIterator[Simulator]:
    async with simulators("mixed", connector="sglang") as [sim]:
        yield sim


async def ask(engine: Simulator, path: str = "/generate", **body: Any) -> httpx.Response:
    async with httpx.AsyncClient(base_url=engine.url, timeout=60, verify=False) as http:
        return await http.post(path, json=body)


async def test_it_generates_the_text_of_completions(engine: Simulator) -> None:
    expected = (await ask(engine, "/v1/completions", **completion(max_tokens=8))).json()["choices"][0]["text"]
    for prompt in ({"text": PROMPT}, {"input_ids": tokenize(PROMPT)}):
        answer = (await ask(engine, **prompt, sampling_params=SAMPLING)).json()
        assert answer["text"] == expected
        meta = answer["meta_info"]
        assert meta["finish_reason"] == {"type": "length", "length": 8}
        assert (meta["prompt_tokens"], meta["completion_tokens"]) == (len(tokenize(PROMPT)), 8)
        assert len(answer["output_ids"]) == 8 and "input_token_logprobs" not in meta


async def test_each_event_of_a_stream_repeats_everything_before_it(engine: Simulator) -> None:
    whole = (await ask(engine, text=PROMPT, sampling_params=SAMPLING)).json()
    found = events_of((await ask(engine, text=PROMPT, sampling_params=SAMPLING, stream=True)).text)
    assert [event["meta_info"]["completion_tokens"] for event in found] == list(range(1, 9))
    assert all(after["text"].startswith(before["text"]) for before, after in itertools.pairwise(found))
    assert [event["meta_info"]["finish_reason"] for event in found[:-1]] == [None] * 7
    assert found[-1]["text"] == whole["text"] and found[-1]["output_ids"] == whole["output_ids"]


async def test_a_batch_is_a_list_even_of_one(engine: Simulator) -> None:
    for texts in (["alone"], ["the first", "the second"]):
        answer = (await ask(engine, text=texts, sampling_params=SAMPLING, rid="r")).json()
        assert [item["meta_info"]["id"] for item in answer] == [f"r_{n}" for n in range(len(texts))]
        found = events_of((await ask(engine, text=texts, sampling_params=SAMPLING, stream=True)).text)
        last = {event["index"]: event["text"] for event in found}
        assert last == {n: item["text"] for n, item in enumerate(answer)}


async def test_the_prompts_log_probabilities_begin_at_the_requested_token(engine: Simulator) -> None:
    ids = tokenize(PROMPT)
    asked = {"text": PROMPT, "sampling_params": SAMPLING, "return_logprob": True}
    for start, count in ((None, 0), (-1, 0), (0, len(ids)), (5, len(ids) - 5)):
        meta = (await ask(engine, **asked, logprob_start_len=start, top_logprobs_num=2)).json()["meta_info"]
        assert [token for _, token, _ in meta["input_token_logprobs"]] == ids[len(ids) - count :]
        assert len(meta["output_token_logprobs"]) == len(meta["output_top_logprobs"]) == 8
        assert len(meta["input_top_logprobs"]) == count
    whole = (await ask(engine, **asked, logprob_start_len=0, return_text_in_logprobs=True)).json()["meta_info"]
    assert whole["input_token_logprobs"][0][0] is None
    assert "".join(text for _, _, text in whole["input_token_logprobs"]) == PROMPT


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"text": None},
        {"input_ids": []},
        {"input_ids": [[1], 2]},
        {"input_ids": [10**7]},
        {"input_embeds": [[0.5]]},
        {"text": "a", "sampling_params": {"max_tokens": 5}},
        {"text": "a", "sampling_params": {"max_new_tokens": "5"}},
        {"text": ["a", "b"], "sampling_params": [{}]},
        {"text": ["a", "b"], "sampling_params": [{"n": 1}, {"n": 2}]},
        {"text": ["a", "b"], "rid": ["one"]},
        {"text": ["a", "b"], "rid": ["one", "one"]},
        {"text": ["a", "b"], "return_logprob": [True]},
        {"text": "a " * 10**5},
    ],
)
async def test_refusals_of_the_handler_have_sglangs_error_shape(engine: Simulator, body: dict[str, Any]) -> None:
    answer = await ask(engine, **body)
    assert answer.status_code == 400
    assert list(answer.json()) == ["error"] and list(answer.json()["error"]) == ["message"]


async def test_wrong_types_have_the_error_shape_of_every_route(engine: Simulator) -> None:
    for body in ({"text": 5}, {"text": "a", "stream": "maybe"}, {"input_ids": [1.5]}):
        answer = await ask(engine, **body)
        assert answer.status_code == 400, body
    assert (await ask(engine, text=5)).json()["object"] == "error"


async def test_an_engine_that_aborts_says_so_in_the_stream(engine: Simulator) -> None:
    engine.faults.add("error_event_first", leg="local")
    [event] = events_of((await ask(engine, text="a", stream=True)).text)
    assert event["meta_info"]["finish_reason"]["type"] == "abort"
    assert event["meta_info"]["finish_reason"]["status_code"] == 500


async def test_other_engines_have_no_such_route() -> None:
    async with simulators("mixed") as [sim]:
        assert (await ask(sim, text="a")).status_code == 404


async def test_an_engine_with_a_role_requires_a_room_for_each_prompt() -> None:
    async with simulators("prefill", "decode", connector="sglang") as [p, d]:
        here = {"bootstrap_host": "127.0.0.1", "bootstrap_port": p.side_port}
        for engine in (p, d):
            answer = await ask(engine, text=PROMPT, **here)
            assert answer.status_code == 400 and "without bootstrap room" in answer.json()["error"]["message"]
            assert (await ask(engine, text=PROMPT, bootstrap_room="5", **here)).status_code == 400
            assert (await ask(engine, text=["a", "b"], bootstrap_room=[5], **here)).status_code == 500
            assert (await ask(engine, text="a", bootstrap_room=[5], **here)).status_code == 500
            assert engine.engine.dead is None


@pytest.mark.parametrize("rooms", [7, [7, 8]], ids=["counted", "told"])
async def test_the_legs_of_a_batch_are_paired_and_only_prefill_has_the_prompts_log_probabilities(rooms: Any) -> None:
    scored = {"sampling_params": SAMPLING, "return_logprob": True, "logprob_start_len": 0}
    async with simulators("prefill", "decode", connector="sglang") as [p, d]:
        each = isinstance(rooms, list)
        here = {
            "bootstrap_host": ["127.0.0.1"] * 2 if each else "127.0.0.1",
            "bootstrap_port": [p.side_port] * 2 if each else p.side_port,
            "bootstrap_room": rooms,
        }
        texts = ["the first of two", "the second of two"]
        answers = await asyncio.gather(*(ask(engine, text=texts, **here, **scored) for engine in (p, d)))
        prefill, decode = (answer.json() for answer in answers)
        for first, whole, text in zip(prefill, decode, texts, strict=True):
            assert whole["output_ids"][:1] == first["output_ids"] and len(whole["output_ids"]) == 8
            given = first["meta_info"]["input_token_logprobs"]
            assert [token for _, token, _ in given] == tokenize(text)
            assert whole["meta_info"]["input_token_logprobs"] == []
        assert d.engine.pulls == 2


async def test_a_room_that_is_in_use_kills_the_engine() -> None:
    async with simulators("prefill", connector="sglang", lease=0.5) as [p]:
        here = {"bootstrap_host": "127.0.0.1", "bootstrap_port": p.side_port, "bootstrap_room": [7, 7]}
        each = {**here, "bootstrap_host": ["127.0.0.1"] * 2, "bootstrap_port": [p.side_port] * 2}
        assert (await ask(p, text=["a", "b"], **each)).status_code == 500
        assert p.engine.dead is not None
