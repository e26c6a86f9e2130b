"""The official client works with a simulator as with a real server."""

from __future__ import annotations

from collections.abc import AsyncIterator

import openai
import pytest
from pd_proxy_simulator import Simulator

from .test_wire import WEATHER


@pytest.fixture
async def official(mixed: Simulator) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=mixed.url + "/v1",
        api_key="none",
        max_retries=0,
        http_client=openai.DefaultAsyncHttpxClient(verify=False),
    ) as client:
        yield client


MESSAGES = [{"role": "user", "content": "tell me of the river"}]


async def test_it_lists_models(official: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in official.models.list()] == ["sim"]


async def test_it_chats(official: openai.AsyncOpenAI) -> None:
    answer = await official.chat.completions.create(model="sim", messages=MESSAGES, max_tokens=20)
    assert answer.choices[0].message.content
    assert answer.usage is not None and answer.usage.completion_tokens <= 20


async def test_it_streams(official: openai.AsyncOpenAI) -> None:
    whole = await official.chat.completions.create(model="sim", messages=MESSAGES, max_tokens=20)
    stream = await official.chat.completions.create(
        model="sim", messages=MESSAGES, max_tokens=20, stream=True, stream_options={"include_usage": True}
    )
    text, usage = "", None
    async for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
    assert text == whole.choices[0].message.content
    assert usage == whole.usage or (usage is not None and usage.total_tokens == whole.usage.total_tokens)


async def test_it_calls_tools(official: openai.AsyncOpenAI) -> None:
    answer = await official.chat.completions.create(
        model="sim", messages=MESSAGES, tools=[WEATHER], tool_choice="required"
    )
    assert answer.choices[0].message.tool_calls[0].function.name == "get_weather"
    async with official.chat.completions.stream(
        model="sim", messages=MESSAGES, tools=[WEATHER], tool_choice="required"
    ) as stream:
        final = await stream.get_final_completion()
    streamed = final.choices[0].message.tool_calls[0].function
    assert streamed.arguments == answer.choices[0].message.tool_calls[0].function.arguments


async def test_it_reads_log_probabilities(official: openai.AsyncOpenAI) -> None:
    answer = await official.chat.completions.create(
        model="sim", messages=MESSAGES, max_tokens=5, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    assert all(len(entry.top_logprobs) == 3 and entry.top_logprobs[0].token == entry.token for entry in content)
    completion = await official.completions.create(model="sim", prompt="the river", max_tokens=5, logprobs=2)
    logprobs = completion.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == 5


async def test_it_asks_for_several_answers_and_several_prompts(official: openai.AsyncOpenAI) -> None:
    answer = await official.chat.completions.create(model="sim", messages=MESSAGES, max_tokens=20, n=3)
    assert len({choice.message.content for choice in answer.choices}) == 3
    completion = await official.completions.create(model="sim", prompt=["one", "two"], max_tokens=8)
    assert [choice.index for choice in completion.choices] == [0, 1]
    completion = await official.completions.create(model="sim", prompt=[[100, 101], [102]], max_tokens=8)
    assert completion.usage.prompt_tokens == 3


async def test_it_raises_its_own_errors(official: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        await official.chat.completions.create(model="other", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        await official.completions.create(model="sim", prompt="river " * 40000)
