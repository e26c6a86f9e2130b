"""Backends that are alive but fail: the breaker ejects them, and they come back; over real requests."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from pd_proxy_simulator import Simulator

from tests.support import Running, chat, pools, text_of, until

CHAT = "/v1/chat/completions"
TURNS = {"prefill": "round_robin", "decode": "round_robin"}


def asked(engine: Simulator) -> int:
    """How many requests an engine was given."""
    return sum(request.path == CHAT for request in engine.requests)


def state(running: Running, engine: Simulator) -> str:
    fleet = running.gateway.fleet
    return next(fleet.state(backend) for backend in fleet if backend.url == engine.url)


async def good(running: Running, count: int, **request: Any) -> None:
    for _ in range(count):
        answer = await running.http.post(CHAT, json=chat(**request))
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("leg", ["prefill", "decode"])
async def test_one_that_answers_500_to_everything_is_left_out_and_comes_back(leg: str) -> None:
    patient = {"handshake_timeout": 5.0}  # where each request is counted, none may fail by itself
    breaker = {"consecutive_failures": 3, "ejection": 0.5, "slow_start": 0.1}
    async with pools(2, 2, engine=patient, policy=TURNS, breaker=breaker) as (running, prefill, decode):
        expected = text_of((await running.http.post(CHAT, json=chat())).json())
        bad, _ = prefill if leg == "prefill" else decode
        fault = bad.faults.add("status", status=500, leg=leg)
        before = asked(bad)
        ejections = running.gateway.fleet.outlier_detector.ejections

        async def until_ejected(times: int) -> None:
            for _ in range(100):
                answer = await running.http.post(CHAT, json=chat())
                assert (answer.status_code, text_of(answer.json())) == (200, expected), "no client sees a failure"
                if sum(ejections.values()) == times:
                    return
            pytest.fail("it was not ejected")

        await until_ejected(1)
        assert asked(bad) - before == 3
        name = "pd_proxy_backend_ejections_total"
        labels = f'{{backend="{bad.url}",leg="{leg}",pool="{leg}",reason="consecutive"}}'
        assert (await running.metrics())[name + labels] == 1
        await until(lambda: state(running, bad) != "ejected")
        await until_ejected(2)  # it is still bad
        assert asked(bad) - before == 6
        bad.faults.remove(fault)
        await until(lambda: state(running, bad) == "up")
        before = asked(bad)
        await good(running, 8)
        assert asked(bad) - before == 4
        assert state(running, bad) == "up"


async def test_one_that_fails_now_and_then_is_left_out_for_its_success_rate() -> None:
    breaker = {"consecutive_failures": 100, "minimum_volume": 6, "ejection": 60}
    async with pools(1, 2, policy=TURNS, breaker=breaker) as (running, _, [bad, _]):
        bad.faults.add("status", status=500, leg="decode", probability=0.5)
        for _ in range(60):
            await good(running, 1)
            if state(running, bad) == "ejected":
                break
        [(_, url, leg, reason)] = running.gateway.fleet.outlier_detector.ejections
        assert (url, leg, reason) == (bad.url, "decode", "success_rate")


async def test_one_that_hangs_is_left_out() -> None:
    breaker = {"consecutive_failures": 2, "ejection": 60}
    async with pools(2, 1, policy=TURNS, breaker=breaker, timeouts={"prefill": 0.15}) as (running, [bad, _], _):
        bad.faults.add("hang", leg="prefill")
        await good(running, 6)
        assert state(running, bad) == "ejected"
        hung = bad.faults.find("hang")
        assert hung is not None and hung.hits == 2


@pytest.mark.slow
@pytest.mark.parametrize("leg", ["prefill", "decode"])
async def test_the_slow_one_of_three_is_left_out(leg: str) -> None:
    breaker = {"minimum_volume": 4, "ejection": 60}
    engine = {"step_time": 0.004, "prefill_rate": 5000.0}
    counts = {"prefill": 3, "decode": 1} if leg == "prefill" else {"prefill": 1, "decode": 3}
    async with pools(**counts, engine=engine, policy=TURNS, breaker=breaker) as (running, prefill, decode):
        bad = (prefill if leg == "prefill" else decode)[0]
        bad.faults.add("slow", factor=40.0 if leg == "prefill" else 10.0)
        for _ in range(10):
            request = chat(stream=True, max_tokens=12, ignore_eos=True)
            await asyncio.gather(*(running.http.post(CHAT, json=request) for _ in range(6)))
            if state(running, bad) == "ejected":
                break
        [(_, url, slow_leg, reason)] = running.gateway.fleet.outlier_detector.ejections
        assert (url, slow_leg, reason) == (bad.url, leg, "slow")
        before = asked(bad)
        await good(running, 6)
        assert asked(bad) == before


async def test_the_slower_of_two_is_kept() -> None:
    async with pools(1, 2, engine={"step_time": 0.002}, breaker={"minimum_volume": 3}) as (running, _, [slow, _]):
        slow.faults.add("slow", factor=15.0)
        request = chat(stream=True, max_tokens=8, ignore_eos=True)
        for _ in range(5):
            await asyncio.gather(*(running.http.post(CHAT, json=request) for _ in range(4)))
        assert not running.gateway.fleet.outlier_detector.ejections


async def test_when_no_other_backend_is_left_an_ejected_one_is_used() -> None:
    breaker = {"consecutive_failures": 2, "ejection": 300}
    async with pools(1, 2, policy=TURNS, breaker=breaker) as (running, _, [bad, other]):
        fault = bad.faults.add("status", status=500, leg="decode")
        await good(running, 6)
        assert state(running, bad) == "ejected"
        bad.faults.remove(fault)
        other.kill()
        await until(lambda: state(running, other) == "down")
        await good(running, 2)
        assert state(running, bad) == "ejected"
        assert (await running.metrics())['pd_proxy_pool_panic{pool="decode"}'] == 1


async def test_a_busy_backend_with_a_retry_after_is_left_alone_till_then() -> None:
    async with pools(1, 2, policy=TURNS) as (running, _, [busy, other]):
        busy.faults.add("status", status=429, leg="decode", retry_after=60)
        await good(running, 8)
        fault = busy.faults.find("status")
        assert fault is not None and fault.hits == 1
        assert not running.gateway.fleet.outlier_detector.ejections
        other.faults.add("status", status=429, leg="decode", retry_after=60)
        answer = await running.http.post(CHAT, json=chat())
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "60")
        assert fault.hits == 2, "when all are busy all are asked"


async def test_refused_requests_do_not_count_against_an_engine() -> None:
    async with pools(2, 2, breaker={"consecutive_failures": 1}) as (running, _, _):
        for _ in range(6):
            answer = await running.http.post(CHAT, json={"model": "sim", "messages": "not a list"})
            assert answer.status_code == 400
        assert not running.gateway.fleet.outlier_detector.ejections
