"""Eight engines that miss their health checks at once because the gateway stands still, and eight that are dead."""

from __future__ import annotations

import asyncio
import json
import logging
from time import sleep

import pytest
from pd_proxy.fleet.backend import Backend
from pd_proxy.fleet.fleet import Fleet
from pd_proxy.fleet.health.probe import Probe

from tests.support import Running, chat, pools, until

QUICK = {"interval": 0.05, "timeout": 0.3, "failures": 1}
STANDSTILL = 0.5  # seconds; longer than a check may take
TOKENS = 60
ENGINE = {"step_time": 0.02}


async def streamed(running: Running, progress: list[int], place: int) -> str:
    """The text of one stream; the number of its events so far goes into `progress`."""
    text = ""
    body = chat(stream=True, max_tokens=TOKENS, min_tokens=TOKENS)
    async with running.http.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            assert "error" not in event, event
            progress[place] += 1
            text += event["choices"][0]["delta"].get("content") or ""
    return text


@pytest.fixture
def taken_out(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Why backends were taken out."""
    reasons: list[str] = []
    take_out = Fleet.take_out

    def noted(fleet: Fleet, backend: Backend, reason: str) -> None:
        reasons.append(reason)
        take_out(fleet, backend, reason)

    monkeypatch.setattr(Fleet, "take_out", noted)
    return reasons


async def test_no_backend_is_taken_out_and_no_stream_ends_when_the_gateway_stands_still(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, taken_out: list[str]
) -> None:
    under_way = 0
    probe = Probe.probe

    async def counted(prober: Probe, backend: Backend) -> None:
        nonlocal under_way
        under_way += 1
        try:
            await probe(prober, backend)
        finally:
            under_way -= 1

    monkeypatch.setattr(Probe, "probe", counted)
    caplog.set_level(logging.WARNING, "pd_proxy.fleet")
    async with pools(4, 4, engine=ENGINE, health=QUICK) as (running, _, _):
        progress = [0] * 8
        streams = [asyncio.create_task(streamed(running, progress, place)) for place in range(8)]
        await until(lambda: min(progress) > 2)
        for _ in range(2):
            before = sum(progress)
            await until(lambda: under_way > 1)
            sleep(STANDSTILL)
            await until(lambda before=before: sum(progress) > before + 8)  # type: ignore[misc]
        texts = await asyncio.gather(*streams)
        metrics = await running.metrics()
    assert taken_out == []
    assert len(set(texts)) == 1
    assert not any(name.startswith(("pd_proxy_resumes", "pd_proxy_retries")) for name in metrics)
    assert metrics['pd_proxy_health_checks_ignored_total{reason="gateway_delayed"}'] >= 2
    assert "while this gateway's event loop stood still" in caplog.text


async def test_when_all_are_dead_they_leave_and_streams_that_move_go_on(taken_out: list[str]) -> None:
    """Nobody listens at any engine's port any more; what runs there goes on."""
    async with pools(4, 4, engine=ENGINE, health={**QUICK, "failures": 2}) as (running, prefills, decodes):
        progress = [0] * 8
        streams = [asyncio.create_task(streamed(running, progress, place)) for place in range(8)]
        await until(lambda: min(progress) > 2)
        for engine in (*prefills, *decodes):
            engine.faults.add("refuse")
        await until(lambda: not any(backend.up for backend in running.gateway.fleet))
        assert max(progress) < TOKENS
        texts = await asyncio.gather(*streams)
        metrics = await running.metrics()
    assert taken_out == ["/health could not be asked: connection refused"] * 8
    assert len(set(texts)) == 1
    assert len(texts[0]) > TOKENS
    assert not any(name.startswith(("pd_proxy_resumes", "pd_proxy_retries")) for name in metrics)
    assert metrics['pd_proxy_health_checks_ignored_total{reason="mass_failure"}'] >= 1
