"""OpenAI's official client against the gateway and simulated pools."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import openai
import pytest
from pd_proxy_simulator import Simulator

from tests.support import PROMPT, Running, pools

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
MESSAGES = [{"role": "user", "content": PROMPT}]


@asynccontextmanager
async def clients(**settings: object) -> AsyncIterator[tuple[openai.AsyncOpenAI, Running, Simulator, Simulator]]:
    async with (
        pools(**settings) as (running, [p], [d]),  # type: ignore[arg-type]
        openai.AsyncOpenAI(
            base_url=f"{running.url}/v1",
            api_key="k",
            max_retries=0,
            http_client=openai.DefaultAsyncHttpxClient(verify=False),
        ) as client,
    ):
        yield client, running, p, d


async def test_chat_and_completions_whole_and_streamed() -> None:
    async with clients() as (client, _, _, _):
        whole = await client.chat.completions.create(model="sim", messages=MESSAGES, max_tokens=24, temperature=0)  # type: ignore[arg-type]
        assert whole.usage is not None and whole.usage.completion_tokens == 24
        pieces, usage = [], None
        stream = await client.chat.completions.create(  # type: ignore[call-overload]
            model="sim",
            messages=MESSAGES,
            max_tokens=24,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        async for chunk in stream:
            usage = chunk.usage or usage
            pieces += [choice.delta.content or "" for choice in chunk.choices]
        assert "".join(pieces) == whole.choices[0].message.content
        assert usage is not None and usage.completion_tokens == 24
        assert usage.prompt_tokens == whole.usage.prompt_tokens
        text = await client.completions.create(model="sim", prompt=PROMPT, max_tokens=24, temperature=0)
        streamed = await client.completions.create(
            model="sim", prompt=PROMPT, max_tokens=24, temperature=0, stream=True
        )
        assert "".join([chunk.choices[0].text async for chunk in streamed]) == text.choices[0].text


async def test_tool_calls_arrive_in_pieces_and_make_valid_arguments() -> None:
    async with clients() as (client, running, _, _):
        stream = await client.chat.completions.create(  # type: ignore[call-overload]
            model="sim",
            messages=MESSAGES,
            tools=[WEATHER],
            tool_choice={"type": "function", "function": {"name": "weather"}},
            max_tokens=400,
            temperature=0,
            stream=True,
        )
        name, arguments, pieces = "", "", 0
        async for chunk in stream:
            for call in chunk.choices[0].delta.tool_calls or []:
                name += call.function.name or ""
                arguments += call.function.arguments or ""
                pieces += 1
        assert name == "weather" and pieces > 1
        assert isinstance(json.loads(arguments)["city"], str)
        assert running.idle()


async def test_response_format_logprobs_stop_seed_and_n() -> None:
    async with clients() as (client, _, _, _):
        shaped = await client.chat.completions.create(  # type: ignore[call-overload]
            model="sim", messages=MESSAGES, response_format={"type": "json_object"}, max_tokens=400, temperature=0
        )
        assert isinstance(json.loads(shaped.choices[0].message.content), dict)
        scored = await client.chat.completions.create(  # type: ignore[call-overload]
            model="sim", messages=MESSAGES, logprobs=True, top_logprobs=2, max_tokens=5, temperature=0
        )
        assert len(scored.choices[0].logprobs.content) == 5
        plain = await client.completions.create(model="sim", prompt=PROMPT, max_tokens=20, temperature=0)
        word = plain.choices[0].text.split()[3]
        stopped = await client.completions.create(
            model="sim", prompt=PROMPT, max_tokens=20, temperature=0, stop=[f" {word}"]
        )
        assert plain.choices[0].text.startswith(stopped.choices[0].text)
        assert stopped.choices[0].finish_reason == "stop"
        seeded = [
            await client.completions.create(model="sim", prompt=PROMPT, max_tokens=20, temperature=1, seed=seed)
            for seed in (1, 1, 2)
        ]
        assert seeded[0].choices[0].text == seeded[1].choices[0].text != seeded[2].choices[0].text
        several = await client.completions.create(
            model="sim", prompt=["a b c", "d e f"], n=2, max_tokens=8, temperature=1, seed=3
        )
        assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
        assert several.usage is not None and several.usage.completion_tokens <= 32


async def test_models_are_listed_and_found() -> None:
    async with clients() as (client, _, _, _):
        assert [model.id async for model in client.models.list()] == ["sim"]
        assert (await client.models.retrieve("sim")).id == "sim"


async def test_errors_become_the_client_librarys_exceptions() -> None:
    async with clients(resume="off") as (client, running, p, d):
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            await client.chat.completions.create(model="other", messages=MESSAGES)  # type: ignore[arg-type]
        with pytest.raises(openai.BadRequestError):
            await client.chat.completions.create(model="sim", messages="text")  # type: ignore[arg-type]
        d.faults.add("die_mid_stream", after_tokens=3, leg="decode", count=1)
        stream = await client.chat.completions.create(model="sim", messages=MESSAGES, stream=True)  # type: ignore[call-overload]
        with pytest.raises(openai.APIError, match="failed in mid-answer"):
            async for _ in stream:
                pass
        p.kill()
        d.kill()
        with pytest.raises(openai.InternalServerError) as failed:
            await client.chat.completions.create(model="sim", messages=MESSAGES)  # type: ignore[arg-type]
        assert failed.value.status_code == 503 and failed.value.response.headers["retry-after"]
        assert running.idle()


async def test_client_keys_are_wanted_where_they_are_set() -> None:
    async with clients(api_keys="right,also-right") as (client, running, p, _):
        with pytest.raises(openai.AuthenticationError):
            await client.chat.completions.create(model="sim", messages=MESSAGES)  # type: ignore[arg-type]
        with pytest.raises(openai.AuthenticationError):
            await client.models.list()
        good = client.with_options(api_key="also-right")
        assert (await good.chat.completions.create(model="sim", messages=MESSAGES, max_tokens=3)).choices  # type: ignore[arg-type]
        assert [model.id async for model in good.models.list()] == ["sim"]
        assert all("authorization" not in request.headers for request in p.requests), "keys stay here"
        assert (await running.http.get("/health")).status_code == 200


async def test_the_backends_key_is_sent_to_the_backends() -> None:
    async with clients(engine={"api_key": "theirs"}, backend_api_key="theirs") as (client, _, p, d):
        answer = await client.chat.completions.create(model="sim", messages=MESSAGES, max_tokens=3)  # type: ignore[arg-type]
        assert answer.choices
        for engine in (p, d):
            assert engine.requests[-1].headers["authorization"] == "Bearer theirs"
