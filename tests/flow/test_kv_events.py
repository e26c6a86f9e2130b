"""A gateway whose engines publish KV events knows the content of their caches, even of prompts that others sent."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from pd_proxy_simulator import Simulator, SimulatorConfig

from tests.support import Running, running_gateway, until

PROMPT = [number % 90 + 5 for number in range(640)]
TEXT = "the river runs past the old harbour and the engine waits for a signal " * 40


class Bed:
    def __init__(self, gateway: Running, engines: list[Simulator]) -> None:
        self.gateway = gateway
        self.engines = engines

    async def ask(self, prompt: Any, **more: Any) -> int:
        """Tokens of a prompt that were cached where the gateway had it computed."""
        body = {"model": "sim", "prompt": prompt, "max_tokens": 2, **more}
        answer = (await self.gateway.http.post("/v1/completions", json=body)).raise_for_status().json()
        details = answer["usage"]["prompt_tokens_details"]
        return details["cached_tokens"] if details else 0

    async def ask_itself(self, engine: Simulator, prompt: Any) -> None:
        """Have an engine compute a prompt behind the gateway's back."""
        body = {"model": "sim", "prompt": prompt, "max_tokens": 1}
        (await self.gateway.http.post(f"{engine.url}/v1/completions", json=body)).raise_for_status()

    async def heard(self) -> None:
        """What the engines have published has been taken, and nothing waits to be learnt."""
        events = self.gateway.gateway.messages.kv_events
        assert events is not None
        last: dict[int, int] = {}
        for engine in self.engines:
            assert engine.publisher is not None
            engine.publisher.flush()
            last[engine.publisher.port] = engine.publisher.sequence - 1

        def taken() -> bool:
            followers = events._followers.values()
            got = {int(f._events.rpartition(":")[2]): -1 if f._last is None else f._last for f in followers}
            busy = events._to_restore or events._lessons or any(f._busy.locked() for f in followers)
            return not busy and all(got.get(port, -2) >= number for port, number in last.items())

        await until(taken)


@asynccontextmanager
async def bed(count: int = 3, warm: Any = None, **more: Any) -> AsyncIterator[Bed]:
    """A gateway before mixed engines that publish; the last of them has computed a prompt before it starts."""
    engines = [Simulator(SimulatorConfig(kv_events=0)) for _ in range(count)]
    for engine in engines:
        await engine.start()
    locations = [
        {"backend": engine.url, "kv_events_port": engine.kv_events_port, "kv_replay_port": engine.kv_replay_port}
        for engine in engines
    ]
    endpoints = {"endpoint": "tcp://{host}:5557", "replay": "tcp://{host}:5558"}
    try:
        if warm is not None:
            async with running_gateway(mixed=[engines[-1].url]) as first:
                await Bed(first, engines).ask(warm)
        async with running_gateway(
            mixed=[engine.url for engine in engines], kv_events=endpoints, locations=locations, **more
        ) as gateway:
            events = gateway.gateway.messages.kv_events
            assert events is not None
            await until(lambda: events.connected == count)
            it = Bed(gateway, engines)
            await it.heard()
            yield it
    finally:
        for engine in engines:
            await engine.stop(0)


@pytest.fixture(autouse=True)
def look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pd_proxy.fleet.zmq.kv_events._LOOK", 0.01)


async def test_an_engine_that_was_warm_before_the_gateway_started_gets_the_prompt() -> None:
    async with bed(warm=PROMPT) as it:
        await it.ask([77] * 400)  # the first prompt of ids: what is known of ids is passed on
        await it.heard()
        assert await it.ask(PROMPT) == 624
        served = [engine.served for engine in it.engines]
        assert await it.ask(PROMPT) == 624
        assert [engine.served for engine in it.engines] == [*served[:-1], served[-1] + 1]


async def test_a_prompt_that_another_gateway_sent_is_known() -> None:
    async with bed() as it:
        await it.ask([77] * 400)
        await it.ask_itself(it.engines[1], PROMPT)
        await it.heard()
        assert await it.ask(PROMPT) == 624


async def test_a_cache_that_somebody_else_has_reset_is_known_to_be_empty() -> None:
    async with bed(2) as it:
        index = it.gateway.gateway.messages.kv_events.corrections._index  # type: ignore[union-attr]
        await it.ask(PROMPT)
        await it.heard()
        assert sum(index.tokens(engine.url) for engine in it.engines) >= 640  # type: ignore[attr-defined]
        for engine in it.engines:
            (await it.gateway.http.post(f"{engine.url}/reset_prefix_cache")).raise_for_status()
        await it.heard()
        assert sum(index.tokens(engine.url) for engine in it.engines) == 0  # type: ignore[attr-defined]
        assert await it.ask(PROMPT) == 0


async def test_a_streams_ids_make_events_count_for_its_text() -> None:
    async with bed() as it:
        body = {"model": "sim", "prompt": TEXT, "max_tokens": 2, "stream": True}
        (await it.gateway.http.post("/v1/completions", json=body)).raise_for_status()
        await it.heard()
        events = it.gateway.gateway.messages.kv_events
        assert events is not None
        await until(lambda: events.events["learnt"] == 1)
        for engine in it.engines:
            (await it.gateway.http.post(f"{engine.url}/reset_prefix_cache")).raise_for_status()
        await it.ask_itself(it.engines[2], TEXT)
        await it.heard()
        served = it.engines[2].served
        assert await it.ask(TEXT) > 500
        assert it.engines[2].served == served + 1


async def test_metrics_count_the_outcomes_of_events() -> None:
    async with bed(1) as it:
        await it.ask(PROMPT)
        await it.heard()
        metrics = await it.gateway.metrics()
        assert metrics['pd_proxy_engine_messages_total{message="kv_event",result="stored"}'] == 40
        assert metrics['pd_proxy_engine_messages_total{message="kv_batch",result="batch"}'] >= 1


async def test_without_a_policy_that_uses_them_no_events_are_followed() -> None:
    policy = dict.fromkeys(("prefill", "decode", "mixed"), "least_loaded")
    endpoints = {"endpoint": "tcp://{host}:5557"}
    async with (
        Simulator() as engine,
        running_gateway(mixed=[engine.url], kv_events=endpoints, policy=policy) as gateway,
    ):
        assert gateway.gateway.messages.kv_events is None
