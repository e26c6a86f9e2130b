"""CORS: what pages of other origins may request and read."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from pd_proxy.api.cross_origin import CrossOrigin
from pd_proxy.settings.bounds import CorsSettings
from pd_proxy.settings.load import configure
from pd_proxy.settings.problems import ConfigurationError
from starlette.types import Receive, Scope, Send

from tests.support import chat, completion, pools, running_gateway

CHAT = "/v1/chat/completions"
PAGE = "https://chat.example.com"
OTHER = "https://evil.example"
CORS = {"cors": {"origins": [PAGE, "http://localhost:3000"]}}
ANY = {"cors": {"origins": ["*"]}}
ROUTES = (CHAT, "/v1/messages", "/v1/responses", "/v1/embeddings", "/tokenize", "/v1/models", "/health", "/no/such")
CLOSED = (
    *("/admin/backends", "/admin/sleep", "/admin/backends/h:1/drain", "/admin/no/such", "/instances/add", "/metrics"),
    *("/reset_prefix_cache", "/start_profile", "/stop_profile", "/admin/backends/", "/metrics/"),
)


def asks(origin: str, method: str = "POST", headers: str = "authorization,content-type") -> dict[str, str]:
    """The headers of a preflight."""
    return {
        "origin": origin,
        "access-control-request-method": method,
        "access-control-request-headers": headers,
    }


def of_cors(answer: httpx.Response) -> dict[str, str]:
    return {name: value for name, value in answer.headers.items() if name.startswith("access-control-")}


def varies(answer: httpx.Response) -> set[str]:
    return {name.strip().lower() for name in answer.headers.get("vary", "").split(",")} - {""}


@pytest.mark.parametrize("slash", ["", "/"])
async def test_a_preflight_needs_no_key_on_any_route_for_clients(slash: str) -> None:
    async with running_gateway(["http://127.0.0.1:9"], ready=False, api_keys="k", **CORS) as running:
        for path in ROUTES:
            answer = await running.http.options(path + slash, headers=asks(PAGE))
            assert (answer.status_code, answer.content) == (204, b""), path
            assert of_cors(answer) == {
                "access-control-allow-origin": PAGE,
                "access-control-allow-methods": "GET, HEAD, POST",
                "access-control-allow-headers": "authorization,content-type",
                "access-control-max-age": "600",
            }
            assert "origin" in varies(answer)
        assert not running.gateway.gate.inside


async def test_a_preflight_of_an_unknown_origin_gets_no_permissions() -> None:
    async with running_gateway(["http://127.0.0.1:9"], ready=False, **CORS) as running:
        for origin in (
            OTHER,
            "null",
            PAGE + ".evil.example",
            PAGE + ":444",
            "http://chat.example.com",
            PAGE.upper(),
            "",
        ):
            answer = await running.http.options(CHAT, headers=asks(origin))
            assert of_cors(answer) == {} and "origin" in varies(answer), origin


async def test_an_options_request_that_is_no_preflight_is_an_ordinary_request() -> None:
    async with running_gateway(["http://127.0.0.1:9"], ready=False, **CORS) as running:
        for headers in ({}, {"origin": PAGE}, {"access-control-request-method": "POST"}):
            for path, allow in ((CHAT, "POST"), ("/health", "GET, HEAD")):
                answer = await running.http.options(path, headers=headers)
                assert (answer.status_code, answer.headers["allow"]) == (405, allow), (path, headers)


@pytest.mark.parametrize("names", ["x" * 3000, "a b", "bad\x01", "a,,b", ",", "authorization; x"])
async def test_invalid_header_names_are_not_echoed(names: str) -> None:
    async with running_gateway(["http://127.0.0.1:9"], ready=False, **ANY) as running:
        answer = await running.http.options(CHAT, headers=asks(PAGE, headers=names))
        assert "access-control-allow-headers" not in answer.headers or answer.status_code == 400


async def test_pages_may_read_whole_answers_streams_and_errors() -> None:
    async with pools(**CORS) as (running, _, _):
        http = running.http
        for origin, allowed in ((PAGE, True), ("http://localhost:3000", True), (OTHER, False)):
            page = {"origin": origin}
            answers = [
                await http.post(CHAT, json=chat(), headers=page),
                await http.post(CHAT, json=chat(stream=True), headers=page),
                await http.post("/v1/completions", json=completion(), headers=page),
                await http.post("/tokenize", json={"prompt": "x"}, headers=page),
                await http.get("/v1/models", headers=page),
                await http.get("/health", headers=page),
                await http.post(CHAT, content=b"{", headers=page),
                await http.post(CHAT, json=chat(model="other"), headers=page),
                await http.get(CHAT, headers=page),
                await http.delete("/health", headers=page),
                await http.get("/no/such", headers=page),
                await http.post("/v1/embeddings", json={"input": "x"}, headers=page),
            ]
            assert [a.status_code for a in answers] == [200] * 6 + [400, 404, 405, 405, 404, 404]
            for answer in answers:
                shown = of_cors(answer)
                assert (shown.get("access-control-allow-origin") == origin) == allowed, answer.request.url
                assert ("x-request-id" in shown.get("access-control-expose-headers", "")) == allowed
                assert "access-control-allow-credentials" not in shown
                assert varies(answer) == {"origin"}
                assert len(answer.headers.get_list("access-control-allow-origin")) == allowed
        assert '"finish_reason":"length"' in answers[1].text and answers[1].text.endswith("[DONE]\n\n")


async def test_pages_may_read_refusals_of_keys_and_vary_is_sent_without_an_origin_too() -> None:
    async with running_gateway(["http://127.0.0.1:9"], ready=False, api_keys="k", **CORS) as running:
        for path in (CHAT, "/v1/embeddings"):
            answer = await running.http.post(path, json=chat(), headers={"origin": PAGE})
            assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (401, PAGE)
            answer = await running.http.post(path, json=chat())
            assert (of_cors(answer), varies(answer)) == ({}, {"origin"})


@pytest.mark.parametrize("settings", [CORS, ANY], ids=["listed", "any"])
async def test_no_page_may_use_the_routes_for_operators(settings: dict[str, Any]) -> None:
    async with running_gateway(["http://127.0.0.1:9"], ready=False, **settings) as running:
        for path in CLOSED:
            for method, headers in (
                ("OPTIONS", asks(PAGE)),
                ("GET", {"origin": PAGE}),
                ("POST", {"origin": PAGE}),
            ):
                answer = await running.http.request(method, path, headers=headers)
                assert of_cors(answer) == {}, (method, path)
                assert method != "OPTIONS" or answer.status_code in (404, 405)


async def test_with_any_origin_allowed_credentials_are_not() -> None:
    async with pools(**ANY) as (running, _, _):
        for origin in (PAGE, OTHER, "null"):
            answer = await running.http.post(CHAT, json=chat(), headers={"origin": origin})
            assert of_cors(answer) == {
                "access-control-allow-origin": "*",
                "access-control-expose-headers": "x-request-id, x-pd-proxy-fallback, retry-after",
            }
            assert varies(answer) == set()
            assert of_cors(await running.http.options(CHAT, headers=asks(origin)))["access-control-allow-origin"] == "*"


async def test_credentials_are_allowed_for_named_origins_only() -> None:
    cors = {"cors": {"origins": [PAGE], "credentials": True, "max_age": 5}}
    async with running_gateway(["http://127.0.0.1:9"], ready=False, **cors) as running:
        for answer in (
            await running.http.options(CHAT, headers=asks(PAGE)),
            await running.http.get("/health", headers={"origin": PAGE}),
        ):
            assert answer.headers["access-control-allow-credentials"] == "true"
            assert answer.headers["access-control-allow-origin"] == PAGE
        assert of_cors(await running.http.get("/health", headers={"origin": OTHER})) == {}
        assert (await running.http.options(CHAT, headers=asks(PAGE))).headers["access-control-max-age"] == "5"
    for origins in (["*"], [PAGE, "*"]):
        with pytest.raises(ConfigurationError, match="credentials are not for every origin"):
            configure({"cors": {"origins": origins, "credentials": "true"}}, None, {})


async def test_by_default_no_page_may_read_anything() -> None:
    async with pools() as (running, _, _):
        for answer in (
            await running.http.post(CHAT, json=chat(), headers={"origin": PAGE}),
            await running.http.get("/health", headers={"origin": PAGE}),
            await running.http.options(CHAT, headers=asks(PAGE)),
        ):
            assert of_cors(answer) == {} and varies(answer) == set()
        assert answer.status_code == 405


async def test_another_asgi_server_gives_the_same_answers() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x", b"y")]})
        await send({"type": "http.response.body", "body": b"{}"})

    served = CrossOrigin(CorsSettings(origins=(PAGE,))).around(app)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=served), base_url="http://gateway") as http:
        answer = await http.get("/", headers={"origin": PAGE})
        assert (answer.headers["access-control-allow-origin"], answer.headers["x"]) == (PAGE, "y")
        assert (await http.options("/", headers=asks(PAGE))).status_code == 204


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("https://A.Example:443,http://b:80", ("https://a.example", "http://b")),
        ("http://localhost:3000, *", ("http://localhost:3000", "*")),
        ("chrome-extension://abcdef", ("chrome-extension://abcdef",)),
        ("http://[::1]:5173", ("http://[::1]:5173",)),
        ("https://x:4430", ("https://x:4430",)),
        ("", ()),
    ],
)
def test_origins_in_the_settings_are_normalised_to_the_browsers_form(given: str, read: tuple[str, ...]) -> None:
    assert configure({"cors": {"origins": given}}, None, {}).cors.origins == read


@pytest.mark.parametrize(
    "origin",
    ["chat.example.com", "https://x/", "https://x/path", "https://*.x", "null", "https://u@x", "https://", "x y"],
)
def test_an_invalid_origin_in_the_settings_is_refused(origin: str) -> None:
    with pytest.raises(ConfigurationError, match="an origin is scheme"):
        configure({"cors": {"origins": json.loads(json.dumps(origin))}}, None, {})
