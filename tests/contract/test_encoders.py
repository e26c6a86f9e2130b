"""The encoder stage over sockets: whatever happens to it, clients receive the answer of a single engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from pd_proxy_simulator import Simulator

from tests.contract.answers import text_of_stream
from tests.contract.cases import CASES, IDS, MOST, Case, one_engine
from tests.handoff.helpers import PNG, image, sound
from tests.support import Running, chat, running_gateway, simulators, text_of, until

pytestmark = pytest.mark.cross_product

PATH = "/v1/chat/completions"
NIXL = CASES[0]
EVERY = pytest.mark.parametrize("case", MOST, ids=IDS)


def ask(*content: Any, **more: Any) -> dict[str, Any]:
    content = content or ({"type": "text", "text": "what is that?"}, image(), sound(), image(PNG + "AA"))
    return chat(messages=[{"role": "user", "content": list(content)}], **more)


@pytest.fixture
def storage(tmp_path: Path) -> str:
    return str(tmp_path)


@asynccontextmanager
async def fleet(
    case: Case = NIXL,
    *,
    encode: int = 2,
    roles: tuple[str, ...] = ("prefill", "decode"),
    storage: str = "",
    **settings: Any,
) -> AsyncIterator[tuple[Running, list[Simulator], list[Simulator]]]:
    """A gateway before encoders and other engines. Encoders are of kind `example` where there is a storage folder,
    else `cpu`."""
    kind = {"encoder_connector": "example" if storage else "cpu", "encoder_storage": storage}
    with case.engines() as told:
        told = {**told, **kind, **settings.pop("engine", {})}
        async with simulators(*["encode"] * encode, *roles, **told) as engines:
            by_role: dict[str, list[str]] = {}
            for engine in engines:
                by_role.setdefault(engine.config.role, []).append(engine.url)
            more = {**case.gateway(engines), **settings, "encode": by_role.pop("encode", [])}
            async with running_gateway(**by_role, **more) as running:
                yield running, engines[:encode], engines[encode:]


async def text_of_one(**more: Any) -> str:
    async with one_engine() as running:
        return text_of((await running.http.post(PATH, json=ask(**more))).json())


@EVERY
@pytest.mark.parametrize("shared", [False, True], ids=["cpu", "example"])
async def test_media_are_encoded_by_an_encoder_and_prefill_fetches_the_embeddings(
    case: Case, shared: bool, storage: str
) -> None:
    async with fleet(case, storage=storage if shared else "") as (running, encoders, [p, d]):
        for stream in (False, True):
            answer = await running.http.post(PATH, json=ask(stream=stream))
            assert answer.status_code == 200, answer.text
            assert (text_of_stream(answer.text) if stream else text_of(answer.json())) == await text_of_one()
            assert not any(word in answer.text for word in ("ec_transfer_params", "peer_host", "uuid"))
            assert "x-pd-proxy-fallback" not in answer.headers
        assert sum(engine.engine.media.encoded for engine in encoders) == 6
        assert all(engine.engine.media.encoded for engine in encoders)
        assert (p.engine.media.fetched_from_others, p.engine.media.encoded) == (6, 0)
        assert d.engine.stats.pulls >= 1
        assert d.engine.media.encoded == 0
        legs = [request for engine in encoders for request in engine.requests]
        names = {request.headers["x-request-id"] for request in legs}
        assert len(names) == len(legs)
        assert {name.rpartition(":")[0] for name in names} == {r.headers["x-request-id"] for r in p.requests}
        await until(running.idle)


@pytest.mark.parametrize("role", ["mixed", "decode"])
async def test_the_engine_that_computes_the_prompt_fetches_the_embeddings(role: str) -> None:
    async with fleet(roles=(role,)) as (running, encoders, [engine]):
        answer = await running.http.post(PATH, json=ask())
        assert text_of(answer.json()) == await text_of_one()
        assert (engine.engine.media.fetched_from_others, engine.engine.media.encoded) == (3, 0)
        assert sum(len(one.requests) for one in encoders) >= 2
        await until(running.idle)


async def test_requests_without_media_are_sent_to_no_encoder() -> None:
    async with fleet() as (running, encoders, _):
        assert (await running.http.post(PATH, json=chat())).status_code == 200
        answer = await running.http.post("/v1/completions", json={"model": "sim", "prompt": '{"type": "image"}'})
        assert answer.status_code == 200
        assert not any(one.requests for one in encoders)


async def test_a_clients_encoder_parameters_reach_no_engine() -> None:
    evil = {"ec_transfer_params": {"k": {"peer_host": "10.6.6.6", "peer_port": 1}}}
    async with fleet() as (running, encoders, engines):
        answer = await running.http.post(PATH, json=ask(image(uuid="chosen"), vllm_xargs=evil, **evil))
        assert answer.status_code == 200
        seen = json.dumps([request.body for engine in (*encoders, *engines) for request in engine.requests])
        assert "10.6.6.6" not in seen
        assert "chosen" not in seen


@pytest.mark.parametrize("fault", ["status", "reset", "garbage", "kill", "hang"])
async def test_an_encoder_that_fails_fails_no_request(fault: str) -> None:
    expected = await text_of_one()
    async with fleet(timeouts={"prefill": 1.0}) as (running, [bad, good], _):
        if fault == "kill":
            bad.kill()
        else:
            bad.faults.add(fault, leg="encode")  # type: ignore[arg-type]
        answer = await running.http.post(PATH, json=ask(stream=True))
        assert answer.status_code == 200, answer.text
        assert text_of_stream(answer.text) == expected
        assert "x-pd-proxy-fallback" not in answer.headers
        assert good.engine.media.encoded >= 3
        retries = {name for name in await running.metrics() if name.startswith("pd_proxy_retries_total")}
        assert all('leg="encode"' in name for name in retries)
        await until(running.idle)


async def test_each_try_has_its_media_encoded_anew() -> None:
    async with fleet(encode=1, roles=("prefill", "decode", "decode")) as (running, [e], [p, *decode]):
        for engine in decode:
            engine.faults.add("status", leg="decode", status=500, count=1)
        answer = await running.http.post(PATH, json=ask())
        assert text_of(answer.json()) == await text_of_one()
        assert len(p.requests) == 2 or len(p.requests) == 3
        assert e.engine.media.encoded == 3 * len(p.requests)
        assert "x-pd-proxy-fallback" not in answer.headers
        await until(running.idle)


async def test_an_answer_that_no_encoder_gives_counts_as_a_failure() -> None:
    async with fleet(encode=1) as (running, [e], _):
        e.faults.add("garbage", leg="encode", form="json", count=1)
        answer = await running.http.post(PATH, json=ask())
        assert text_of(answer.json()) == await text_of_one()
        assert (await running.metrics())['pd_proxy_retries_total{leg="encode",reason="garbled"}'] == 1


async def test_without_encoders_prefill_encodes_and_the_fallback_is_reported() -> None:
    expected = await text_of_one()
    async with fleet(encode=1) as (running, [e], [p, _]):
        e.kill()
        await until(lambda: not running.gateway.fleet.pool("encode")[0].up)
        answer = await running.http.post(PATH, json=ask())
        assert text_of(answer.json()) == expected
        assert answer.headers["x-pd-proxy-fallback"] == "no_encode_backend"
        assert p.engine.media.encoded == 3
        assert (await running.metrics())['pd_proxy_fallbacks_total{reason="no_encode_backend"}'] == 1


async def test_after_two_failed_encoder_tries_prefill_encodes() -> None:
    expected = await text_of_one()
    async with fleet(encode=1) as (running, [e], [p, _]):
        e.faults.add("status", leg="encode", status=500)
        answer = await running.http.post(PATH, json=ask())
        assert text_of(answer.json()) == expected
        assert answer.headers["x-pd-proxy-fallback"] == "encode_failed"
        assert (len(e.requests), p.engine.media.encoded) == (4, 3)


async def test_where_fallbacks_are_rejected_the_request_fails() -> None:
    async with fleet(encode=1, fallback="reject") as (running, [e], [p, d]):
        e.faults.add("status", leg="encode", status=500)
        assert (await running.http.post(PATH, json=ask())).status_code == 500
        e.kill()
        await until(lambda: not running.gateway.fleet.pool("encode")[0].up)
        answer = await running.http.post(PATH, json=ask())
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_backend")
        assert not (p.requests or d.requests)
        assert (await running.http.post(PATH, json=chat())).status_code == 200
        await until(running.idle)


async def test_media_that_an_encoder_refuses_are_a_client_error() -> None:
    async with fleet() as (running, encoders, [p, d]):
        answer = await running.http.post(PATH, json=ask({"type": "image_url", "image_url": None}))
        assert answer.status_code == 400
        assert sum(len(one.requests) for one in encoders) == 1
        assert not (p.requests or d.requests)


async def test_a_lost_embedding_is_encoded_again() -> None:
    async with fleet() as (running, encoders, [p, _]):
        for one in encoders:  # embeddings are dropped before prefill fetches them
            one.faults.add("hang", leg="pull")
        p.faults.add("delay_first_byte", leg="prefill", delay_s=0.3)
        asking = asyncio.ensure_future(running.http.post(PATH, json=ask()))
        await p.wait_for(lambda: len(p.requests) == 1)
        for one in encoders:
            one.kill()
        assert text_of((await asking).json()) == await text_of_one()
        assert (p.engine.media.missed, p.engine.media.encoded) == (3, 3)


async def test_a_client_that_leaves_ends_its_encode_legs() -> None:
    async with fleet(engine={"encode_time": 5.0}) as (running, encoders, [p, d]):
        data = json.dumps(ask()).encode()
        _, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data)
        for one in encoders:
            await one.wait_for(lambda one=one: len(one.requests) > 0)  # type: ignore[misc]
        writer.close()
        await until(running.idle)
        for one in encoders:
            await one.wait_for(lambda one=one: all(r.aborted for r in one.requests))  # type: ignore[misc]
        assert not (p.requests or d.requests)


async def test_encoders_can_come_and_go() -> None:
    async with (
        simulators("encode", "mixed", encoder_connector="cpu") as [e, m],
        running_gateway(mixed=[m.url]) as running,
    ):
        await running.http.post(PATH, json=ask())
        change = {"type": "encode", "instances": e.url}
        assert (await running.http.post("/instances/add", json=change)).status_code == 200
        await until(lambda: all(b.up for b in running.gateway.fleet))
        listed = (await running.http.get("/admin/backends")).json()["backends"]
        assert {backend["role"] for backend in listed} == {"encode", "mixed"}
        await running.http.post(PATH, json=ask())
        assert (m.engine.media.encoded, m.engine.media.fetched_from_others) == (3, 3)
        assert (await running.http.post("/instances/remove", json=change)).status_code == 200
        await running.http.post(PATH, json=ask())
        assert m.engine.media.encoded == 6


async def test_encoders_serve_their_own_group_only() -> None:
    async with simulators("encode", "mixed", "mixed", encoder_connector="cpu") as [e, near, far]:
        groups = [{"name": "far", "mixed": [far.url]}]
        async with running_gateway(mixed=[near.url], encode=[e.url], groups=groups) as running:
            for _ in range(12):
                assert (await running.http.post(PATH, json=ask())).status_code == 200
            assert far.engine.media.fetched_from_others == near.engine.media.encoded == 0
            assert near.engine.media.fetched_from_others == e.engine.media.encoded > 0


async def test_an_encoder_answers_no_client_and_does_not_make_the_gateway_ready() -> None:
    async with simulators("encode", encoder_connector="cpu") as [e], running_gateway(encode=[e.url]) as running:
        assert (await running.http.get("/ready")).status_code == 503
        assert (await running.http.post(PATH, json=chat())).status_code == 503
        assert not e.requests
