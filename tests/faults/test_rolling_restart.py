"""A rolling restart of decode engines under load, as Kubernetes and systemd do it: SIGTERM, one after the other."""

from __future__ import annotations

import asyncio
import random

import pytest

from tests.faults.test_soak import questions, shown_answer, undisturbed
from tests.support import pools, until

pytestmark = pytest.mark.slow

CLIENTS = 16
ENGINE = {"step_time": 0.004, "prefill_rate": 20_000.0}


@pytest.mark.parametrize("policy", ["least_loaded", "round_robin"])
async def test_no_answer_is_cut(policy: str) -> None:
    """No text differs, no client notices, and requests that continued elsewhere are counted."""
    asked = questions(random.Random(5))
    expected = await undisturbed(asked)
    settings = {"policy": {"decode": policy}, "breaker": {"slow_start": 0.2}}
    async with pools(2, 3, engine=ENGINE, **settings) as (running, _, decode):
        over, answered = asyncio.Event(), 0

        async def client(chance: random.Random) -> None:
            nonlocal answered
            while not over.is_set():
                number = chance.randrange(len(asked))
                path, body = asked[number]
                response = await running.http.post(path, json=body)
                assert "abort" not in response.text
                assert shown_answer(response) == expected[number], response.text
                answered += 1

        fleet = running.gateway.fleet
        async with asyncio.TaskGroup() as group:
            for number in range(CLIENTS):
                group.create_task(client(random.Random(number)))
            stopped = 0
            for engine in decode * 2:
                await until(lambda: len(fleet.candidates("decode", None)) == len(decode), 30)
                await until(lambda engine=engine: engine.engine.running > 1, 30)  # type: ignore[misc]
                engine.terminate()
                await until(lambda engine=engine: not engine.alive, 30)  # type: ignore[misc]
                await engine.restart()
                stopped += 1
            over.set()
        await until(running.idle)
        metrics = await running.metrics()
    aborted = {name: value for name, value in metrics.items() if 'reason="aborted"' in name}
    resumed = sum(value for name, value in aborted.items() if name.startswith("pd_proxy_resumes_total"))
    retried = sum(value for name, value in aborted.items() if name.startswith("pd_proxy_retries_total"))
    refused = sum(value for name, value in metrics.items() if name.startswith("pd_proxy_resumes_refused_total"))
    assert stopped == 6 and answered > 50
    assert resumed and retried and not refused
    # Each stop cuts what ran then, once; a black hole would cut whatever came after as well.
    assert resumed + retried <= stopped * CLIENTS
    leaving = sum(v for k, v in metrics.items() if k.startswith("pd_proxy_backend_ejections_total") and "leaving" in k)
    assert leaving == stopped
