"""/invocations: SageMaker's only route."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tests.api.test_single import BODIES, mixed
from tests.support import chat, completion, pools

PATH = "/invocations"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body"), [("/v1/chat/completions", chat()), ("/v1/completions", completion())])
async def test_requests_that_generate_are_split_as_on_their_own_routes(
    path: str, body: dict[str, Any], stream: bool
) -> None:
    async with pools() as (running, [p], [d]):
        answer = await running.http.post(PATH, json={**body, "stream": stream})
        assert answer.status_code == 200 and ("[DONE]" in answer.text) == stream
        assert [r.path for r in (*p.requests, *d.requests)] == [path, path]
        endpoint = {"/v1/chat/completions": "chat"}.get(path, "completions")
        metrics = await running.metrics()
        assert metrics[f'pd_proxy_requests_total{{endpoint="{endpoint}",model="sim",outcome="ok"}}'] == 1
        assert running.idle()


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/score", "/v1/rerank"])
async def test_bodies_of_other_routes_are_served_by_these(path: str) -> None:
    async with mixed() as (running, [engine]):
        answer = await running.http.post(PATH, json=BODIES[path])
        assert answer.status_code == 200
        assert [r.path for r in engine.requests] == [path]


async def test_a_body_of_several_routes_goes_to_one_that_an_engine_offers() -> None:
    async with mixed(engine={"task": "classify"}) as (running, [engine]):
        assert (await running.http.post(PATH, json=BODIES["/classify"])).status_code == 404
        assert (await running.http.post(PATH, json=BODIES["/classify"])).status_code == 200
        assert [r.path for r in engine.requests] == ["/classify"]


async def test_limits_and_errors_are_those_of_other_routes() -> None:
    async with pools(api_keys="k", limits={"request_body": 2000}) as (running, [p], _):
        key = {"authorization": "Bearer k"}

        async def pieces() -> AsyncIterator[bytes]:
            yield b"{" + b" " * 3000

        for status, code, request in (
            (401, "invalid_api_key", {"json": chat()}),
            (405, "method_not_allowed", {"method": "GET", "headers": key}),
            (413, "body_too_large", {"json": chat("x" * 3000), "headers": key}),
            (413, "body_too_large", {"content": pieces(), "headers": key}),
            (400, "invalid_request", {"content": b"{", "headers": key}),
            (400, "invalid_request", {"content": b"[]", "headers": key}),
            (400, "invalid_request", {"json": {"model": "sim"}, "headers": key}),
            (404, "model_not_found", {"json": chat(model="other"), "headers": key}),
        ):
            answer = await running.http.request(**{"method": "POST", "url": PATH, **request})  # type: ignore[arg-type]
            assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
            assert answer.headers["x-request-id"]
        assert not p.requests and running.idle()
        assert (await running.http.post(PATH, json=chat(), headers=key)).status_code == 200


async def test_members_that_clients_may_not_set_are_removed_here_too() -> None:
    async with pools() as (running, [p], [d]):
        body = chat(kv_transfer_params={"remote_host": "10.9.9.9"}, request_id="x")
        assert (await running.http.post(PATH, json=body)).status_code == 200
        assert all("10.9.9.9" not in str(r.body) for r in (*p.requests, *d.requests))


async def test_another_asgi_server_gives_the_same_answers() -> None:
    async with pools() as (running, _, _):
        transport = httpx.ASGITransport(app=running.gateway.surface)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway", timeout=20) as http:
            assert (await http.post(PATH, json=chat())).json()["usage"]["completion_tokens"] == 20
            assert (await http.post(PATH, json={})).status_code == 400
