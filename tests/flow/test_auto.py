"""`connector: auto`: engines report which hand-off protocol they speak."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from tests.contract.cases import CASES, fleet
from tests.support import Running, completion, running_gateway, simulators, until


def connectors(running: Running) -> list[str]:
    return [backend.connector for backend in running.gateway.fleet]


async def ask(running: Running, **more: Any) -> Any:
    return await running.http.post("/v1/completions", json=completion(**more))


@pytest.mark.parametrize("connector", ["nixl", "mooncake", "mooncake_ascend"])
async def test_the_reported_configuration_of_engines_is_used(connector: str) -> None:
    async with simulators("prefill", "decode", connector=connector) as [p, d]:
        places = [{"backend": p.url, "port": p.side_port}]
        async with running_gateway([p.url], [d.url], connector="auto", locations=places) as running:
            assert connectors(running) == [connector] * 2
            answer = await ask(running)
            assert answer.status_code == 200
            assert "x-pd-proxy-fallback" not in answer.headers
            assert d.engine.stats.pulls == 1
            assert (await running.http.get("/ready")).status_code == 200
            listed = (await running.http.get("/admin/backends")).json()["backends"]
            assert [backend["connector"] for backend in listed] == [connector] * 2
            await until(running.idle)


async def test_nixl_is_known_by_its_series() -> None:
    async with (
        simulators("prefill", "decode", dev_mode=False) as [p, d],
        running_gateway([p.url], [d.url], connector="auto") as running,
    ):
        assert connectors(running) == ["nixl"] * 2
        assert "x-pd-proxy-fallback" not in (await ask(running)).headers
        assert d.engine.stats.pulls == 1


async def test_mooncake_is_known_by_prefills_bootstrap_page_and_decode_speaks_the_same() -> None:
    async with simulators("prefill", "decode", connector="mooncake", dev_mode=False) as [p, d]:
        places = [{"backend": p.url, "port": p.side_port}]
        async with running_gateway([p.url], [d.url], connector="auto", locations=places) as running:
            await until(lambda: connectors(running) == ["mooncake"] * 2)
            await until(lambda: all(backend.up for backend in running.gateway.fleet))
            assert "x-pd-proxy-fallback" not in (await ask(running)).headers
            assert d.engine.stats.pulls == 1


async def test_a_prefill_that_reports_nothing_is_probed_again_after_decodes_report() -> None:
    async with simulators("prefill", connector="mooncake", dev_mode=False) as [p]:
        places = [{"backend": p.url, "port": 1}]  # nobody there yet
        async with (
            simulators("decode", connector="mooncake") as [d],
            running_gateway([p.url], [d.url], ready=False, connector="auto", locations=places) as running,
        ):
            await until(lambda: connectors(running) == ["mooncake"] * 2)
            await until(
                lambda: (
                    "did not report where" in running.gateway.fleet.pool("prefill")[0].reason
                    or "could not be asked" in running.gateway.fleet.pool("prefill")[0].reason
                )
            )
            assert not running.gateway.fleet.pool("prefill")[0].up, "no hand-off could come about"


@pytest.mark.parametrize("connector", ["none", "mooncake_ascend"])
async def test_engines_that_report_nothing_are_served_without_hand_offs(connector: str) -> None:
    async with (
        simulators("prefill", "decode", connector=connector, dev_mode=False) as [p, d],
        running_gateway([p.url], [d.url], connector="auto") as running,
    ):
        assert connectors(running) == ["", ""]
        answer = await ask(running)
        assert answer.status_code == 200
        assert answer.headers["x-pd-proxy-fallback"] == "no_matching_pair"
        assert not p.requests
        stream = await ask(running, stream=True)
        assert stream.text.rstrip().endswith("[DONE]")
        ready = await running.http.get("/ready")
        assert ready.status_code == 503
        assert "2 reported nothing" in ready.json()["error"]["message"]
        assert "set it" in ready.json()["error"]["message"]


async def test_engines_that_report_different_protocols_are_no_pair(caplog: pytest.LogCaptureFixture) -> None:
    async with (
        simulators("prefill", connector="nixl", dev_mode=False) as [p],
        simulators("decode", connector="mooncake_ascend") as [d],
    ):
        with caplog.at_level(logging.WARNING, "pd_proxy.fleet"):
            async with running_gateway([p.url], [d.url], connector="auto") as running:
                assert connectors(running) == ["nixl", "mooncake_ascend"]
                assert (await ask(running)).headers["x-pd-proxy-fallback"] == "no_matching_pair"
                assert not p.requests
                ready = await running.http.get("/ready")
                assert "hand-off protocol" in ready.json()["error"]["message"]
        assert any("several hand-off protocols (mooncake_ascend, nixl)" in r.getMessage() for r in caplog.records)


async def test_a_stray_among_many_is_left_out_and_the_others_go_on() -> None:
    async with (
        simulators("prefill", "prefill", "decode", connector="mooncake_ascend") as [p, q, d],
        simulators("decode", connector="nixl") as [stray],
        running_gateway([p.url, q.url], [d.url, stray.url], connector="auto") as running,
    ):
        answers = [await ask(running, prompt=f"{number} is a prompt. " * 8) for number in range(6)]
        assert not any("x-pd-proxy-fallback" in answer.headers for answer in answers)
        assert not stray.requests
        assert (await running.http.get("/ready")).status_code == 200


async def test_groups_find_out_each_for_itself() -> None:
    async with (
        simulators("prefill", "decode", model="alpha") as [p, d],
        simulators("prefill", "decode", model="beta", connector="mooncake") as [q, e],
    ):
        group = {"name": "second", "connector": "auto", "prefill": [q.url], "decode": [e.url]}
        places = [{"backend": q.url, "port": q.side_port}]
        async with running_gateway([p.url], [d.url], connector="auto", groups=[group], locations=places) as running:
            for model, decode in (("alpha", d), ("beta", e)):
                answer = await ask(running, model=model)
                assert "x-pd-proxy-fallback" not in answer.headers
                assert decode.engine.stats.pulls == 1


async def test_an_engine_that_comes_back_as_another_is_recognised() -> None:
    async with (
        simulators("prefill", "decode") as [p, d],
        running_gateway([p.url], [d.url], connector="auto") as running,
    ):
        assert connectors(running) == ["nixl"] * 2
        decode = running.gateway.fleet.pool("decode")[0]
        port = d.port
        d.kill()
        await until(lambda: not decode.up)
        async with simulators("decode", port=port, connector="mooncake_ascend"):
            await until(lambda: decode.up)
            assert connectors(running) == ["nixl", "mooncake_ascend"]
            assert (await ask(running)).headers["x-pd-proxy-fallback"] == "no_matching_pair"


@pytest.mark.parametrize("connector", ["sglang", "tensorrt_llm"])
async def test_engines_of_other_families_report_too(connector: str) -> None:
    case = next(case for case in CASES if case.name == connector)
    async with fleet(case, connector="auto") as (running, _, [d]):
        await until(lambda: connectors(running) == [connector] * 2)
        await until(lambda: all(backend.up for backend in running.gateway.fleet))
        answer = await ask(running)
        assert answer.status_code == 200, answer.text
        assert "x-pd-proxy-fallback" not in answer.headers
        assert d.engine.stats.pulls == 1
        await until(running.idle)
