"""A request that ends engines ends few of them; requests that ran there by chance do not end with it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from pd_proxy_simulator import Simulator

from tests.support import PROMPT, Running, chat, pools, running_gateway, simulators, until

pytestmark = pytest.mark.cross_product

CHAT = "/v1/chat/completions"
NEVER: dict[str, Any] = {"warmup": False, "breaker": {"consecutive_failures": 1000, "success_rate": 0}}


def error_of(answer: httpx.Response, *, stream: bool) -> dict[str, Any]:
    """The error that an answer is, or that ends it."""
    if not stream or answer.status_code != 200:
        found: dict[str, Any] = answer.json()["error"]
        return found
    last = [line for line in answer.text.splitlines() if line.startswith("data: ")][-1]
    said: dict[str, dict[str, Any]] = json.loads(last.removeprefix("data: "))
    return said["error"]


def dead(engines: list[Simulator]) -> int:
    return sum(not engine.alive for engine in engines)


async def asked(running: Running, *, stream: bool, **more: Any) -> httpx.Response:
    return await running.http.post(CHAT, json=chat(stream=stream, max_tokens=40, ignore_eos=True, **more))


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("warm", [False, True], ids=["new connections", "kept connections"])
@pytest.mark.parametrize("leg", ["prefill", "decode"])
async def test_a_request_that_engines_die_of_ends_two_of_them_and_then_itself(
    leg: str, warm: bool, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async with pools(4, 4, **NEVER, policy={"prefill": "round_robin", "decode": "round_robin"}) as (running, p, d):
        if warm:
            await asyncio.gather(*(asked(running, stream=False) for _ in range(16)))
        victims = p if leg == "prefill" else d
        for engine in victims:
            engine.faults.add("die_mid_stream", leg=leg, after_tokens=0, ending="kill")
        answer = await asked(running, stream=stream)
        ahead = leg == "decode" and stream  # the client has prefill's token by then
        assert answer.status_code == (200 if ahead else 502)
        error = error_of(answer, stream=stream)
        assert error["code"] == "request_kills_engines"
        assert "127.0.0.1" not in answer.text
        assert dead(victims) == 2
        [line] = [r for r in caplog.records if "is given to no other" in r.getMessage()]
        assert line.levelname == "WARNING"
        assert answer.headers["x-request-id"] in line.getMessage() and PROMPT[:20] not in caplog.text
        await until(running.idle)
        metrics = await running.metrics()
        assert any('outcome="request_kills_engines"' in name for name in metrics)
        for engine in victims:
            engine.faults.clear()
        assert (await asked(running, stream=stream)).status_code == 200  # others are served by what is left


@pytest.mark.parametrize("after", [1, 5])
async def test_one_that_engines_die_of_after_some_tokens_ends_two_of_them(after: int) -> None:
    async with pools(1, 6, **NEVER) as (running, _, d):
        for engine in d:
            engine.faults.add("die_mid_stream", leg="decode", after_tokens=after, ending="kill")
        answer = await asked(running, stream=True)
        assert answer.status_code == 200
        assert error_of(answer, stream=True)["code"] == "request_kills_engines"
        assert dead(d) == 2
        assert (await running.metrics())['pd_proxy_resumes_refused_total{reason="kills_engines"}'] == 1


async def test_a_stream_outlives_engine_after_engine_as_long_as_it_goes_on() -> None:
    """A rolling restart with -9, of all engines of a pool."""
    async with pools(1, 5, **NEVER) as (running, _, d):
        whole = await asked(running, stream=True)
        for engine in d:
            engine.faults.add("die_mid_stream", leg="decode", after_tokens=9, ending="kill", count=1)
        broken = await asked(running, stream=True)
        assert broken.text.count("data: ") == whole.text.count("data: ")
        assert broken.text.endswith("data: [DONE]\n\n")
        assert dead(d) == 4


@pytest.mark.parametrize("after", [0, 3])
async def test_connections_that_are_cut_are_no_deaths(after: int) -> None:
    async with pools(1, 3, **NEVER) as (running, _, d):
        for engine in d:
            engine.faults.add("die_mid_stream", leg="decode", after_tokens=after, ending="reset", count=1)
        answer = await asked(running, stream=True)
        assert answer.text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_an_engine_that_dies_with_an_answer_on_its_lips_counts_too(stream: bool) -> None:
    """vLLM's API server answers 500 when its engine core has died, and ends."""
    async with pools(1, 6, **NEVER, first_token="decode", fallback="reject") as (running, _, d):
        for engine in d:
            engine.faults.add("engine_death", leg="decode")
        answer = await asked(running, stream=stream)
        assert error_of(answer, stream=stream)["code"] == "request_kills_engines"
        assert sum(engine.faults.find("engine_death").hits for engine in d) == 2  # type: ignore[union-attr]


async def test_engines_errors_without_a_death_are_tried_as_before() -> None:
    async with pools(1, 6, **NEVER, first_token="decode") as (running, _, d):
        for engine in d:
            engine.faults.add("status", leg="decode", status=500, count=1)
        answer = await asked(running, stream=False)
        assert answer.status_code == 200


async def test_those_that_were_with_it_are_served() -> None:
    async with pools(1, 6, **NEVER, engine={"step_time": 0.005}) as (running, _, d):
        others = [asyncio.create_task(asked(running, stream=number % 2 == 0)) for number in range(24)]
        await until(lambda: all(engine.engine.running for engine in d))
        victim = d[0]
        victim.kill()
        answers = await asyncio.gather(*others)
        assert [answer.status_code for answer in answers] == [200] * 24
        assert all(answer.text.endswith("data: [DONE]\n\n") for answer in answers[::2])


@pytest.mark.parametrize(("after_cut", "ended"), [(0, 1), (2, 3)])
async def test_how_many_engines_it_may_end_is_a_setting(after_cut: int, ended: int) -> None:
    async with pools(6, 1, **NEVER, retries={"after_cut": after_cut, "attempts": 6}) as (running, p, _):
        for engine in p:
            engine.faults.add("die_mid_stream", leg="prefill", after_tokens=0, ending="kill")
        assert error_of(await asked(running, stream=False), stream=False)["code"] == "request_kills_engines"
        assert dead(p) == ended


async def test_routes_of_one_leg_are_no_other(caplog: pytest.LogCaptureFixture) -> None:
    async with (
        simulators(*["mixed"] * 5, task="any") as engines,
        running_gateway(mixed=[engine.url for engine in engines], **NEVER) as running,
    ):
        for engine in engines:
            engine.faults.add("engine_death", leg="local")
        answer = await running.http.post("/v1/embeddings", json={"model": "sim", "input": "a secret text"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "request_kills_engines")
        assert sum(len([r for r in engine.requests if r.path == "/v1/embeddings"]) for engine in engines) == 2
    assert "is given to no other" in caplog.text and "a secret text" not in caplog.text


async def test_one_engine_whose_connections_are_cut_again_and_again_is_one() -> None:
    async with pools(1, 1, **NEVER, first_token="decode") as (running, _, [d]):
        d.faults.add("die_mid_stream", leg="decode", after_tokens=0, ending="reset", count=3)
        assert (await asked(running, stream=False)).status_code == 200
