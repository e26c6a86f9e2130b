"""Anthropic's messages, OpenAI's responses and tokens in, tokens out: through both legs they have the text of a
single engine's chat with the same words, and decode has computed none of the prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest

from .bed import Bed
from .engines import MODEL_NAME
from .gateway import Gateway, serving
from .processes import wait_until
from .questions import MAX_TOKENS, ROUTE_QUESTIONS, Question, events, prompt_of

pytestmark = pytest.mark.real

PULLED = 'prompt_tokens_by_source_total{source="external_kv_transfer"}'
COMPUTED = 'prompt_tokens_by_source_total{source="local_compute"}'
GREEDY = {"temperature": 0}
RELEASED = "handoffs_abandoned_total"


@pytest.fixture(scope="module")
def all_routes(bed: Bed, logs: Path) -> Iterator[Gateway]:
    """A gateway that serves all of them, and sends no requests of its own."""
    flags = ("--routes.generate", "true", "--warmup", "false")
    with serving(bed.prefill.url, bed.decode.url, logs / "routes.log", *flags) as started:
        yield started


def message(url: str, text: str, stream: bool) -> str:
    asked: Any = {"model": MODEL_NAME, "max_tokens": MAX_TOKENS, "messages": [{"role": "user", "content": text}]}
    with anthropic.Anthropic(base_url=url, api_key="k", max_retries=0) as client:
        if not stream:
            answer = client.messages.create(**asked, extra_body=GREEDY)
        else:
            with client.messages.stream(**asked, extra_body=GREEDY) as pieces:
                said = "".join(pieces.text_stream)
                answer = pieces.get_final_message()
            assert said == "".join(block.text for block in answer.content if block.type == "text")
    assert answer.usage.output_tokens == MAX_TOKENS and answer.stop_reason == "max_tokens"
    return "".join(block.text for block in answer.content if block.type == "text")


def response(url: str, text: str, stream: bool) -> str:
    asked: Any = {"model": MODEL_NAME, "max_output_tokens": MAX_TOKENS, "input": text, "temperature": 0}
    with openai.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0) as client:
        if not stream:
            answer = client.responses.create(**asked)
        else:
            with client.responses.stream(**asked) as pieces:
                said = "".join(event.delta for event in pieces if event.type == "response.output_text.delta")
                answer = pieces.get_final_response()
            assert said == answer.output_text
        assert "_transfer_params" not in answer.model_dump_json(exclude_none=True)
        assert client.responses.retrieve(answer.id).output_text == answer.output_text
    assert answer.usage is not None and answer.usage.output_tokens == MAX_TOKENS
    return answer.output_text


def generated(url: str, text: str, stream: bool, tokenizer: str) -> str:
    named = {"model": MODEL_NAME, "messages": [{"role": "user", "content": text}]}
    ids = httpx.post(f"{tokenizer}/tokenize", json=named).raise_for_status().json()["tokens"]
    body = {
        "model": MODEL_NAME,
        "token_ids": ids,
        "output_mode": "text",
        "stream": stream,
        "sampling_params": {**GREEDY, "max_tokens": MAX_TOKENS},
    }
    path = f"{url}/inference/v1/generate"
    if not stream:
        choice = httpx.post(path, json=body, timeout=60).raise_for_status().json()["choices"][0]
        assert len(choice["token_ids"]) == MAX_TOKENS
        return str(choice["text"])
    with httpx.stream("POST", path, json=body, timeout=60) as answer:
        answer.raise_for_status()
        return "".join(choice["text"] for event in events(answer) for choice in event["choices"])


@pytest.mark.parametrize("question", ROUTE_QUESTIONS, ids=lambda question: question.salt)
def test_the_text_is_a_single_engines_and_decode_pulls_the_whole_prompt(
    bed: Bed, all_routes: Gateway, question: Question
) -> None:
    route, _, way = question.salt.partition("-")
    ask: Callable[[str, str, bool], str] = {
        "messages": message,
        "responses": response,
        "generate": lambda url, text, stream: generated(url, text, stream, bed.decode.url),
    }[route]
    before = bed.decode.metrics()
    text = ask(all_routes.url, prompt_of(question.tokens, question.salt), way == "streamed")
    assert text == bed.single[question].text
    tokens = bed.single[question].usage["prompt_tokens"]
    wait_until(lambda: bed.decode.metrics()[PULLED] >= before[PULLED] + tokens, 5, "decode to count the tokens pulled")
    after = bed.decode.metrics()
    assert after[PULLED] - before[PULLED] == tokens
    assert after[COMPUTED] == before[COMPUTED]


def test_a_response_that_continues_another_goes_to_the_engine_that_has_it(bed: Bed, all_routes: Gateway) -> None:
    with openai.OpenAI(base_url=f"{all_routes.url}/v1", api_key="k", max_retries=0) as client:
        first = client.responses.create(model=MODEL_NAME, input=prompt_of(40, "kept"), max_output_tokens=8)
        second = client.responses.create(
            model=MODEL_NAME, input="and then?", max_output_tokens=8, previous_response_id=first.id
        )
        assert first.usage is not None and second.usage is not None
        assert second.usage.input_tokens > first.usage.input_tokens + 8
        queued = client.responses.create(
            model=MODEL_NAME, input=prompt_of(40, "behind"), max_output_tokens=8, background=True
        )
        assert queued.status == "queued"
        wait_until(lambda: client.responses.retrieve(queued.id).status == "incomplete", 20, "the response to be there")
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve("resp_unknown")


def test_errors_have_anthropics_shape(all_routes: Gateway) -> None:
    with anthropic.Anthropic(base_url=all_routes.url, api_key="k", max_retries=0) as client:
        with pytest.raises(anthropic.BadRequestError) as refused:
            client.messages.create(model=MODEL_NAME, max_tokens=0, messages=[{"role": "user", "content": "a"}])
        assert isinstance(refused.value.body, dict) and refused.value.body["type"] == "error"
        with pytest.raises(anthropic.BadRequestError, match=r"context length|too long|maximum"):
            long = prompt_of(4000, "long")
            client.messages.create(model=MODEL_NAME, max_tokens=5, messages=[{"role": "user", "content": long}])


def test_blocks_of_a_request_that_decode_refuses_are_freed_at_once(bed: Bed, all_routes: Gateway) -> None:
    """An engine does not notify prefill of requests that it refuses on this endpoint; the gateway releases the
    blocks, on another."""
    named = {"model": MODEL_NAME, "messages": [{"role": "user", "content": prompt_of(300, "refused")}]}
    ids = httpx.post(f"{bed.decode.url}/tokenize", json=named).raise_for_status().json()["tokens"]
    before = sum(value for name, value in all_routes.metrics().items() if name.startswith(RELEASED))
    body = {"model": MODEL_NAME, "token_ids": ids, "sampling_params": {"max_tokens": 4, "logprobs": 100_000}}
    answer = httpx.post(f"{all_routes.url}/inference/v1/generate", json=body, timeout=60)
    assert answer.status_code == 400, answer.text
    wait_until(bed.prefill.is_idle, 10, "prefill to free the blocks, long before its lease ends")
    after = sum(value for name, value in all_routes.metrics().items() if name.startswith(RELEASED))
    assert after == before + 1
