"""A stream whose decode engine is lost in the middle of it is one answer to its client, and the right one.

The engines live on: relays sever the streams, at an exact token. `test_decode_death.py` kills an engine.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from .bed import Bed
from .engines import Engine
from .gateway import Gateway, serving
from .questions import (
    SEVERED_QUESTIONS,
    SEVERED_TOKENS,
    Api,
    BrokenStreamError,
    Question,
    as_answer,
    events,
    long_body,
    prompt_of,
    streaming,
)
from .severing import Cut, Severing, severing

pytestmark = pytest.mark.real

LENGTH = 40
CUTS = (
    (Cut(1),),
    (Cut(1, into=9),),
    (Cut(2),),
    (Cut(3, into=120),),
    (Cut(7), Cut(7), Cut(7)),
    (Cut(16, into=9),),
    (Cut(5), Cut(1, into=9)),
    (Cut(20), Cut(10)),
    (Cut(33),),
    (Cut(LENGTH - 1, into=9),),  # one token is left
)
CUT_AT = dict(zip(SEVERED_TOKENS, CUTS, strict=True))
TOOLS = [{"type": "function", "function": {"name": "weigh", "parameters": {"type": "object", "properties": {}}}}]
MEMORYLESS: dict[str, dict[str, Any]] = {
    "a repetition penalty, which counts the prompt": {"repetition_penalty": 1.3},
    "a bias": {"logit_bias": {"100": 5.0}},
    "some tokens only": {"allowed_token_ids": list(range(300, 500))},
    "a minimum of tokens": {"min_tokens": 35, "ignore_eos": False},
    "a seed that greed makes idle": {"seed": 5},
    "tools that may not be called": {"tools": TOOLS, "tool_choice": "none"},
    "the old name of a bound": {"max_tokens": 64, "max_completion_tokens": LENGTH},
}
FLAWED: dict[str, tuple[Api, dict[str, Any]]] = {
    "penalties": (Api.CHAT, {"presence_penalty": 1.5}),
    "seed": (Api.COMPLETIONS, {"temperature": 0.8, "seed": 5}),
    "structured_output": (Api.CHAT, {"structured_outputs": {"regex": "[a-z]{3}[0-9]{60}"}}),
    "stop": (Api.COMPLETIONS, {"stop": ["kanakana"]}),
    "logprobs": (Api.COMPLETIONS, {"logprobs": 1}),
}


@pytest.fixture(scope="module")
def relays(bed: Bed, second_decode: Engine) -> Iterator[Severing]:
    with severing(bed.decode.url, second_decode.url) as started:
        yield started


@pytest.fixture(scope="module")
def severed_gateway(bed: Bed, relays: Severing, logs: Path) -> Iterator[Gateway]:
    # Both backends lose streams here all the time, which must not lead to an ejection or use up a budget.
    # A first token from prefill would move each cut by one.
    flags = ["--first-token", "decode", "--warmup", "false", "--breaker.max-ejected", "0", "--health.interval", "0.2"]
    with serving(bed.prefill.url, relays.urls, logs / "gateway-severed.log", *flags) as started:
        yield started


def streamed(gateway: Gateway, api: Api, body: dict[str, Any]) -> list[dict[str, Any]]:
    with streaming(gateway.url, api, body) as response:
        return list(events(response))


def assert_one_answer(api: Api, stream: list[dict[str, Any]]) -> None:
    """No event shows that several legs made the answer, nor members that only the gateway asked for."""
    assert len({(event["id"], event["object"], event["created"], event["model"]) for event in stream}) == 1
    choices = [choice for event in stream for choice in event["choices"]]
    assert all(choice["index"] == 0 for choice in choices)
    if api is Api.CHAT:
        assert ["role" in choice["delta"] for choice in choices] == [True] + [False] * (len(choices) - 1)
    assert [choice["finish_reason"] is None for choice in choices] == [True] * (len(choices) - 1) + [False]
    assert ["usage" in event for event in stream] == [False] * (len(stream) - 1) + [True]
    assert not any("token_ids" in json.dumps(event).replace('"prompt_token_ids": null', "") for event in stream)


@pytest.mark.parametrize("question", SEVERED_QUESTIONS, ids=str)
def test_a_severed_stream_goes_on_as_the_single_engines_answer(
    bed: Bed, relays: Severing, severed_gateway: Gateway, question: Question
) -> None:
    cuts = CUT_AT[question.tokens]
    relays.plan(*cuts)
    stream = streamed(severed_gateway, question.api, question.body())
    assert [leg.severed for leg in relays.legs] == [True] * len(cuts) + [False]
    assert as_answer(question.api, stream) == bed.single[question]
    assert_one_answer(question.api, stream)


@pytest.mark.parametrize("api", Api, ids=lambda api: api.name.lower())
def test_a_stream_severed_behind_its_last_token_needs_no_other_leg(
    bed: Bed, relays: Severing, severed_gateway: Gateway, api: Api
) -> None:
    question = next(question for question in SEVERED_QUESTIONS if question.api is api)
    relays.plan(Cut(LENGTH))
    stream = streamed(severed_gateway, api, question.body())
    assert [leg.severed for leg in relays.legs] == [True]
    assert as_answer(api, stream) == bed.single[question]
    assert_one_answer(api, stream)


@pytest.mark.parametrize("api", Api, ids=lambda api: api.name.lower())
def test_token_ids_that_the_client_asked_for_are_those_of_one_answer(
    bed: Bed, relays: Severing, severed_gateway: Gateway, api: Api
) -> None:
    body = long_body(api, prompt_of(75, "ids"), LENGTH, return_token_ids=True)
    relays.plan(Cut(13, into=9))
    stream = streamed(severed_gateway, api, body)
    assert [leg.severed for leg in relays.legs] == [True, False]
    with streaming(bed.prefill.url, api, body) as response:
        assert ids_of(api, stream) == ids_of(api, list(events(response)))


def ids_of(api: Api, stream: list[dict[str, Any]]) -> tuple[list[list[int]], list[int]]:
    """The prompt's ids, as often as they were sent, and the answer's."""
    choices = [choice for event in stream for choice in event["choices"]]
    holders = stream if api is Api.CHAT else choices
    prompts = [holder["prompt_token_ids"] for holder in holders if holder.get("prompt_token_ids")]
    return prompts, [token for choice in choices for token in choice.get("token_ids") or ()]


@pytest.mark.parametrize("what", MEMORYLESS)
def test_answers_with_options_that_depend_on_the_tokens_alone_are_continued_exactly(
    bed: Bed, relays: Severing, severed_gateway: Gateway, what: str
) -> None:
    """The undisturbed answer is the prefill engine's, which can decode as well and has lost nothing."""
    body = long_body(Api.CHAT, prompt_of(52, what), LENGTH, **MEMORYLESS[what])
    relays.plan(Cut(17))
    stream = streamed(severed_gateway, Api.CHAT, body)
    assert [leg.severed for leg in relays.legs] == [True, False]
    with streaming(bed.prefill.url, Api.CHAT, body) as response:
        assert as_answer(Api.CHAT, stream) == as_answer(Api.CHAT, events(response))
    assert_one_answer(Api.CHAT, stream)


