"""Rules for all routes: slashes, methods, and the errors about unknown paths."""

from __future__ import annotations

import pytest

from tests.support import Running, chat, completion, pools, running_gateway, simulators

GETS = (
    *("/health", "/ping", "/ready", "/healthcheck", "/metrics", "/version", "/load", "/v1/models", "/v1/models/sim"),
    *("/admin/backends", "/openapi.json"),
)
POSTS = ("/v1/chat/completions", "/v1/completions", "/tokenize")


@pytest.mark.parametrize("slashes", ["/", "//"])
async def test_a_slash_at_the_end_of_a_path_changes_nothing(slashes: str) -> None:
    async with pools() as (running, [p], _):
        for path in GETS:
            plain, slashed = await running.http.get(path), await running.http.get(path + slashes)
            assert (slashed.status_code, slashed.headers["content-type"]) == (200, plain.headers["content-type"]), path
        assert (await running.http.get("/v1/models" + slashes)).json()["object"] == "list"
        bodies = {"/v1/completions": completion(), "/tokenize": {"prompt": "x"}}
        for path in POSTS:
            answer = await running.http.post(path + slashes, json=bodies.get(path, chat()))
            assert answer.status_code == 200, path
        assert (await running.http.get("/v1/chat/completions" + slashes)).headers["allow"] == "POST"
        host = p.url.removeprefix("http://")
        assert (await running.http.post(f"/admin/backends/{host}/drain{slashes}")).json()["state"] == "draining"
        assert (await running.http.get("/no/such" + slashes)).status_code == 404


async def test_head_is_answered_as_get_without_a_body() -> None:
    async with pools() as (running, _, _):
        for path in GETS:
            got, head = await running.http.get(path), await running.http.head(path)
            assert (head.status_code, head.content) == (200, b""), path
            assert head.headers["content-type"] == got.headers["content-type"], path
            if path != "/metrics":
                assert head.headers["content-length"] == got.headers["content-length"], path
        assert (await running.http.head("/v1/models/other")).status_code == 404
        for path in POSTS:
            answer = await running.http.head(path)
            assert (answer.status_code, answer.headers["allow"], answer.content) == (405, "POST", b""), path
        # The connection can still be used: no body was left in it.
        assert (await running.http.get("/health")).json() == {"status": "alive"}


async def test_head_checks_credentials_as_get_does() -> None:
    async with running_gateway(["http://127.0.0.1:9"], admin_key="secret", ready=False) as running:
        assert (await running.http.head("/admin/backends")).status_code == 401
        assert (await running.http.head("/ready")).status_code == 503


OTHER_METHODS = [
    ("/health", "GET, HEAD"),
    ("/ping", "GET, HEAD, POST"),
    ("/metrics", "GET, HEAD"),
    ("/v1/models", "GET, HEAD"),
    ("/v1/models/a/b", "GET, HEAD"),
    ("/v1/chat/completions", "POST"),
    ("/v1/messages", "POST"),
    ("/v1/embeddings", "POST"),
    ("/v1/responses", "POST"),
    ("/v1/responses/resp_1", "GET, HEAD"),
    ("/v1/responses/resp_1/cancel", "POST"),
    ("/instances/add", "POST"),
    ("/admin/backends", "GET, HEAD"),
    ("/admin/backends/h:1", "GET, HEAD"),
    ("/admin/backends/h:1/drain", "POST"),
    ("/admin/backends/http%3A%2F%2Fh:1%2Fdrain/undrain", "POST"),
    ("/admin/is_sleeping", "GET, HEAD"),
]


async def test_another_method_is_a_405_with_the_methods_of_the_path() -> None:
    async with running_gateway(["http://127.0.0.1:9"], ready=False) as running:
        for path, allow in OTHER_METHODS:
            for method in {"GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND"} - set(allow.split(", ")):
                answer = await running.http.request(method, path)
                assert (answer.status_code, answer.headers["allow"]) == (405, allow), (method, path)
                assert answer.json()["error"]["type"] == "invalid_request_error"


async def test_ping_is_for_sagemaker() -> None:
    async with running_gateway(["http://127.0.0.1:9"], ready=False, api_keys="k") as running:
        for method in ("GET", "POST", "HEAD"):
            assert (await running.http.request(method, "/ping")).status_code == 200


@pytest.mark.parametrize("name", ["compact", "input_tokens"])
async def test_paths_of_openais_responses_that_no_engine_has_are_a_404(name: str) -> None:
    async with running_gateway(["http://127.0.0.1:9"], ready=False) as running:
        answer = await running.http.post(f"/v1/responses/{name}", json={"model": "sim", "input": "x"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_route")
        assert "allow" not in answer.headers


async def served(running: Running, path: str) -> str:
    answer = await running.http.post(path, json={})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_route")
    message: str = answer.json()["error"]["message"]
    return message.partition("this gateway serves ")[2]


async def test_a_404_names_similar_routes_and_none_for_operators() -> None:
    async with running_gateway(["http://127.0.0.1:9"], ready=False) as running:
        assert "/v1/chat/completions" in await served(running, "/v1/chat/completion")
        assert "/v1/chat/completions" in await served(running, "/chat/completions")
        assert "/v1/completions" in await served(running, "/v1/v1/completions")
        for path in ("/admin", "/admin/backend", "/instances/ad", "/instances", "/start_profil", "/x" * 5000):
            said = await served(running, path)
            assert not any(word in said for word in ("admin", "instances", "profile", "prefix_cache")), path
            assert "GET /openapi.json" in said and len(said) < 250


async def test_the_error_about_an_unknown_model_names_the_known_models() -> None:
    async with pools(aliases={"gpt-4": "sim"}) as (running, _, _):
        for answer in (
            await running.http.post("/v1/chat/completions", json=chat(model="simm")),
            await running.http.post("/v1/embeddings", json={"model": "simm", "input": "x"}),
            await running.http.get("/v1/models/simm"),
        ):
            assert answer.status_code == 404
            message = "The model `simm` does not exist. This gateway serves `gpt-4`, `sim`."
            assert answer.json()["error"] == {
                **{"message": message, "type": "invalid_request_error"},
                **{"param": "model", "code": "model_not_found"},
            }


async def test_of_many_models_the_error_names_the_most_similar() -> None:
    names = [f"tenant-{number:03}/model" for number in range(300)]
    async with (
        simulators("mixed", adapters=[*names, "zebra-7b"]) as [engine],
        running_gateway(mixed=[engine.url]) as running,
    ):
        answer = await running.http.post("/v1/chat/completions", json=chat(model="tenant-042/modell"))
        message = answer.json()["error"]["message"]
        assert "This gateway serves `tenant-042/model`, " in message
        assert message.count("`") == 2 * 9 and "and 294 more (GET /v1/models)" in message
        answer = await running.http.post("/v1/chat/completions", json=chat(model="m" * 100_000))
        assert len(answer.json()["error"]["message"]) < 1000
