"""Anthropic's official client against the gateway and simulated pools."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

import pytest
from pd_proxy_simulator import Simulator

from tests.support import PROMPT, Running, pools, until

if TYPE_CHECKING:
    import anthropic

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("anthropic")]


@pytest.fixture(autouse=True)
def client_library() -> None:
    """Import the client here: it takes a second, which only the process that runs these tests should spend."""
    globals()["anthropic"] = import_module("anthropic")


MESSAGES: Any = [{"role": "user", "content": PROMPT}]
GREEDY = {"temperature": 0}  # an argument that the newest client no longer has, and engines do
WEATHER: Any = {
    "name": "weather",
    "description": "the weather in a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


@asynccontextmanager
async def clients(
    prefill: int = 1, decode: int = 1, *, auth_token: str | None = None, **settings: Any
) -> AsyncIterator[tuple[anthropic.AsyncAnthropic, Running, list[Simulator], list[Simulator]]]:
    key = None if auth_token else "secret"
    async with (
        pools(prefill, decode, **settings) as (running, p, d),
        anthropic.AsyncAnthropic(
            base_url=running.url,
            api_key=key,
            auth_token=auth_token,
            max_retries=0,
            http_client=anthropic.DefaultAsyncHttpxClient(verify=False),
        ) as client,
    ):
        yield client, running, p, d


def text_of(message: anthropic.types.Message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


async def test_a_message_whole_and_streamed() -> None:
    async with clients() as (client, running, [p], [d]):
        whole = await client.messages.create(model="sim", max_tokens=24, messages=MESSAGES, extra_body=GREEDY)
        assert (whole.stop_reason, whole.usage.output_tokens, whole.role) == ("max_tokens", 24, "assistant")
        async with client.messages.stream(model="sim", max_tokens=24, messages=MESSAGES, extra_body=GREEDY) as stream:
            pieces = [text async for text in stream.text_stream]
            final = await stream.get_final_message()
        assert len(pieces) > 10
        assert "".join(pieces) == text_of(final) == text_of(whole)
        assert (final.stop_reason, final.usage.output_tokens) == ("max_tokens", 24)
        events = [
            event.type
            async for event in await client.messages.create(
                model="sim", max_tokens=5, messages=MESSAGES, extra_body=GREEDY, stream=True
            )
        ]
        assert events[0] == "message_start" and events[-2:] == ["message_delta", "message_stop"]
        assert [request.leg for request in p.requests] == ["prefill"] * 3
        assert [request.leg for request in d.requests] == ["decode"] * 3
        assert running.idle()


async def test_system_stop_sequences_and_many_turns() -> None:
    async with clients() as (client, _, [p], [d]):
        plain = await client.messages.create(model="sim", max_tokens=20, messages=MESSAGES, extra_body=GREEDY)
        told = await client.messages.create(
            model="sim",
            max_tokens=20,
            messages=MESSAGES,
            extra_body=GREEDY,
            system=[{"type": "text", "text": "Be brief."}],
        )
        assert text_of(told) != text_of(plain)
        word = text_of(plain).split()[3]
        stopped = await client.messages.create(
            model="sim", max_tokens=20, messages=MESSAGES, extra_body=GREEDY, stop_sequences=[f" {word}"]
        )
        assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", f" {word}")
        assert "stop_sequences" in d.requests[-1].body and "stop_sequences" not in p.requests[-1].body
        turns: Any = [*MESSAGES, {"role": "assistant", "content": plain.content}, {"role": "user", "content": "go on"}]
        more = await client.messages.create(model="sim", max_tokens=20, messages=turns, extra_body=GREEDY)
        assert more.usage.input_tokens + (more.usage.cache_read_input_tokens or 0) > 40


@pytest.mark.parametrize("choice", [{"type": "tool", "name": "weather"}, {"type": "any"}])
async def test_tools_are_called_whole_and_streamed(choice: Any) -> None:
    asked: Any = {
        "model": "sim",
        "max_tokens": 400,
        "messages": MESSAGES,
        "tools": [WEATHER],
        "tool_choice": choice,
        "extra_body": GREEDY,
    }
    async with clients() as (client, running, [p], [d]):
        whole = await client.messages.create(**asked)
        [call] = whole.content
        assert call.type == "tool_use" and call.name == "weather" and isinstance(call.input["city"], str)
        assert whole.stop_reason == "tool_use"
        async with client.messages.stream(**asked) as stream:
            kinds = {event.type async for event in stream}
            final = await stream.get_final_message()
        assert "input_json" in kinds
        [streamed] = final.content
        assert streamed.type == "tool_use" and streamed.input == call.input
        # Prefill is not asked for the forced call: its one token is not valid JSON, and engines refuse such requests.
        legs = [] if choice["type"] == "tool" else ["prefill", "prefill"]
        assert [request.leg for request in p.requests] == legs
        assert d.requests[-1].body["tool_choice"] == choice
        result: Any = [
            *MESSAGES,
            {"role": "assistant", "content": whole.content},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "rain"}]},
        ]
        answer = await client.messages.create(
            model="sim", max_tokens=8, messages=result, tools=[WEATHER], extra_body=GREEDY
        )
        # The prompt has the call's id, which is new each time. So the text is new too, and may be empty.
        assert [part.type for part in answer.content] == ["text"]
        assert running.idle()


async def test_the_thinking_budget_goes_to_decode_only_and_is_checked_against_the_clients_bound() -> None:
    async with clients() as (client, _, [p], [d]):
        answer = await client.messages.create(
            model="sim", max_tokens=2000, messages=MESSAGES, thinking={"type": "enabled", "budget_tokens": 1500}
        )
        assert answer.content
        assert (p.requests[0].status, d.requests[0].body["max_tokens"]) == (200, 2000)
        with pytest.raises(anthropic.BadRequestError, match="budget_tokens"):
            await client.messages.create(
                model="sim", max_tokens=1200, messages=MESSAGES, thinking={"type": "enabled", "budget_tokens": 1500}
            )


async def test_errors_become_the_client_librarys_exceptions() -> None:
    async with clients(api_keys=["secret"]) as (client, running, [p], [d]):
        await client.messages.create(model="sim", max_tokens=2, messages=MESSAGES)
        with pytest.raises(anthropic.NotFoundError, match="does not exist") as missing:
            await client.messages.create(model="other", max_tokens=2, messages=MESSAGES)
        assert missing.value.body == {
            "type": "error",
            "error": {
                "type": "not_found_error",
                "message": "The model `other` does not exist. This gateway serves `sim`.",
            },
        }
        with pytest.raises(anthropic.BadRequestError, match="max_tokens must be positive"):
            await client.messages.create(model="sim", max_tokens=0, messages=MESSAGES)
        stranger = client.with_options(api_key="guess")
        with pytest.raises(anthropic.AuthenticationError, match="x-api-key"):
            await stranger.messages.create(model="sim", max_tokens=2, messages=MESSAGES)
        p.kill()
        d.kill()
        await until(lambda: not any(backend.up for backend in running.gateway.fleet))
        with pytest.raises(anthropic.InternalServerError) as nobody:
            await client.messages.create(model="sim", max_tokens=2, messages=MESSAGES)
        assert nobody.value.status_code == 503
        assert "overloaded_error" in str(nobody.value.body)


async def test_a_bearer_token_is_accepted_too() -> None:
    async with clients(auth_token="secret", api_keys=["secret"]) as (client, running, _, _):
        assert (await client.messages.create(model="sim", max_tokens=2, messages=MESSAGES)).content
        metrics = await running.metrics()
        assert metrics['pd_proxy_requests_total{endpoint="messages",model="sim",outcome="ok"}'] == 1


async def test_a_decode_engine_that_dies_mid_stream_raises_an_exception_in_the_client() -> None:
    async with clients() as (client, running, _, [d]):
        d.faults.add("die_mid_stream", leg="decode", after_tokens=4, ending="reset")
        pieces = []
        with pytest.raises(anthropic.APIStatusError, match="could not be continued"):
            async with client.messages.stream(model="sim", max_tokens=24, messages=MESSAGES) as stream:
                async for text in stream.text_stream:
                    pieces.append(text)  # noqa: PERF401 - the pieces before the error count too
        assert 1 <= len(pieces) <= 4
        await until(running.idle)