def test_a_chats_log_probabilities_are_continued_exactly(bed: Bed, relays: Severing, severed_gateway: Gateway) -> None:
    body = long_body(Api.CHAT, prompt_of(53, "logprobs"), LENGTH, logprobs=True, top_logprobs=2)
    relays.plan(Cut(11))
    stream = streamed(severed_gateway, Api.CHAT, body)
    assert [leg.severed for leg in relays.legs] == [True, False]
    with streaming(bed.prefill.url, Api.CHAT, body) as response:
        undisturbed = list(events(response))
    assert logprobs_of(stream) == logprobs_of(undisturbed)


def logprobs_of(stream: list[dict[str, Any]]) -> list[tuple[list[int], object]]:
    """Each token's bytes and log probability, and those of its runner-up."""
    entries = [
        entry
        for event in stream
        for choice in event["choices"]
        if choice["logprobs"]
        for entry in choice["logprobs"]["content"]
    ]
    assert len(entries) == LENGTH
    return [
        (top["bytes"], pytest.approx(top["logprob"], abs=1e-3))
        for entry in entries
        for top in (entry, *entry["top_logprobs"])
    ]


@pytest.mark.parametrize("why", FLAWED)
def test_a_stream_that_cannot_be_continued_exactly_ends_with_an_error_that_says_why(
    relays: Severing, severed_gateway: Gateway, why: str
) -> None:
    api, fields = FLAWED[why]
    counter = f'resumes_refused_total{{reason="{why}"}}'
    before = severed_gateway.metrics().get(counter, 0)
    # These streams carry no token ids, since no continuation would need them; a test that asks for ids has them
    # counted.
    body = long_body(api, prompt_of(54, why), LENGTH, return_token_ids=True, **fields)
    relays.plan(Cut(12))
    received: list[dict[str, Any]] = []
    with streaming(severed_gateway.url, api, body) as response, pytest.raises(BrokenStreamError, match=why):
        received.extend(events(response))
    assert [leg.severed for leg in relays.legs] == [True]
    assert severed_gateway.metrics()[counter] == before + 1


@pytest.mark.parametrize("why", ["penalties", "seed", "structured_output"])
def test_continuations_that_the_gateway_refuses_would_have_been_wrong(second_decode: Engine, why: str) -> None:
    """By hand, without the gateway: the engine does begin anew with what it counts or draws."""
    _, fields = FLAWED[why]
    url = second_decode.url + Api.COMPLETIONS.value
    cut, length = 10, LENGTH
    body = long_body(Api.COMPLETIONS, prompt_of(55, why), length, return_token_ids=True, **fields)
    whole = httpx.post(url, json=body, timeout=60).raise_for_status().json()["choices"][0]
    again = httpx.post(url, json=body, timeout=60).raise_for_status().json()["choices"][0]
    assert again["token_ids"] == whole["token_ids"]
    on = {**body, "prompt": whole["prompt_token_ids"] + whole["token_ids"][:cut], "max_tokens": length - cut}
    rest = httpx.post(url, json=on, timeout=60).raise_for_status().json()["choices"][0]
    assert rest["token_ids"] != whole["token_ids"][cut:]
