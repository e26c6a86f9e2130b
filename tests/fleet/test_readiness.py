"""The log says whenever /ready changes, once for each change."""

from __future__ import annotations

import asyncio
import logging

import pytest

from tests.support import completion, running_gateway, simulators, until

COMPLETIONS = "/v1/completions"


async def test_each_change_of_ready_is_a_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pd_proxy.fleet")

    def lines() -> list[str]:
        return [r.getMessage() for r in caplog.records if r.getMessage().startswith(("ready", "not ready"))]

    async with simulators("prefill", "decode") as [p, d], running_gateway([p.url], [d.url]) as running:
        await until(lambda: lines() == ["ready: requests can be served"])
        p.kill()
        await until(lambda: len(lines()) == 2)
        assert (await running.http.get("/ready")).status_code == 503
        await p.restart()
        await until(lambda: len(lines()) == 3)
        await asyncio.sleep(0.5)
        assert lines() == ["ready: requests can be served", "not ready: no prefill backend is up", *lines()[:1]]


async def test_pools_that_serve_different_models_say_so_everywhere() -> None:
    async with (
        simulators("prefill", model="alpha") as [p],
        simulators("decode", model="beta") as [d],
        running_gateway([p.url], [d.url]) as running,
    ):
        served = "prefill serves alpha; decode serves beta"
        ready = await running.http.get("/ready")
        assert ready.status_code == 503 and served in ready.json()["error"]["message"]
        alpha = await running.http.post(COMPLETIONS, json=completion(model="alpha"))
        assert alpha.status_code == 503 and served in alpha.json()["error"]["message"]
        beta = await running.http.post(COMPLETIONS, json=completion(model="beta"))
        assert (beta.status_code, beta.headers["x-pd-proxy-fallback"]) == (200, "no_matching_pair")
    async with (
        simulators("prefill", model="alpha") as [p],
        simulators("decode", model="beta") as [d],
        running_gateway([p.url], [d.url], fallback="reject") as running,
    ):
        beta = await running.http.post(COMPLETIONS, json=completion(model="beta"))
        assert beta.status_code == 503 and served in beta.json()["error"]["message"]
        p.kill()
        await until(lambda: not all(backend.up for backend in running.gateway.fleet))
        beta = await running.http.post(COMPLETIONS, json=completion(model="beta"))
        assert beta.status_code == 503 and "no prefill backend is up" in beta.json()["error"]["message"]
