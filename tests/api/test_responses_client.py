"""OpenAI's official client and responses, against the gateway and simulated pools: new, streamed, stored, retrieved."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
from pd_proxy_simulator import Simulator

from tests.support import PROMPT, Running, pools, running_gateway, until

WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": False,
}
ASKED: Any = {"model": "sim", "input": PROMPT, "max_output_tokens": 24, "temperature": 0}


@asynccontextmanager
async def clients(
    prefill: int = 1, decode: int = 1, *, engine: dict[str, Any] | None = None, **settings: Any
) -> AsyncIterator[tuple[openai.AsyncOpenAI, Running, list[Simulator], list[Simulator]]]:
    async with (
        pools(prefill, decode, engine={"responses_store": True, **(engine or {})}, **settings) as (running, p, d),
        openai.AsyncOpenAI(
            base_url=f"{running.url}/v1",
            api_key="a",
            max_retries=0,
            http_client=openai.DefaultAsyncHttpxClient(verify=False),
        ) as client,
    ):
        yield client, running, p, d


async def test_a_response_whole_and_streamed() -> None:
    async with clients() as (client, running, [p], [d]):
        whole = await client.responses.create(**ASKED)
        assert whole.usage is not None and whole.usage.output_tokens == 24
        assert whole.status == "incomplete" and whole.id.startswith("resp_")
        kinds, pieces, last = [], [], None
        async for event in await client.responses.create(**ASKED, stream=True):
            kinds.append(event.type)
            if event.type == "response.output_text.delta":
                pieces.append(event.delta)
            last = event
        assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.completed"
        assert last is not None and "kv_transfer_params" not in json.dumps(last.to_dict())
        assert len(pieces) > 10 and "".join(pieces) == whole.output_text
        async with client.responses.stream(**ASKED) as stream:
            async for _ in stream:
                pass
            assert (await stream.get_final_response()).output_text == whole.output_text
        assert [request.leg for request in p.requests] == ["prefill"] * 3
        assert [request.leg for request in d.requests] == ["decode"] * 3
        for request in p.requests:
            assert request.body["max_output_tokens"] == 1
            assert request.body["store"] is request.body["background"] is request.body["stream"] is False
        assert whole.id == d.requests[0].body["request_id"]
        assert running.idle()


async def test_instructions_formats_and_tools() -> None:
    async with clients() as (client, running, [p], [d]):
        plain = await client.responses.create(**ASKED)
        told = await client.responses.create(**ASKED, instructions="Be brief.")
        assert told.output_text != plain.output_text
        form: Any = {"type": "json_schema", "name": "x", "schema": WEATHER["parameters"]}
        shaped = await client.responses.create(**{**ASKED, "max_output_tokens": 400}, text={"format": form})
        assert isinstance(json.loads(shaped.output_text)["city"], str)
        assert p.requests[-1].body["text"] == d.requests[-1].body["text"]
        called: Any = {
            **ASKED,
            "max_output_tokens": 400,
            "tools": [WEATHER],
            "tool_choice": {"type": "function", "name": "weather"},
        }
        whole = await client.responses.create(**called)
        [call] = whole.output
        assert call.type == "function_call" and isinstance(json.loads(call.arguments)["city"], str)
        pieces = [
            event.delta
            async for event in await client.responses.create(**called, stream=True)
            if event.type == "response.function_call_arguments.delta"
        ]
        assert "".join(pieces) == call.arguments and len(pieces) > 1
        turns: Any = [
            {"role": "user", "content": PROMPT},
            call.to_dict(),
            {"type": "function_call_output", "call_id": call.call_id, "output": "rain"},
        ]
        answer = await client.responses.create(**{**ASKED, "input": turns}, tools=[WEATHER])
        assert answer.output_text
        assert running.idle()


async def test_a_request_that_continues_a_response_goes_whole_to_the_backend_that_has_it() -> None:
    async with clients(2, 3) as (client, running, p, decode):
        for _ in range(4):
            first = await client.responses.create(**ASKED)
            [holder] = [d for d in decode if any(r.body.get("request_id") == first.id for r in d.requests)]
            before = sum(len(engine.requests) for engine in p)
            second = await client.responses.create(**{**ASKED, "input": "and then?"}, previous_response_id=first.id)
            third = await client.responses.create(**{**ASKED, "input": "go on"}, previous_response_id=second.id)
            assert [request.leg for request in list(holder.requests)[-2:]] == ["local", "local"]
            assert third.usage is not None and second.usage is not None
            assert third.usage.input_tokens > second.usage.input_tokens
            assert sum(len(engine.requests) for engine in p) == before
            assert (await client.responses.retrieve(third.id)).output_text == third.output_text
        metrics = await running.metrics()
        assert metrics['pd_proxy_fallbacks_total{reason="previous_response_id"}'] == 8
        assert running.idle()


async def test_a_response_that_no_backend_has_is_not_found() -> None:
    async with clients() as (client, running, _, [d]):
        kept = await client.responses.create(**ASKED)
        assert (await client.responses.retrieve(kept.id)).id == kept.id
        for unknown in (kept.id[:-1], "resp_other"):
            with pytest.raises(openai.NotFoundError, match="not found") as missing:
                await client.responses.retrieve(unknown)
            assert missing.value.param == "response_id"
            with pytest.raises(openai.NotFoundError, match="not found") as missing:
                await client.responses.create(**ASKED, previous_response_id=unknown)
            assert (missing.value.param, missing.value.code) == ("previous_response_id", "response_not_found")
            with pytest.raises(openai.NotFoundError, match="not found"):
                await client.responses.cancel(unknown)
        unkept = await client.responses.create(**ASKED, store=False)
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(unkept.id)
        await d.restart()
        await until(lambda: all(backend.up for backend in running.gateway.fleet))
        with pytest.raises(openai.NotFoundError, match="not found"):  # the engine's own error
            await client.responses.retrieve(kept.id)
        answer = await running.http.delete(f"/v1/responses/{kept.id}")
        assert answer.status_code == 405


async def test_another_gateway_of_the_same_operator_finds_a_response() -> None:
    async with (
        clients(1, 2, admin_key="s") as (client, _, [p], decode),
        running_gateway([p.url], [d.url for d in reversed(decode)], admin_key="s") as beside,
    ):
        other = client.with_options(base_url=f"{beside.url}/v1")
        for _ in range(4):
            made = await client.responses.create(**ASKED)
            assert (await other.responses.retrieve(made.id)).output_text == made.output_text


async def test_a_response_is_available_again_when_its_backend_is_up_again() -> None:
    async with clients(health={"timeout": 0.5}) as (client, running, _, [d]):
        made = await client.responses.create(**ASKED)
        [backend] = running.gateway.fleet.pool("decode")
        d.faults.add("hang", leg="health")
        await until(lambda: not backend.up)
        with pytest.raises(openai.InternalServerError) as down:
            await client.responses.retrieve(made.id)
        assert down.value.status_code == 503
        d.faults.clear()
        await until(lambda: backend.up)
        assert (await client.responses.retrieve(made.id)).id == made.id


async def test_a_response_can_be_read_by_its_own_client_only() -> None:
    named = [{"name": "a", "key": "a"}, {"name": "b", "key": "b"}]
    async with clients(clients=named) as (client, running, _, _):
        mine = await client.responses.create(**ASKED)
        other = client.with_options(api_key="b")
        with pytest.raises(openai.NotFoundError):
            await other.responses.retrieve(mine.id)
        with pytest.raises(openai.NotFoundError):
            await other.responses.create(**ASKED, previous_response_id=mine.id)
        with pytest.raises(openai.AuthenticationError):
            await client.with_options(api_key="c").responses.retrieve(mine.id)
        assert (await client.responses.retrieve(mine.id)).id == mine.id
        assert running.idle()


async def test_a_background_response_can_be_polled_until_it_is_complete() -> None:
    async with clients(2, 2, engine={"step_time": 0.005}) as (client, _, p, decode):
        whole = await client.responses.create(**ASKED)
        queued = await client.responses.create(**ASKED, background=True)
        assert queued.status == "queued"
        await asyncio.gather(*(engine.wait_for(lambda e=engine: e.engine.running == 0) for engine in decode))  # type: ignore[misc]
        done = await client.responses.retrieve(queued.id)
        assert (done.status, done.output_text) == ("incomplete", whole.output_text)
        assert sum(len(engine.requests) for engine in p) == 1  # only the first request was split
        running_one = await client.responses.create(**{**ASKED, "max_output_tokens": 4000}, background=True)
        assert (await client.responses.cancel(running_one.id)).status == "cancelled"
        await asyncio.gather(*(engine.wait_for(lambda e=engine: e.engine.running == 0) for engine in decode))  # type: ignore[misc]
        with pytest.raises(openai.BadRequestError, match="Cannot cancel"):
            await client.responses.cancel(whole.id)


async def test_the_stream_of_a_background_response_can_be_continued() -> None:
    async with clients(engine={"step_time": 0.005}) as (client, running, _, [d]):
        seen = []
        stream = await client.responses.create(**ASKED, background=True, stream=True)
        async for event in stream:
            seen.append(event)
            if event.type == "response.output_text.delta" and len(seen) > 8:
                break
        await stream.close()
        await until(running.idle)
        response_id = d.requests[-1].body["request_id"]
        rest = await client.responses.retrieve(response_id, stream=True, starting_after=seen[-1].sequence_number)
        seen += [event async for event in rest]
        assert [event.sequence_number for event in seen] == list(range(len(seen)))
        assert seen[-1].type == "response.completed"
        said = "".join(event.delta for event in seen if event.type == "response.output_text.delta")
        assert said == (await client.responses.retrieve(response_id)).output_text


async def test_a_retrieved_stream_that_breaks_ends_with_an_error_and_shows_no_internals() -> None:
    async with clients(engine={"step_time": 0.01}) as (client, _, _, [d]):
        stream = await client.responses.create(**ASKED, background=True, stream=True)
        async for _ in stream:
            break
        await stream.close()
        response_id = d.requests[-1].body["request_id"]
        again = await client.responses.retrieve(response_id, stream=True)
        with pytest.raises(openai.APIError, match="ended before"):
            async for event in again:
                if event.type == "response.output_text.delta":
                    d.kill()


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"tools": [{"type": "web_search_preview"}]}, "builtin_tools"),
        ({"tools": [WEATHER, {"type": "code_interpreter", "container": {"type": "auto"}}]}, "builtin_tools"),
        ({"tools": [{"type": "mcp", "server_label": "x", "server_url": "http://x"}]}, "builtin_tools"),
        ({"truncation": "auto"}, "truncation"),
        ({"background": True}, "background"),
    ],
)
async def test_unsplittable_requests_go_to_one_backend(more: dict[str, Any], why: str) -> None:
    async with clients() as (client, _, [p], [d]):
        answer = await client.responses.with_raw_response.create(**ASKED, **more)
        assert answer.headers["x-pd-proxy-fallback"] == why
        assert not p.requests and [request.leg for request in d.requests] == ["local"]


async def test_a_decode_engine_that_dies_mid_stream_raises_an_exception_in_the_client() -> None:
    async with clients() as (client, running, _, [d]):
        d.faults.add("die_mid_stream", leg="decode", after_tokens=4, ending="reset")
        kinds = []
        with pytest.raises(openai.APIError, match="could not be continued"):
            async for event in await client.responses.create(**ASKED, stream=True):
                kinds.append(event.type)  # noqa: PERF401 - the events before the error count too
        assert 1 <= kinds.count("response.output_text.delta") <= 4
        await until(running.idle)


async def test_errors_become_the_client_librarys_exceptions() -> None:
    async with clients() as (client, running, _, _):
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            await client.responses.create(**{**ASKED, "model": "other"})
        with pytest.raises(openai.BadRequestError, match="`max_output_tokens` must be an integer"):
            await client.responses.create(**{**ASKED, "max_output_tokens": "many"})
        with pytest.raises(openai.BadRequestError, match="prompt template"):
            await client.responses.create(**ASKED, prompt={"id": "x"})
        await until(running.idle)
