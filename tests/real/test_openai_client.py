"""The official openai client needs nothing but another base_url."""

from __future__ import annotations

from typing import Any

import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam

from .bed import Bed
from .engines import MODEL_NAME
from .questions import MAX_TOKENS, Api, Question, prompt_of

pytestmark = pytest.mark.real

TOKENS = 65
PROMPT = prompt_of(TOKENS)
MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": PROMPT}]
PROMPTS = [prompt_of(64), prompt_of(200)]
SAMPLED: dict[str, Any] = {"temperature": 0.8, "seed": 3, "max_tokens": 12, "extra_body": {"ignore_eos": True}}
"""For n > 1, which vLLM refuses for greedy requests. Every choice has exactly twelve tokens."""


def test_the_engines_model_is_listed(client: OpenAI) -> None:
    assert MODEL_NAME in [model.id for model in client.models.list()]


def test_a_chat_completion_is_the_single_engines(bed: Bed, client: OpenAI) -> None:
    expected = bed.single[Question(Api.CHAT, False, TOKENS)]
    answer = client.chat.completions.create(model=MODEL_NAME, messages=MESSAGES, temperature=0, max_tokens=MAX_TOKENS)
    assert answer.choices[0].message.content == expected.text
    assert answer.usage is not None
    assert answer.usage.total_tokens == expected.usage["total_tokens"]


def test_max_completion_tokens_bounds_a_chat_completion(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL_NAME, messages=MESSAGES, temperature=0, max_completion_tokens=9, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 9


def test_a_completion_is_the_single_engines(bed: Bed, client: OpenAI) -> None:
    expected = bed.single[Question(Api.COMPLETIONS, False, TOKENS)]
    answer = client.completions.create(model=MODEL_NAME, prompt=PROMPT, temperature=0, max_tokens=MAX_TOKENS)
    assert answer.choices[0].text == expected.text
    assert answer.usage is not None
    assert answer.usage.total_tokens == expected.usage["total_tokens"]


def test_a_stream_with_usage_ends_with_one_usage_and_no_choice(bed: Bed, client: OpenAI) -> None:
    expected = bed.single[Question(Api.CHAT, True, TOKENS)]
    chunks = list(
        client.chat.completions.create(
            model=MODEL_NAME,
            messages=MESSAGES,
            temperature=0,
            max_tokens=MAX_TOKENS,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == expected.text
    assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == expected.usage["completion_tokens"]


def test_a_stream_without_usage_has_none(client: OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model=MODEL_NAME, messages=MESSAGES, temperature=0, max_tokens=MAX_TOKENS, stream=True
        )
    )
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)


def test_a_chat_completion_has_log_probabilities_for_every_token(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL_NAME, messages=MESSAGES, temperature=0, max_tokens=MAX_TOKENS, logprobs=True, top_logprobs=2
    )
    assert answer.usage is not None
    assert answer.choices[0].logprobs is not None
    tokens = answer.choices[0].logprobs.content
    assert tokens is not None
    assert len(tokens) == answer.usage.completion_tokens
    assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in tokens)


def log_probabilities(client: OpenAI, prompt: str, **fields: Any) -> tuple[list[tuple[Any, ...]], int, int]:
    """Each token of a streamed chat, with its log probability and its runners-up; how many events had a token and no
    text; the tokens that the usage counts."""
    tokens: list[tuple[Any, ...]] = []
    silent = counted = 0
    stream = client.chat.completions.create(
        model=MODEL_NAME,
        messages=[{"role": "user", "content": prompt}],
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        logprobs=True,
        top_logprobs=2,
        **fields,
    )
    for chunk in stream:
        counted = chunk.usage.completion_tokens if chunk.usage else counted
        for choice in chunk.choices:
            entries = choice.logprobs.content or [] if choice.logprobs else []
            silent += bool(entries) and not choice.delta.content
            tokens += [
                (top.token, top.bytes, pytest.approx(top.logprob, abs=1e-3))
                for entry in entries
                for top in (entry, *entry.top_logprobs)
            ]
    return tokens, silent, counted


def test_streamed_chats_have_the_engines_log_probabilities_of_every_token(bed: Bed, client: OpenAI) -> None:
    """Also those of tokens that are no whole character, whose events have no text."""
    silent = 0
    with OpenAI(base_url=f"{bed.prefill.url}/v1", api_key="none", max_retries=0, timeout=60) as engine:
        for number in range(12):
            prompt = prompt_of(20 + number, "logprobs")
            fields = {"max_tokens": 24, "extra_body": {"ignore_eos": True}}
            tokens, _, counted = log_probabilities(client, prompt, **fields)
            expected, without_text, _ = log_probabilities(engine, prompt, **fields)
            assert tokens == expected
            assert len(tokens) == 3 * counted == 3 * 24
            silent += without_text
    assert silent, "no answer had such a token, so nothing has been shown"


def test_a_completion_has_log_probabilities_for_every_token(client: OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL_NAME, prompt=PROMPT, temperature=0, max_tokens=MAX_TOKENS, logprobs=2
    )
    assert answer.usage is not None
    assert answer.choices[0].logprobs is not None
    assert len(answer.choices[0].logprobs.token_logprobs or []) == answer.usage.completion_tokens


def test_two_choices_share_one_prompt_in_the_usage(bed: Bed, client: OpenAI) -> None:
    prompt_tokens = bed.single[Question(Api.CHAT, False, TOKENS)].usage["prompt_tokens"]
    answer = client.chat.completions.create(model=MODEL_NAME, messages=MESSAGES, n=2, **SAMPLED)
    assert sorted(choice.index for choice in answer.choices) == [0, 1]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt_tokens, 24)


def test_two_choices_can_be_streamed(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL_NAME, messages=MESSAGES, n=2, stream=True, stream_options={"include_usage": True}, **SAMPLED
    )
    chunks = list(stream)
    finished = [choice.index for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert sorted(finished) == [0, 1]
    assert chunks[-1].usage.completion_tokens == 24


def test_a_list_of_prompts_gives_a_choice_for_each(bed: Bed, client: OpenAI) -> None:
    single = [bed.single[Question(Api.COMPLETIONS, False, tokens)] for tokens in (64, 200)]
    answer = client.completions.create(model=MODEL_NAME, prompt=PROMPTS, temperature=0, max_tokens=MAX_TOKENS)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert [choice.text for choice in answer.choices] == [expected.text for expected in single]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 264
    assert answer.usage.completion_tokens == sum(expected.usage["completion_tokens"] for expected in single)


def test_a_list_of_prompts_can_be_streamed(client: OpenAI) -> None:
    stream = client.completions.create(
        model=MODEL_NAME,
        prompt=PROMPTS,
        temperature=0,
        max_tokens=MAX_TOKENS,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    finished = [choice.index for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert sorted(finished) == [0, 1]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens == 264
