"""One-leg routes: their pools, retries, removed fields, errors and metrics."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
from pd_proxy_simulator import Simulator

from tests.support import Running, chat, pools, running_gateway, simulators, soon, until

pytestmark = pytest.mark.cross_product

EMBEDDINGS = "/v1/embeddings"
INPUT = {"model": "sim", "input": "the river"}


@asynccontextmanager
async def mixed(
    count: int = 1, *, engine: dict[str, Any] | None = None, **settings: Any
) -> AsyncIterator[tuple[Running, list[Simulator]]]:
    """A gateway before mixed backends that have every route."""
    async with (
        simulators(*["mixed"] * count, **{"task": "any", **(engine or {})}) as engines,
        running_gateway(mixed=[e.url for e in engines], **settings) as running,
    ):
        yield running, engines


def openai_client(running: Running) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url=running.url + "/v1",
        api_key="any",
        max_retries=0,
        http_client=openai.DefaultAsyncHttpxClient(verify=False),
    )


async def test_the_openai_client_gets_embeddings_and_moderations() -> None:
    async with (
        mixed(kind="openai", engine={"surface": "openai"}) as (running, [engine]),
        openai_client(running) as client,
    ):
        answer = await client.embeddings.create(model="sim", input=["the river", "a stone"])
        assert [len(one.embedding) for one in answer.data] == [8, 8] and answer.usage.prompt_tokens > 0
        floats = await client.embeddings.create(model="sim", input="the river", encoding_format="float")
        assert floats.data[0].embedding == pytest.approx(answer.data[0].embedding, abs=1e-6)
        moderated = await client.moderations.create(model="sim", input="a gentle word")
        assert len(moderated.results) == 1
        assert [model.id async for model in client.models.list()] == ["sim"]
        assert (await client.models.retrieve("sim")).id == "sim"
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            await client.embeddings.create(model="nobody", input="x")
        assert len(engine.requests) == 3, "an unknown model is nobody's"
        assert running.idle()


async def test_embeddings_as_bytes_have_the_header_that_describes_them() -> None:
    async with mixed() as (running, _):
        answer = await running.http.post(EMBEDDINGS, json={**INPUT, "encoding_format": "bytes"})
        assert answer.headers["content-type"] == "application/octet-stream"
        assert json.loads(answer.headers["metadata"])["data"] == [{"index": 0, "shape": [8]}]
        encoded = await running.http.post(EMBEDDINGS, json={**INPUT, "encoding_format": "base64"})
        assert base64.b64decode(encoded.json()["data"][0]["embedding"]) == answer.content
        assert len(struct.unpack("<8f", answer.content)) == 8


CHAT_MESSAGES = [{"role": "user", "content": "the river"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/embeddings": INPUT,
    "/pooling": INPUT,
    "/classify": INPUT,
    "/v1/moderations": INPUT,
    "/score": {"model": "sim", "text_1": "a", "text_2": ["b", "c"]},
    "/v1/score": {"model": "sim", "text_1": "a", "text_2": ["b", "c"]},
    "/rerank": {"model": "sim", "query": "a", "documents": ["b", "c"]},
    "/v1/rerank": {"model": "sim", "query": "a", "documents": ["b", "c"]},
    "/v2/rerank": {"model": "sim", "query": "a", "documents": ["b", "c"]},
    "/tokenize": {"model": "sim", "prompt": "the river"},
    "/detokenize": {"model": "sim", "tokens": [300, 301]},
    "/v1/chat/completions/batch": {"model": "sim", "messages": [CHAT_MESSAGES, CHAT_MESSAGES], "max_tokens": 2},
    "/v1/chat/completions/render": {"model": "sim", "messages": CHAT_MESSAGES},
    "/v1/completions/render": {"model": "sim", "prompt": "the river"},
    "/v1/messages/render": {"model": "sim", "messages": CHAT_MESSAGES, "max_tokens": 2},
    "/v1/responses/render": {"model": "sim", "input": "the river"},
    "/v1/messages/count_tokens": {"model": "sim", "messages": [{"role": "user", "content": "the river"}]},
}
OFFERED = [path for path in BODIES if path != "/v1/moderations"]


@pytest.mark.parametrize("path", OFFERED)
async def test_every_route_is_served_in_one_leg_and_counted(path: str) -> None:
    async with mixed() as (running, [engine]):
        answer = await running.http.post(path, json=BODIES[path], headers={"x-request-id": "mine"})
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-request-id"] == "mine"
        direct = await running.http.post(engine.url + path, json=BODIES[path])
        [said, wanted] = [one[0] if isinstance(one, list) else one for one in (answer.json(), direct.json())]
        assert said.keys() == wanted.keys() - {"kv_transfer_params", "ec_transfer_params"}
        endpoint = path.rpartition("/")[2]
        metrics = await running.metrics()
        assert metrics[f'pd_proxy_requests_total{{endpoint="{endpoint}",model="sim",outcome="ok"}}'] == 1
        assert running.idle()


@pytest.mark.parametrize("path", OFFERED)
async def test_every_route_refuses_invalid_requests(path: str) -> None:
    async with mixed(api_keys="k", limits={"request_body": 2000}) as (running, [engine]):
        key = {"authorization": "Bearer k"}

        async def refused(status: int, code: str, **request: Any) -> None:
            answer = await running.http.request(**{"method": "POST", "url": path, "headers": key, **request})
            error = answer.json()["error"]
            if path.startswith("/v1/messages/"):  # Anthropic's form of errors has no code
                assert (answer.status_code, answer.json()["type"]) == (status, "error"), answer.text
                assert set(error) == {"type", "message"}
            else:
                assert (answer.status_code, error["code"]) == (status, code), answer.text

        await refused(401, "invalid_api_key", json=BODIES[path], headers={})
        await refused(405, "method_not_allowed", method="GET")
        await refused(400, "invalid_request", content=b"{")
        await refused(400, "invalid_request", content=b"[]")
        await refused(400, "invalid_request", json={**BODIES[path], "model": 1})
        await refused(404, "model_not_found", json={**BODIES[path], "model": "nobody"})
        await refused(413, "body_too_large", json={**BODIES[path], "more": "x" * 2000})
        await refused(400, "invalid_request", json=BODIES[path], headers={**key, "x-request-timeout": "soon"})
        assert not engine.requests
        assert running.idle()


async def test_hand_off_fields_are_removed_from_requests_and_from_answers() -> None:
    said = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(next((line.split()[1] for line in head.lower().split(b"\r\n") if b"content-length" in line), b"0"))
        said.append((head, await reader.readexactly(length)))
        body = b'{"data":[],"kv_transfer_params":{"remote_host":"10.0.0.1"}}'
        if b"/v1/embeddings" not in head:
            body = b'{"data":[{"id":"sim"}]}'
        lines = b"content-type: application/json\r\nx-engine: secret\r\ncontent-length: %d\r\nconnection: close" % len(
            body
        )
        writer.write(b"HTTP/1.1 200 OK\r\n" + lines + b"\r\n\r\n" + body)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with running_gateway(mixed=[url], backend_api_key="theirs") as running:
            said.clear()
            forbidden = {
                "kv_transfer_params": {"do_remote_prefill": True},
                "rid": "x",
                "vllm_xargs": {"rid": 1, "a": 2},
            }
            answer = await running.http.post(
                EMBEDDINGS, json={**INPUT, **forbidden}, headers={"x-data-parallel-rank": "1"}
            )
            assert answer.json() == {"data": []} and "x-engine" not in answer.headers
            head, body = next(one for one in said if b"/v1/embeddings" in one[0])
            assert json.loads(body) == {**INPUT, "vllm_xargs": {"a": 2}}
            assert b"authorization: Bearer theirs" in head and b"parallel" not in head


async def test_a_backend_without_the_route_is_remembered_and_another_one_serves() -> None:
    async with (
        simulators("mixed", task="generate") as [chats],
        simulators("mixed", task="embed") as [embeds],
        running_gateway(mixed=[chats.url, embeds.url], policy={"mixed": "round_robin"}) as running,
    ):
        for _ in range(6):
            assert (await running.http.post(EMBEDDINGS, json=INPUT)).status_code == 200
        assert len(embeds.requests) == 6
        [lacking] = [backend for backend in running.gateway.fleet if backend.lacks]
        assert (lacking.url, lacking.lacks) == (chats.url, {EMBEDDINGS})
        assert not await retries(running), "to ask another for what one has not is no retry"
        assert running.idle()


async def test_where_no_engine_has_the_route_the_404_says_so() -> None:
    async with pools() as (running, [p], [d]):
        for _ in range(2):
            answer = await running.http.post(EMBEDDINGS, json=INPUT)
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_route")
            assert answer.json()["error"]["message"] == "no engine that serves 'sim' offers /v1/embeddings"
        assert all(backend.lacks == {EMBEDDINGS} for backend in running.gateway.fleet)
        assert running.idle() and not p.requests and not d.requests


@pytest.mark.parametrize("path", ["/v1/moderations", "/collective_rpc", "/sleep", "/v1/embedding", "/generate"])
async def test_a_route_of_no_engine_family_here_is_a_404_that_names_similar_routes(path: str) -> None:
    async with mixed() as (running, [engine]):
        answer = await running.http.post(path, json=INPUT)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (404, "unknown_route")
        named, _, served = error["message"].partition("this gateway serves ")
        assert path in named and path not in served.split()
        assert ("/v1/embeddings" in served) == (path == "/v1/embedding")
        assert "/admin" not in served and "/instances" not in served and len(served) < 200
        assert not engine.requests


@pytest.mark.parametrize(
    ("path", "roles", "role"),
    [
        ("/v1/embeddings", ("prefill", "decode", "mixed"), "mixed"),
        ("/v1/embeddings", ("prefill", "decode"), "prefill"),
        ("/v1/embeddings", ("decode",), "decode"),
        ("/tokenize", ("prefill", "decode"), "prefill"),
        ("/v1/audio/transcriptions", ("prefill", "decode"), "decode"),
        ("/v1/audio/transcriptions", ("prefill",), "prefill"),
    ],
)
async def test_each_route_goes_to_the_pool_that_fits_its_work(path: str, roles: tuple[str, ...], role: str) -> None:
    async with simulators(*roles, task="any") as engines:
        urls = {role: [engine.url] for role, engine in zip(roles, engines, strict=True)}
        async with running_gateway(**urls) as running:
            if path.startswith("/v1/audio"):
                answer = await running.http.post(path, data={"model": "sim"}, files={"file": b"RIFF"})
            else:
                answer = await running.http.post(path, json=BODIES[path])
            assert answer.status_code == 200
            name = "transcriptions" if "audio" in path else path.rpartition("/")[2]
            metrics = await running.metrics()
            assert metrics[f'pd_proxy_requests_total{{endpoint="{name}",model="sim",outcome="ok"}}'] == 1
            if path != "/tokenize":
                assert [len(engine.requests) for engine in engines] == [int(one == role) for one in roles]


async def retries(running: Running) -> dict[str, float]:
    return {name: n for name, n in (await running.metrics()).items() if name.startswith("pd_proxy_retries_total")}


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"kind": "status", "status": 500}, "failed"),
        ({"kind": "status", "status": 503}, "busy"),
        ({"kind": "status", "status": 429}, "busy"),
        ({"kind": "reset"}, "cut"),
        ({"kind": "garbage", "form": "bytes"}, "garbled"),
        ({"kind": "garbage", "form": "json"}, "garbled"),
        ({"kind": "garbage", "form": "empty"}, "garbled"),
        ({"kind": "garbage", "form": "error"}, "failed"),
        ({"kind": "garbage", "form": "truncated"}, "cut"),
        ({"kind": "hang"}, "timeout"),
    ],
    ids=str,
)
async def test_a_failure_before_the_first_byte_is_retried_on_another_backend(
    fault: dict[str, Any], reason: str
) -> None:
    async with mixed(2, timeouts={"prefill": 0.4}) as (running, engines):
        for engine in engines:
            engine.faults.add(leg="local", count=1, **fault)
        # The first try fails, the second one fails on the other backend, and the third one succeeds.
        answer = await running.http.post(EMBEDDINGS, json=INPUT)
        assert answer.status_code == 200, answer.text
        assert await retries(running) == {f'pd_proxy_retries_total{{leg="decode",reason="{reason}"}}': 2}
        assert running.idle()


async def test_a_dead_backend_is_avoided_and_marked_down() -> None:
    async with mixed(2, health={"interval": 60.0}) as (running, [one, other]):
        one.kill()
        dead, _ = running.gateway.fleet
        sent = 0
        while dead.up and sent < 100:  # placement chooses at random between equal backends
            assert (await running.http.post(EMBEDDINGS, json=INPUT)).status_code == 200
            sent += 1
        assert len(other.requests) == sent
        assert [backend.up for backend in running.gateway.fleet] == [False, True]
        other.kill()
        answer = await running.http.post(EMBEDDINGS, json=INPUT)
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "backend_unreachable")
        answer = await running.http.post(EMBEDDINGS, json=INPUT)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_backend")
        assert answer.headers["retry-after"] == "1"


async def test_the_engines_own_refusal_is_passed_on() -> None:
    async with mixed(2) as (running, engines):
        answer = await running.http.post(EMBEDDINGS, json={**INPUT, "dimensions": 0})
        assert (answer.status_code, answer.json()["error"]["type"]) == (400, "BadRequestError")
        assert sum(len(engine.requests) for engine in engines) == 1


async def test_the_outlier_detector_counts_requests_that_the_model_computes_only() -> None:
    settings = {"breaker": {"consecutive_failures": 3}, "retries": {"attempts": 1}}
    async with mixed(2, **settings) as (running, [bad, _]):
        backend = running.gateway.fleet.pool("mixed")[0]
        bad.faults.add("status", status=500, leg="local")
        while backend.outlier_stats["decode"].consecutive < 2:
            await running.http.post(EMBEDDINGS, json=INPUT)
        for _ in range(4):
            assert (await running.http.post("/tokenize", json=BODIES["/tokenize"])).status_code == 200
        assert backend.outlier_stats["decode"].consecutive == 2, "tokenising well does not make it fit"
        while not running.gateway.fleet.outlier_detector.ejections:
            await running.http.post(EMBEDDINGS, json=INPUT)


async def test_a_client_that_leaves_ends_its_leg_at_once() -> None:
    async with mixed() as (running, [engine]):
        engine.faults.add("hang", leg="local")
        request = asyncio.create_task(running.http.post(EMBEDDINGS, json=INPUT))
        await until(lambda: bool(engine.requests))
        request.cancel()
        await soon(lambda: engine.requests[0].aborted and running.idle(), 0.5)
        assert (await running.metrics())['pd_proxy_client_disconnects_total{stage="decode"}'] == 1


async def test_a_request_may_set_its_own_time_limit() -> None:
    async with mixed() as (running, [engine]):
        engine.faults.add("hang", leg="local")
        answer = await running.http.post(EMBEDDINGS, json=INPUT, headers={"x-request-timeout": "0.2"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "total_timeout")
        await soon(lambda: engine.requests[0].aborted and running.idle(), 0.5)


async def test_admission_counts_one_leg_requests_like_all_others() -> None:
    async with mixed(admission={"requests": 1, "queue": 0}) as (running, [engine]):
        engine.faults.add("delay_first_byte", leg="local", delay_s=0.3, count=1)
        first = asyncio.create_task(running.http.post(EMBEDDINGS, json=INPUT))
        await until(lambda: bool(engine.requests))
        [backend] = running.gateway.fleet
        assert backend.inflight_requests == 1 and backend.inflight_tokens > 0
        refused = await running.http.post("/v1/chat/completions", json=chat())
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "queue_full")
        assert (await first).status_code == 200
        assert running.idle()


async def test_one_leg_routes_accept_aliases() -> None:
    async with mixed(aliases={"embedder": "sim"}) as (running, [engine]):
        answer = await running.http.post(EMBEDDINGS, json={**INPUT, "model": "embedder"})
        assert answer.status_code == 200, answer.text
        form = {"model": (None, "embedder"), "file": ("a.wav", b"RIFF" + bytes(64), "audio/wav")}
        heard = await running.http.post("/v1/audio/transcriptions", files=form)
        assert heard.status_code == 200, heard.text
        assert [request.body["model"] for request in engine.requests if isinstance(request.body, dict)][:1] == ["sim"]
        missing = await running.http.post(EMBEDDINGS, json={**INPUT, "model": "nobody"})
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")
