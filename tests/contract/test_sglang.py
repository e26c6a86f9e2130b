"""The properties of SGLang, over sockets."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from pd_proxy_simulator.connectors.sglang import SGLang

from tests.contract.answers import PATHS, text_of_one, text_of_stream
from tests.contract.cases import CASES, fleet
from tests.support import chat, completion, running_gateway, simulators, text_of, until

pytestmark = pytest.mark.cross_product

CASE = next(case for case in CASES if case.name == "sglang")


def rooms(engine: Any) -> list[int]:
    return [request.body["bootstrap_room"] for request in engine.requests]


async def test_both_legs_join_one_room_and_every_try_has_a_new_one() -> None:
    async with fleet(CASE, prefill=2) as (running, prefill, [d]):
        for engine in prefill:
            engine.faults.add("status", leg="prefill", status=500, count=1)
        answer = await running.http.post(PATHS["completions"], json=completion())
        assert answer.status_code == 200
        asked = [room for engine in prefill for room in rooms(engine)]
        assert len(asked) == len(set(asked)) == 3
        assert set(rooms(d)) <= set(asked) and len(set(rooms(d))) == len(rooms(d))


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_prefill_refuses_ends_decode_at_once(stream: bool) -> None:
    async with fleet(CASE) as (running, [p], [d]):
        p.faults.add("status", leg="prefill", status=404)
        started = asyncio.get_running_loop().time()
        answer = await running.http.post(PATHS["completions"], json=completion(stream=stream))
        assert asyncio.get_running_loop().time() - started < 2
        error = answer.json()["error"]
        assert (answer.status_code, error["type"], error["code"]) == (404, "NotFoundError", 404)
        assert set(error) == {"message", "type", "param", "code"}
        await until(running.idle)
        await d.wait_for(lambda: not d.engine.waiting and d.engine.used_blocks == 0)
        assert [request.aborted for request in d.requests] in ([], [True])


async def test_a_request_that_decode_refuses_ends_prefill_at_once() -> None:
    async with fleet(CASE) as (running, [p], [d]):
        d.faults.add("status", leg="decode", status=404)
        answer = await running.http.post(PATHS["completions"], json=completion())
        assert answer.status_code == 404
        await until(running.idle)
        await p.wait_for(lambda: not p.engine.waiting and p.engine.used_blocks == 0)


async def test_a_bad_request_is_a_client_error_in_openais_shape() -> None:
    async with fleet(CASE) as (running, _, _):
        answer = await running.http.post(PATHS["chat"], json=chat(max_tokens=10**6))
        assert answer.status_code == 400
        assert set(answer.json()) == {"error"} and "context length" in answer.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
async def test_several_prompts_are_split_by_their_rooms(stream: bool) -> None:
    prompts = ["the first of them " * 5, "the second of them " * 5, "the third of them " * 5]
    expected = [await text_of_one("completions", prompt=prompt) for prompt in prompts]
    async with fleet(CASE) as (running, [p], [d]):
        answer = await running.http.post(PATHS["completions"], json=completion(prompts, stream=stream))
        assert answer.status_code == 200
        assert "x-pd-proxy-fallback" not in answer.headers
        if stream:
            assert len(text_of_stream(answer.text)) == len("".join(expected))
        else:
            assert [choice["text"] for choice in answer.json()["choices"]] == expected
        assert d.engine.pulls == 3
        await until(running.idle)
        assert p.engine.used_blocks == 0


async def test_several_choices_are_refused_since_the_engines_would_put_them_into_one_room() -> None:
    async with fleet(CASE) as (running, [p], [d]):
        answer = await running.http.post(PATHS["chat"], json=chat(n=2, temperature=1))
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "n")
        assert not p.requests and not d.requests


async def test_several_choices_go_to_an_engine_without_disaggregation() -> None:
    async with fleet(CASE) as (_, [p], [d]), simulators("mixed", connector="sglang") as [mixed]:
        settings = CASE.gateway([p, d])
        async with running_gateway([p.url], [d.url], [mixed.url], **settings) as running:
            answer = await running.http.post(PATHS["chat"], json=chat(n=2, temperature=1))
            assert answer.status_code == 200
            assert len(answer.json()["choices"]) == 2
            assert answer.headers["x-pd-proxy-fallback"] == "n"
            assert not d.requests


async def test_repeated_prefill_failures_do_not_lead_to_decode_alone() -> None:
    async with fleet(CASE) as (running, [p], [d]):
        p.faults.add("status", leg="prefill", status=500)
        answer = await running.http.post(PATHS["completions"], json=completion())
        assert answer.status_code >= 500
        assert all("bootstrap_room" in request.body for request in d.requests)


async def test_beside_engines_of_another_family_each_request_goes_to_an_engine_that_can_serve_it() -> None:
    async with fleet(CASE) as (_, [p], [d]), simulators("prefill", "decode") as [nixl_p, nixl_d]:
        group = {"name": "vllm", "connector": "nixl", "prefill": [nixl_p.url], "decode": [nixl_d.url]}
        async with running_gateway([p.url], [d.url], **CASE.gateway([p, d]), groups=[group]) as running:
            for _ in range(4):
                several = await running.http.post(PATHS["completions"], json=completion(["a", "b"]))
                assert several.status_code == 200 and "x-pd-proxy-fallback" not in several.headers
                choices = await running.http.post(PATHS["chat"], json=chat(n=2, temperature=1))
                assert choices.status_code == 200 and choices.headers["x-pd-proxy-fallback"] == "n"
            assert len(p.requests) == len(d.requests) == 4 and not nixl_p.requests
            assert [request.leg for request in nixl_d.requests] == ["local"] * 4


async def test_an_engine_in_another_role_stays_out_of_the_rotation_of_the_prefill_pool() -> None:
    async with (
        simulators("prefill", "decode", "decode", connector="sglang") as [p, d, wrong],
        running_gateway([p.url, wrong.url], [d.url], connector="sglang", ready=False) as running,
    ):
        backend = next(b for b in running.gateway.fleet if b.url == wrong.url)
        await until(lambda: "disaggregation mode is decode" in backend.reason)
        await until(lambda: all(b.up for b in running.gateway.fleet if b is not backend))
        assert not backend.up
        answer = await running.http.post(PATHS["completions"], json=completion())
        assert answer.status_code == 200 and text_of(answer.json())


async def test_sglang_backends_report_their_version() -> None:
    async with fleet(CASE, kind="sglang") as (running, _, _):
        assert (await running.http.post(PATHS["chat"], json=chat())).status_code == 200
        assert {backend.version for backend in running.gateway.fleet} == {"0.5.23"}


async def test_an_engine_that_has_only_the_older_page_is_asked_there(monkeypatch: pytest.MonkeyPatch) -> None:
    about = SGLang.describe
    monkeypatch.setattr(SGLang, "describe", lambda side, path: None if path == "/server_info" else about(side, path))
    async with fleet(CASE) as (running, [p], _):
        backend = next(b for b in running.gateway.fleet if b.url == p.url)
        assert backend.coordinates.port == p.side_port


async def test_a_bootstrap_port_that_has_changed_is_learnt_anew() -> None:
    async with fleet(CASE) as (running, [p], _):
        backend = next(b for b in running.gateway.fleet if b.url == p.url)
        assert backend.coordinates.port == p.side_port
        p.kill()
        await until(lambda: not backend.up)
        before, p.side_port = p.side_port, 0
        await p.restart()
        await until(lambda: backend.up)
        assert backend.coordinates.port == p.side_port != before
        assert (await running.http.post(PATHS["completions"], json=completion())).status_code == 200


async def test_the_error_of_a_stream_whose_decode_engine_dies_says_why_it_is_not_continued() -> None:
    async with fleet(CASE, decode=2) as (running, _, decode):
        for engine in decode:
            engine.faults.add("die_mid_stream", leg="decode", after_tokens=3, count=1)
        answer = await running.http.post(PATHS["completions"], json=completion(stream=True))
        assert "stream_interrupted" in answer.text and "connector" in answer.text
