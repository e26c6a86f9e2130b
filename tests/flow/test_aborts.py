"""An engine that is stopped, paused or put to sleep ends its requests with `abort` and status 200: no client sees
it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import httpx
import pytest
from pd_proxy.fleet.backend import Backend
from pd_proxy_simulator import Simulator

from tests.flow.test_generating_routes import EVERY, Route, what_one_engine_says
from tests.flow.test_generating_routes import gateway as routed
from tests.flow.test_resume import CHAT, COMPLETIONS, EMOJI, Answer, ask, body_of, same, settled
from tests.support import PROMPT, Running, chat, completion, pools, running_gateway, simulators, until

pytestmark = pytest.mark.cross_product

ENGINE = {"step_time": 0.003, "exit_delay": 0.3}
PATHS = pytest.mark.parametrize("path", [CHAT, COMPLETIONS])


def backend(running: Running, engine: Simulator) -> Backend:
    return next(one for one in running.gateway.fleet if one.url == engine.url)


def busy(engines: list[Simulator], tokens: int = 5) -> Callable[[], bool]:
    """One of some engines is at it, and has said some tokens."""
    return lambda: any(e.engine.running and e.engine.stats.generation_tokens >= tokens for e in engines)


def at_it(engines: list[Simulator]) -> Simulator:
    return next(engine for engine in engines if engine.engine.running)


async def stopped(how: str, engine: Simulator) -> None:
    """Stop or pause an engine by one of the ways that there are."""
    if how == "sigterm":
        engine.terminate()
        return
    async with httpx.AsyncClient(trust_env=False, verify=False) as http:
        assert (await http.post(engine.url + how)).status_code == 200


async def counted(running: Running, name: str, reason: str = "aborted") -> float:
    metrics = await running.metrics()
    return sum(v for key, v in metrics.items() if key.startswith(name) and f'reason="{reason}"' in key)


@pytest.mark.parametrize("how", ["sigterm", "/pause?mode=abort", "/sleep?level=0"])
@pytest.mark.parametrize("prompt", [PROMPT, EMOJI], ids=["words", "characters"])
@PATHS
async def test_a_stream_goes_on_elsewhere(path: str, prompt: str, how: str) -> None:
    async with pools(2, 2, engine=ENGINE) as (running, _, d):
        body = body_of(path, prompt, max_tokens=60)
        whole = await ask(running, path, body)
        for engine in d:
            engine.engine.stats.generation_tokens = 0
        asking = asyncio.create_task(ask(running, path, body))
        await until(busy(d))
        victim = at_it(d)
        await stopped(how, victim)
        answer = await asking
        same(answer, whole)
        assert "abort" not in answer.raw
        assert await counted(running, "pd_proxy_resumes_total") == 1
        await until(running.idle)


@PATHS
async def test_a_whole_answer_is_asked_for_again(path: str) -> None:
    async with pools(2, 2, engine=ENGINE) as (running, _, d):
        make = chat if path == CHAT else completion
        body = make(max_tokens=60)
        whole = (await running.http.post(path, json=body)).json()
        for engine in d:
            engine.engine.stats.generation_tokens = 0
        asking = asyncio.create_task(running.http.post(path, json=body))
        await until(busy(d))
        at_it(d).terminate()
        answer = (await asking).json()
        for name in ("message", "text", "finish_reason"):
            assert answer["choices"][0].get(name) == whole["choices"][0].get(name)
        assert await counted(running, "pd_proxy_retries_total") == 1


@EVERY
async def test_whole_answers_of_the_other_routes_too(route: Route) -> None:
    expected = await what_one_engine_says(route, tokens=60)
    async with routed(2, 2, engine=ENGINE) as (running, _, d):
        asking = asyncio.create_task(running.http.post(route.path, json=route.body(60)))
        await until(busy(d))
        at_it(d).terminate()
        answer = await asking
        assert answer.status_code == 200 and route.text(answer.json()) == expected
        assert await counted(running, "pd_proxy_retries_total") == 1


@EVERY
async def test_streams_of_the_other_routes_end_with_an_error(route: Route) -> None:
    """They cannot be continued. What the clients have is right, and they get an error."""
    async with routed(2, 2, engine=ENGINE) as (running, _, d):
        asking = asyncio.create_task(running.http.post(route.path, json=route.body(60, stream=True)))
        await until(busy(d))
        at_it(d).terminate()
        answer = await asking
        assert "abort" not in answer.text and route.last not in answer.text.split("\n\n")[-2]
        assert "could not be continued" in answer.text
        assert await counted(running, "pd_proxy_resumes_refused_total", "endpoint") == 1


@EVERY
async def test_streams_of_the_other_routes_begin_anew_before_any_text(route: Route) -> None:
    expected = await what_one_engine_says(route, tokens=20)
    async with routed(2, 2, engine={**ENGINE, "prefill_rate": 0.0, "step_time": 0.05}) as (running, _, d):
        asking = asyncio.create_task(running.http.post(route.path, json=route.body(20, stream=True)))
        await until(lambda: any(engine.engine.waiting + engine.engine.running for engine in d))
        next(engine for engine in d if engine.engine.waiting + engine.engine.running).terminate()
        answer = await asking
        assert answer.status_code == 200 and route.streamed(answer.text) == expected


@PATHS
@pytest.mark.parametrize("stream", [True, False])
async def test_a_prefill_leg_that_was_given_up_goes_to_another_prefill(path: str, stream: bool) -> None:
    """200 and no parameters, but no reason to have decode compute the prompt while another prefill is up."""
    async with pools(2, 1, engine={"prefill_rate": 200.0, "exit_delay": 0.3}) as (running, p, d):
        body = {**body_of(path), "stream": stream}
        asking = asyncio.create_task(running.http.post(path, json=body if stream else {**body, "stream_options": None}))
        await until(lambda: any(engine.engine.running + engine.engine.waiting for engine in p))
        victim = next(engine for engine in p if engine.engine.running + engine.engine.waiting)
        victim.terminate()
        answer = await asking
        assert answer.status_code == 200 and "x-pd-proxy-fallback" not in answer.headers
        assert d[0].engine.pulls == 1
        assert [request.leg for request in d[0].requests] == ["decode"]
        assert await counted(running, "pd_proxy_retries_total") == 1


async def test_an_engine_that_is_going_away_is_no_black_hole() -> None:
    """It is idle, as it has ended all that it had, and looks well; yet it gets nothing more."""
    async with pools(1, 2, engine={**ENGINE, "exit_delay": 60.0}) as (running, _, d):
        asking = asyncio.create_task(ask(running, CHAT, body_of(CHAT, max_tokens=60)))
        await until(busy(d))
        victim = at_it(d)
        victim.terminate()
        await asking
        before = len(victim.requests)
        for _ in range(20):
            await ask(running, COMPLETIONS, body_of(COMPLETIONS, max_tokens=2))
        assert len(victim.requests) == before and victim.alive
        assert running.gateway.fleet.state(backend(running, victim)) in ("ejected", "down")


async def test_an_engine_that_has_been_started_anew_is_used_at_once() -> None:
    """Not after the time for which one is ejected that was never seen gone."""
    settings = {"breaker": {"ejection": 60.0, "slow_start": 0}}
    async with pools(1, 2, engine={**ENGINE, "exit_delay": 0.02}, **settings) as (running, _, d):
        asking = asyncio.create_task(ask(running, CHAT, body_of(CHAT, max_tokens=60)))
        await until(busy(d))
        victim = at_it(d)
        victim.terminate()
        await asking
        one = backend(running, victim)
        await until(lambda: not victim.alive and not one.up)
        await victim.restart()
        await until(lambda: running.gateway.fleet.state(one) in ("up", "slow_start"))


async def test_an_engine_that_drains_gets_no_more_requests_while_its_own_end() -> None:
    async with pools(1, 2, engine={**ENGINE, "shutdown_timeout": 30.0}, policy={"decode": "least_loaded"}) as (
        running,
        _,
        d,
    ):
        body = body_of(CHAT, max_tokens=200)
        asking = asyncio.create_task(ask(running, CHAT, body))
        await until(busy(d))
        victim = at_it(d)
        other = next(engine for engine in d if engine is not victim)
        victim.terminate()
        answers = [await ask(running, COMPLETIONS, body_of(COMPLETIONS, max_tokens=2)) for _ in range(8)]
        assert all(answer.error is None for answer in answers)
        refused = [request for request in victim.requests if request.status == 500]
        assert len(refused) <= 1
        assert (await asking).finish in (["length"], ["stop"])
        assert await counted(running, "pd_proxy_resumes_total") == 0
        assert len(other.requests) >= 8


async def test_tokens_in_while_it_drains_are_answered_with_abort_and_go_elsewhere() -> None:
    async with AsyncExitStack() as stack:
        engines = await stack.enter_async_context(simulators("mixed", "mixed", **ENGINE, shutdown_timeout=30.0))
        running = await stack.enter_async_context(running_gateway(mixed=[engine.url for engine in engines]))
        busy_one = asyncio.create_task(ask(running, COMPLETIONS, body_of(COMPLETIONS, max_tokens=300)))
        await until(busy(engines))
        victim, other = at_it(engines), next(engine for engine in engines if not engine.engine.running)
        other_backend = backend(running, other)
        victim.terminate()
        other_backend.inflight_tokens += 100_000  # the one that drains looks less busy
        for stream in (True, False):
            body = {**completion([5, 6, 7], max_tokens=4), "stream": stream}
            answer = await running.http.post(COMPLETIONS, json=body)
            assert answer.status_code == 200 and "abort" not in answer.text and "length" in answer.text
        other_backend.inflight_tokens -= 100_000
        assert await counted(running, "pd_proxy_retries_total") == 1
        await busy_one


@pytest.mark.parametrize("stream", [True, False])
async def test_a_request_that_hangs_after_the_drain_goes_elsewhere(stream: bool) -> None:
    """No last chunk, no end: only that nobody listens there any more tells it."""
    async with pools(1, 2, engine={**ENGINE, "step_time": 0.01, "shutdown_timeout": 0.1}) as (running, _, d):
        body = {
            **chat(max_tokens=60),
            **({"stream": True, "stream_options": {"include_usage": True}} if stream else {}),
        }
        asking = asyncio.create_task(running.http.post(CHAT, json=body))
        await until(busy(d))
        victim = at_it(d)
        victim.terminate()
        answer = await asking
        assert answer.status_code == 200 and '"finish_reason":"length"' in answer.text.replace('": "', '":"')
        assert not victim.alive


async def test_a_sleep_that_is_forced_takes_no_answer_with_it() -> None:
    async with pools(1, 2, engine=ENGINE) as (running, _, d):
        body = body_of(CHAT, max_tokens=300)
        whole = await ask(running, CHAT, body)
        for engine in d:
            engine.engine.stats.generation_tokens = 0
        asking = asyncio.create_task(ask(running, CHAT, body))
        await until(busy(d))
        victim = at_it(d)
        query = {"backend": victim.url, "drain": 0, "force": "true"}
        slept = await running.http.post("/admin/sleep", params=query)
        assert slept.status_code == 200, slept.text
        same(await asking, whole)
        assert await counted(running, "pd_proxy_resumes_total") == 1
        await until(lambda: not backend(running, victim).up)


async def test_a_paused_engine_is_left_alone_until_it_goes_on() -> None:
    async with pools(1, 2, engine=ENGINE) as (running, _, d):
        asking = asyncio.create_task(ask(running, CHAT, body_of(CHAT, max_tokens=60)))
        await until(busy(d))
        victim = at_it(d)
        await stopped("/pause", victim)
        await asking
        one = backend(running, victim)
        await until(lambda: not one.up)
        assert "paused" in one.reason
        for _ in range(4):
            await ask(running, COMPLETIONS, body_of(COMPLETIONS, max_tokens=2))
        await stopped("/resume", victim)
        await until(lambda: running.gateway.fleet.state(one) in ("up", "slow_start"))


async def test_a_request_that_waits_for_a_paused_engine_is_served_elsewhere() -> None:
    """It takes requests, and answers none."""
    async with pools(1, 2, engine=ENGINE) as (running, _, d):
        for engine in d[:1]:
            engine.paused = True
        answers = await asyncio.gather(*(ask(running, CHAT, body_of(CHAT, max_tokens=2)) for _ in range(4)))
        assert all(answer.finish == ["length"] for answer in answers)
        await settled(running, d[1:])


def doom(engines: list[Simulator]) -> None:
    """From now on these abort whatever comes."""
    for engine in engines:
        submit = engine.engine.submit

        def doomed(sequences: Any, engine: Simulator = engine, submit: Any = submit) -> None:
            submit(sequences)
            asyncio.get_running_loop().call_soon(engine.engine.give_up, sequences)

        engine.engine.submit = doomed  # type: ignore[method-assign]


async def test_when_all_engines_abort_the_client_gets_an_error_and_not_the_word() -> None:
    async with pools(1, 2, engine={"step_time": 0.05}, retries={"attempts": 3}, first_token="decode") as (
        running,
        p,
        d,
    ):
        doom(d)
        for body in (chat(), {**chat(), "stream": True}):
            answer = await running.http.post(CHAT, json=body)
            assert answer.status_code == 502 and answer.json()["error"]["code"] == "backend_aborted"
        doom(p)
        answer = await running.http.post(CHAT, json=chat())
        assert answer.status_code == 502 and answer.json()["error"]["code"] == "backend_aborted"
        assert all(one.up for one in running.gateway.fleet)  # they are alive, and nobody else is there


async def test_an_answer_that_is_cut_when_its_choices_have_not_all_ended_is_not_called_whole() -> None:
    async with pools(1, 2, engine=ENGINE) as (running, _, d):
        body = body_of(CHAT, max_tokens=60, n=2, temperature=1)
        asking = asyncio.create_task(running.http.post(CHAT, json=body))
        await until(busy(d))
        victim = at_it(d)
        first = victim.engine.scheduler.running[0]
        first.sampling = replace(first.sampling, max_tokens=first.output_length + 1)
        await until(lambda: first.finish_reason is not None)
        victim.terminate()
        answer = Answer((await asking).text)
        assert answer.finish == ["length"] and answer.error is not None and not answer.done
