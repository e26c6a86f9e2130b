"""Several fleets behind one gateway: no request and no hand-off leaves the group that it belongs to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import openai
import pytest
from pd_proxy.assembly.peers import adopt_backends
from pd_proxy.fleet.fleet import Fleet
from pd_proxy_simulator import Simulator

from tests.support import Running, completion, running_gateway, simulators, text_of, until

SECOND = "second"


@asynccontextmanager
async def two_fleets(
    first: dict[str, Any], second: dict[str, Any], *, count: int = 1, **settings: Any
) -> AsyncIterator[tuple[Running, list[Simulator], list[Simulator]]]:
    """A gateway before two groups of `count` prefill and decode engines each, the default one and `second`, all up.

    Arguments:
        first, second: settings of their engines.
    """
    roles = ["prefill"] * count + ["decode"] * count
    async with AsyncExitStack() as stack:
        a = await stack.enter_async_context(simulators(*roles, **first))
        b = await stack.enter_async_context(simulators(*roles, **second))
        group = {
            "name": SECOND,
            "connector": second.get("connector", "nixl"),
            "prefill": [e.url for e in b[:count]],
            "decode": [e.url for e in b[count:]],
        }
        more = {
            "connector": first.get("connector", "nixl"),
            "groups": [group],
            "locations": [{"backend": e.url, "port": e.side_port} for e in (*a[:count], *b[:count])],
            **settings,
        }
        gateway = running_gateway([e.url for e in a[:count]], [e.url for e in a[count:]], **more)
        yield await stack.enter_async_context(gateway), a, b


def answered(engines: Iterable[Simulator]) -> list[int]:
    return [len(engine.requests) for engine in engines]


async def took_out(running: Running, engine: Simulator) -> None:
    engine.kill()
    await until(lambda: not next(b for b in running.gateway.fleet if b.url == engine.url).up)


async def test_two_models_with_two_protocols_are_served_beside_each_other() -> None:
    async with two_fleets({"model": "alpha"}, {"model": "beta", "connector": "mooncake", "weights": 1}) as (
        running,
        alpha,
        beta,
    ):
        client = openai.AsyncOpenAI(
            base_url=f"{running.url}/v1",
            api_key="x",
            max_retries=0,
            http_client=openai.DefaultAsyncHttpxClient(verify=False),
        )
        assert {model.id async for model in client.models.list()} == {"alpha", "beta"}
        said = {}
        for model, ours, others in (("alpha", alpha, beta), ("beta", beta, alpha)):
            before = answered(others)
            answer = await client.completions.with_raw_response.create(model=model, prompt="Say it.", max_tokens=8)
            assert "x-pd-proxy-fallback" not in answer.headers
            said[model] = answer.parse().choices[0].text
            stream = await client.completions.create(model=model, prompt="Say it.", max_tokens=8, stream=True)
            assert "".join([event.choices[0].text async for event in stream if event.choices]) == said[model]
            assert answered(ours) == [2, 2]
            assert answered(others) == before
            assert ours[1].engine.stats.pulls >= 1
        assert said["alpha"] != said["beta"]
        await client.close()
        await until(running.idle)


async def test_one_model_in_two_groups_is_paired_within_each() -> None:
    async with two_fleets({}, {"connector": "mooncake"}, count=2, policy={"decode": "random", "prefill": "random"}) as (
        running,
        first,
        second,
    ):
        bodies = [completion(f"{number} is another prompt. " * 8, ignore_eos=True) for number in range(32)]
        answers = await asyncio.gather(*(running.http.post("/v1/completions", json=body) for body in bodies))
        assert [answer.status_code for answer in answers] == [200] * 32
        assert not any("x-pd-proxy-fallback" in answer.headers for answer in answers)
        assert len(first[0].requests) + len(first[1].requests) == len(first[2].requests) + len(first[3].requests)
        assert len(second[0].requests) + len(second[1].requests) == len(second[2].requests) + len(second[3].requests)
        assert all(sum(answered(engines)) > 0 for engines in (first, second)), "both groups take part"
        assert all(engine.engine.stats.failed_transfers == 0 for engine in (*first, *second))
        await until(running.idle)


async def test_a_group_without_prefill_answers_by_itself_and_never_with_another_groups_prefill() -> None:
    async with two_fleets({"model": "alpha"}, {"model": "beta", "weights": 1}) as (running, alpha, beta):
        expected = text_of((await running.http.post("/v1/completions", json=completion(model="beta"))).json())
        await took_out(running, beta[0])
        answer = await running.http.post("/v1/completions", json=completion(model="beta"))
        assert text_of(answer.json()) == expected
        assert answer.headers["x-pd-proxy-fallback"] == "no_prefill_backend"
        assert answered(alpha) == [0, 0]
        ready = await running.http.get("/ready")
        assert ready.status_code == 200
        assert ready.json() == {
            "status": "ready",
            "groups": {"default": "ready", SECOND: "no prefill backend is up"},
        }


async def test_prefill_of_one_group_and_decode_of_another_make_no_pair() -> None:
    async with two_fleets({}, {"connector": "mooncake"}) as (running, first, second):
        await took_out(running, first[0])
        await took_out(running, second[1])
        answer = await running.http.post("/v1/completions", json=completion())
        assert answer.status_code == 200
        assert answer.headers["x-pd-proxy-fallback"] == "no_matching_pair"
        assert answered([second[0]]) == [0], "prefill would have handed over to another group"
        ready = await running.http.get("/ready")
        assert ready.status_code == 503
        assert ready.json()["error"]["message"] == (
            f"group default: no prefill backend is up; group {SECOND}: no decode backend is up"
        )


async def test_without_local_prefill_a_missing_pair_is_an_error_that_says_so() -> None:
    async with two_fleets({}, {"connector": "mooncake"}, fallback="reject") as (running, first, second):
        await took_out(running, first[0])
        await took_out(running, second[1])
        answer = await running.http.post("/v1/completions", json=completion())
        assert answer.status_code == 503
        assert "matches a decode backend" in answer.json()["error"]["message"]


@pytest.mark.parametrize("bounds", [{"prefill_requests": 1}, {"decode_requests": 1}])
async def test_room_is_looked_for_pair_by_pair(bounds: dict[str, int]) -> None:
    pace = {"step_time": 0.02, "prefill_rate": 2000.0}
    async with two_fleets(pace, {"connector": "mooncake", **pace}, admission=bounds) as (running, first, second):
        prompts = [f"{number} goes before the others. " * 12 for number in range(8)]
        answers = await asyncio.gather(
            *(running.http.post("/v1/completions", json=completion(prompt, max_tokens=4)) for prompt in prompts)
        )
        assert [answer.status_code for answer in answers] == [200] * 8
        assert not any("x-pd-proxy-fallback" in answer.headers for answer in answers)
        assert len(first[0].requests) == len(first[1].requests)
        assert len(second[0].requests) == len(second[1].requests)
        await until(running.idle)


@pytest.mark.parametrize("same", [True, False], ids=["the same root", "another root"])
async def test_a_stream_that_breaks_is_only_continued_by_the_same_weights(same: bool) -> None:
    first = {"root": "/models/1", "step_time": 0.02}
    second = {**first, "root": "/models/1" if same else "/models/2", "weights": 0 if same else 2}
    async with two_fleets(first, second, first_token="decode") as (running, ours, others):
        expected = text_of((await running.http.post("/v1/completions", json=completion(ignore_eos=True))).json())
        held = next(b for b in running.gateway.fleet if b.url == others[1].url)
        running.gateway.fleet.drain(held)
        before = answered(others)
        body = completion(stream=True, ignore_eos=True)
        async with running.http.stream("POST", "/v1/completions", json=body) as answer:
            text = ""
            async for line in answer.aiter_lines():
                text += line + "\n"
                if text.count("data: ") == 3 and ours[1].alive:
                    running.gateway.fleet.undrain(held)
                    ours[1].kill()
        if same:
            said = "".join(json.loads(line[6:])["choices"][0]["text"] for line in text.split("\n") if '"text"' in line)
            assert said == expected
            assert answered(others) > before
        else:
            assert "no backend that could answer is up" in text
            assert answered(others) == before


async def test_a_mixed_group_beside_pairs_of_another_model_is_no_fallback() -> None:
    async with simulators("prefill", "decode", model="alpha") as [p, d], simulators("mixed", model="beta") as [x]:
        group = {"name": SECOND, "mixed": [x.url]}
        async with running_gateway([p.url], [d.url], groups=[group]) as running:
            answer = await running.http.post("/v1/completions", json=completion(model="beta"))
            assert answer.status_code == 200
            assert "x-pd-proxy-fallback" not in answer.headers


async def test_no_pair_is_warmed_up_across_groups() -> None:
    async with two_fleets({}, {"connector": "mooncake"}, warmup=True) as (running, first, second):
        for engine in (*first, *second):
            await engine.wait_for(lambda engine=engine: len(engine.requests) >= 1)  # type: ignore[misc]
        await until(running.idle)
        assert answered((*first, *second)) == [1, 1, 1, 1]


async def test_a_backend_is_added_to_the_group_that_is_named() -> None:
    async with (
        two_fleets({"model": "alpha"}, {"model": "beta"}) as (running, _, beta),
        simulators("prefill", model="beta") as [new],
    ):

        async def add(**more: Any) -> Any:
            return await running.http.post("/instances/add", json={"type": "prefill", "instances": new.url, **more})

        unknown = await add(group="nowhere")
        assert (unknown.status_code, unknown.json()["error"]["param"]) == (400, "group")
        assert (await add(group=SECOND)).status_code == 200
        elsewhere = await add()
        assert elsewhere.status_code == 400
        assert f"of group {SECOND}" in elsewhere.json()["error"]["message"]
        await until(lambda: all(b.up for b in running.gateway.fleet))
        listed = (await running.http.get("/admin/backends")).json()["backends"]
        assert {b["group"] for b in listed if b["url"] == new.url} == {SECOND}
        await took_out(running, beta[0])
        answer = await running.http.post("/v1/completions", json=completion(model="beta"))
        assert "x-pd-proxy-fallback" not in answer.headers
        assert answered([new]) == [1]


async def test_a_worker_that_is_started_anew_has_each_backend_in_its_group() -> None:
    async with two_fleets({"model": "alpha"}, {"model": "beta", "connector": "mooncake"}) as (running, _, _):
        listed = (await running.http.get("/admin/backends")).json()["backends"]
        listed.append({**listed[-1], "url": "http://late:1"})
        fleet = Fleet(running.gateway.settings)
        adopt_backends(fleet, listed)
        assert [(b.url, b.role, b.group, b.connector) for b in fleet if b.url == "http://late:1"] == [
            ("http://late:1", listed[-1]["role"], SECOND, "mooncake")
        ]


async def test_metrics_say_which_group_is_ready() -> None:
    async with two_fleets({"model": "alpha"}, {"model": "beta"}) as (running, alpha, _):
        await took_out(running, alpha[0])
        metrics = await running.metrics()
        assert metrics['pd_proxy_group_ready{group="default"}'] == 0
        assert metrics[f'pd_proxy_group_ready{{group="{SECOND}"}}'] == 1
        assert metrics["pd_proxy_ready"] == 1
