"""What clients see of admission, over real sockets and simulated engines."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from tests.support import Running, chat, pools, until

CHAT = "/v1/chat/completions"
CLIENTS = [{"name": "small", "key": "k-small", "requests": 1}, {"name": "big", "key": "k-big", "tokens": 2000}]


def ask(running: Running, headers: dict[str, str] | None = None, **more: Any) -> asyncio.Task[httpx.Response]:
    return asyncio.create_task(running.http.post(CHAT, json=chat(**more), headers=headers or {}))


def key(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {name}"}


async def hold(running: Running, headers: dict[str, str] | None = None, **more: Any) -> asyncio.Task[httpx.Response]:
    """A request that runs until it is cancelled."""
    before = running.gateway.admission.requests
    task = ask(running, headers, max_tokens=5000, ignore_eos=True, **more)
    await until(lambda: running.gateway.admission.requests == before + 1)
    return task


async def let_go(running: Running, *held: asyncio.Task[httpx.Response]) -> None:
    for task in held:
        task.cancel()
    await until(running.idle)
    door = running.gateway.admission
    assert (door.requests, door.tokens, door.waiting) == (0, 0, 0)
    assert all((client.requests, client.tokens) == (0, 0) for client in door.clients.values())


async def test_a_queued_request_is_served_once_there_is_capacity_and_metrics_show_the_wait() -> None:
    async with pools(engine={"step_time": 0.01}, admission={"requests": 1}) as (running, _, _):
        held = await hold(running)
        waiting = ask(running)
        await until(lambda: running.gateway.admission.waiting == 1)
        metrics = await running.metrics()
        assert metrics["pd_proxy_queue_length"] == metrics["pd_proxy_running_requests"] == 1
        assert metrics["pd_proxy_running_tokens"] > 5000
        assert (await running.http.get("/ready")).status_code == 200
        held.cancel()
        assert (await waiting).status_code == 200
        await let_go(running)
        metrics = await running.metrics()
        assert metrics["pd_proxy_queue_length"] == metrics["pd_proxy_running_requests"] == 0
        assert metrics["pd_proxy_queue_duration_seconds_count"] == 2
        assert metrics["pd_proxy_queue_duration_seconds_sum"] > 0


async def test_a_queued_request_whose_client_leaves_is_sent_to_no_engine() -> None:
    async with pools(engine={"step_time": 0.01}, admission={"requests": 1}) as (running, [p], _):
        held = await hold(running)
        waiting = ask(running)
        await until(lambda: running.gateway.admission.waiting == 1)
        waiting.cancel()
        await until(lambda: running.gateway.admission.waiting == 0)
        await let_go(running, held)
        assert len([r for r in p.requests if r.path == CHAT]) == 1
        metrics = await running.metrics()
        assert metrics['pd_proxy_client_disconnects_total{stage="admission"}'] == 1


async def test_above_its_own_bounds_a_client_gets_429_and_others_are_served() -> None:
    async with pools(engine={"step_time": 0.005}, clients=CLIENTS, api_keys=["k-1"]) as (running, _, _):
        held = await hold(running, key("k-small"))
        answer = await ask(running, key("k-small"))
        assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
        assert answer.json()["error"]["type"] == "rate_limit_error"
        assert answer.json()["error"]["code"] == "rate_limit_exceeded"
        assert "k-small" not in answer.text
        assert (await ask(running, key("k-1"))).status_code == 200
        assert (await ask(running, key("k-big"))).status_code == 200
        too_many = await ask(running, key("k-big"), max_tokens=3000)
        assert too_many.status_code == 400 and too_many.json()["error"]["code"] == "too_many_tokens"
        assert "retry-after" not in too_many.headers
        assert (await ask(running, key("unknown"))).status_code == 401
        assert (await running.http.get("/v1/models", headers=key("k-small"))).status_code == 200
        metrics = await running.metrics()
        assert metrics['pd_proxy_refused_total{client="small",code="rate_limit_exceeded"}'] == 1
        assert metrics['pd_proxy_refused_total{client="big",code="too_many_tokens"}'] == 1
        await let_go(running, held)


async def test_above_the_bounds_of_the_gateway_the_answer_is_503() -> None:
    async with pools(engine={"step_time": 0.01}, admission={"requests": 1, "queue": 1, "queue_timeout": 0.2}) as (
        running,
        _,
        _,
    ):
        held = await hold(running)
        waiting = ask(running)
        await until(lambda: running.gateway.admission.waiting == 1)
        full = await ask(running)
        late = await waiting
        for answer, code in ((full, "queue_full"), (late, "queue_timeout")):
            assert answer.status_code == 503 and answer.json()["error"]["code"] == code
            assert answer.json()["error"]["type"] == "service_unavailable"
            assert 1 <= int(answer.headers["retry-after"]) <= 60
        await let_go(running, held)


@pytest.mark.parametrize("value", ["", "0", "-1", "1e3", "nan", "inf", "soon", "1.", "1234567", "0.0", "٣"])
async def test_an_invalid_x_request_timeout_is_refused(value: str) -> None:
    async with pools() as (running, _, _):
        answer = await running.http.post(CHAT, json=chat(), headers={b"x-request-timeout": value.encode()})
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "invalid_request"
        assert answer.headers["x-request-id"]


async def test_a_clients_own_timeout_bounds_both_the_wait_and_the_answer() -> None:
    async with pools(engine={"step_time": 0.01}, admission={"requests": 1}) as (running, _, _):
        patient = {"x-request-timeout": "30"}
        hurried = {"x-request-timeout": "0.2"}
        assert (await ask(running, patient)).status_code == 200
        answer = await ask(running, hurried, max_tokens=5000, ignore_eos=True)
        assert answer.status_code == 504 and answer.json()["error"]["code"] == "total_timeout"
        held = await hold(running)
        answer = await ask(running, hurried)
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "queue_timeout"
        await let_go(running, held)


@pytest.mark.slow
async def test_the_bounds_of_a_pools_backends_add_up_and_each_backend_keeps_its_own() -> None:
    bounds = {"decode_requests": 3, "prefill_requests": 2}
    settings: dict[str, Any] = {"admission": bounds, "policy": {"decode": "round_robin", "prefill": "random"}}
    async with pools(2, 2, engine={"step_time": 0.005, "prefill_rate": 5000.0}, **settings) as (running, _, _):
        most: dict[str, int] = {}

        async def watch() -> None:
            while True:
                for b in running.gateway.fleet:
                    most[b.role] = max(most.get(b.role, 0), b.inflight_requests)
                await asyncio.sleep(0)

        watching = asyncio.create_task(watch())
        answers = await asyncio.gather(*(ask(running, max_tokens=5 + n % 20, ignore_eos=True) for n in range(60)))
        watching.cancel()
        assert {answer.status_code for answer in answers} == {200}
        assert most == {"prefill": 2, "decode": 3}
        await let_go(running)


async def test_when_a_backend_dies_its_admitted_requests_may_exceed_the_others_bound() -> None:
    async with pools(1, 2, engine={"step_time": 0.01}, admission={"decode_requests": 4}) as (running, _, [d1, d2]):
        held = [await hold(running) for _ in range(8)]
        await until(lambda: d1.engine.running == d2.engine.running == 4)
        waiting = ask(running)
        await until(lambda: running.gateway.admission.waiting == 1)
        fleet = running.gateway.fleet
        dead = fleet.find(d1.url, "decode")
        assert dead is not None
        fleet.take_out(dead, "died")  # first, as a refused connection would; a leg that is cut may only be that
        d1.kill()
        await until(lambda: d2.engine.running == 8)
        assert running.gateway.admission.waiting == 1, "nothing new starts above the bound"
        for task in held[:5]:
            task.cancel()
        assert (await waiting).status_code == 200
        await let_go(running, *held)


async def test_when_every_backend_dies_queued_requests_are_answered_at_once() -> None:
    async with pools(1, 1, engine={"step_time": 0.01}, admission={"decode_requests": 1}) as (running, [p], [d]):
        held = await hold(running)
        waiting = [ask(running) for _ in range(3)]
        await until(lambda: running.gateway.admission.waiting == 3)
        p.kill()
        d.kill()
        for answer in await asyncio.gather(*waiting):
            assert answer.status_code == 503 and answer.json()["error"]["code"] == "no_backend"
        await let_go(running, held)
