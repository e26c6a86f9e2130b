"""Who counts as an operator: with an admin key, without one, and at the admin socket."""

from __future__ import annotations

import asyncio
import stat
from pathlib import Path
from typing import Any

import httpx
import pytest
from pd_proxy.api.credentials import AtSocket, Credentials
from pd_proxy.errors import Forbidden, GatewayError, Unauthorized
from pd_proxy.process import uvicorn_config
from pd_proxy.runtime.sockets import ListenError, own_socket
from pd_proxy.settings.tree import build_settings

from tests.support import TestServer, pools, running_gateway

LOCAL = ("127.0.0.1", 50000)
HOST = "127.0.0.1:8000"

CHANGES = (
    *("/v1/load_lora_adapter", "/v1/unload_lora_adapter"),
    *("/instances/add", "/instances/remove", "/reset_prefix_cache", "/start_profile", "/stop_profile"),
    *(f"/admin/{name}" for name in ("reset_prefix_cache", "start_profile", "stop_profile", "sleep", "wake_up")),
    *(f"/admin/backends/127.0.0.1:9/{name}" for name in ("drain", "undrain")),
)
LOOKS = ("/admin/decisions", "/admin/backends", "/admin/backends/127.0.0.1:9", "/admin/is_sleeping")


def scope(method: str = "GET", *, host: str = HOST, client: Any = LOCAL, version: str = "1.1", **headers: str) -> Any:
    lines = [(b"host", host.encode("latin-1"))]
    lines += [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return {"method": method, "headers": lines, "client": client, "http_version": version}


def credentials(**settings: Any) -> Credentials:
    return Credentials(build_settings(settings, {}))


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "post"])
@pytest.mark.parametrize("settings", [{}, {"api_keys": "k"}])
def test_without_an_admin_key_no_request_may_change_anything(method: str, settings: dict[str, Any]) -> None:
    with pytest.raises(Forbidden, match="no admin_key is set") as caught:
        credentials(**settings).check_operator(scope(method, authorization="Bearer k"))
    assert "admin_socket" in str(caught.value)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("client", [LOCAL, ("::1", 1), ("::ffff:127.0.0.1", 1)])
@pytest.mark.parametrize(
    "host",
    [HOST, "localhost", "LocalHost:8000", "127.0.0.1", "127.8.9.1:1", "[::1]", "[::1]:8000", "[::ffff:127.0.0.1]:80"],
)
def test_without_an_admin_key_programs_on_this_machine_may_read(method: str, client: Any, host: str) -> None:
    credentials().check_operator(scope(method, host=host, client=client))
    credentials().check_operator(scope(method, host=host, client=client, sec_fetch_site="none", accept="*/*"))


@pytest.mark.parametrize(
    "asked",
    [
        *(
            scope(client=(address, 1))
            for address in ("10.0.0.1", "127.0.0.6", "127.0.0.2", "::ffff:10.0.0.1", "::", "")
        ),
        scope(client=None),
        *(
            scope(host=host)
            for host in (
                *("gateway", "evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example"),
                *("10.0.0.1:8000", "0.0.0.0:8000", "[::]:8000", "", ":8000", "localhost.", "2130706433", "0x7f.1"),
                *("user@127.0.0.1", "127.0.0.1, evil.example", "127.0.0.1:8000:1", "[::1", "\xe9"),
            )
        ),
        scope(version="1.0"),
        *(
            scope(**{name: "127.0.0.1"})
            for name in (
                *("forwarded", "via", "x_forwarded_for", "x_forwarded", "x_forwarded_host", "x_forwarded_proto"),
                *("x_forwarded_client_cert", "x_real_ip", "x_client_ip", "x_cluster_client_ip", "true_client_ip"),
                *("cf_connecting_ip", "cf_ray", "cdn_loop", "x_envoy_external_address", "x_amzn_trace_id"),
                *("x_original_forwarded_for", "x_original_host", "x_host", "proxy_connection", "fastly_client_ip"),
                *("x_proxyuser_ip", "x_remote_addr", "x_rewrite_url", "tailscale_user_login", "x_azure_clientip"),
            )
        ),
        *(scope(origin=value) for value in ("null", "http://127.0.0.1:8000", "https://evil.example", "")),
        *(scope(sec_fetch_site=value) for value in ("cross-site", "same-site", "same-origin", "")),
        {**scope(), "headers": []},
        {**scope(), "headers": [(b"host", b"localhost"), (b"host", b"localhost")]},
    ],
)
def test_without_an_admin_key_requests_that_may_come_from_another_machine_are_refused(asked: Any) -> None:
    with pytest.raises(Forbidden, match="set admin_key"):
        credentials().check_operator(asked)


def test_where_an_admin_key_is_set_only_the_key_counts() -> None:
    checks = credentials(admin_key="secret")
    checks.check_operator(scope("POST", host="gateway", client=("10.0.0.1", 1), authorization="Bearer secret"))
    for said in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}, {"x_api_key": "secret"}):
        with pytest.raises(Unauthorized):
            checks.check_operator(scope(**said))


@pytest.mark.parametrize("said", [{"origin": "null"}, {"sec_fetch_site": "cross-site"}, {"x_forwarded_for": "1.1.1.1"}])
def test_at_the_socket_only_forwarded_requests_and_web_pages_are_refused(said: dict[str, str]) -> None:
    AtSocket().check_operator(scope("POST", host="anything", client=None))
    with pytest.raises(GatewayError):
        AtSocket().check_operator(scope("POST", client=None, **said))


async def test_every_route_for_operators_checks_credentials() -> None:
    async with running_gateway(["http://127.0.0.1:9"], admin_key=None, ready=False) as running:
        for path in CHANGES:
            answer = await running.http.post(path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden"), path
        for path in LOOKS:
            assert (await running.http.get(path)).status_code in (200, 502), path
            for headers in ({"host": "evil.example"}, {"origin": "http://evil.example"}, {"via": "1.1 nginx"}):
                assert (await running.http.get(path, headers=headers)).status_code == 403, (path, headers)
        guarded = {*CHANGES, *LOOKS, "/admin/explain"}  # a POST that changes nothing: test_decisions.py
        for route in running.gateway.surface.routes:  # a route that is added later is on neither list
            named = getattr(route, "path", "").replace("{name:backend}", "127.0.0.1:9")
            tags = getattr(route, "tags", [])
            assert named in guarded or not {"administration", "engines"} & set(tags) or named == "/v1/metaserver", named


async def test_a_web_page_cannot_change_the_gateway() -> None:
    """A browser sends a simple request without a preflight (https://fetch.spec.whatwg.org/#simple-header)."""
    async with pools(admin_key=None) as (running, [p], _):
        before = list(p.operations)
        page = {"content-type": "text/plain", "origin": "https://evil.example", "sec-fetch-site": "cross-site"}
        body = '{"type": "decode", "instances": ["10.9.9.9:1"]}'
        assert (await running.http.post("/instances/add", content=body, headers=page)).status_code == 403
        assert (await running.http.post("/admin/sleep?force=true&mode=abort", headers=page)).status_code == 403
        assert p.operations == before and len(list(running.gateway.fleet)) == 2


async def test_the_admin_socket_serves_operators_without_a_key(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    async with pools(admin_key=None, admin_socket=str(path)) as (running, [p], [d]):
        assert running.gateway.admin is not None
        with own_socket(path, reuse=False) as sock:
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            server = TestServer(uvicorn_config(running.gateway.admin))
            serving = asyncio.create_task(server.serve([sock]))
            await server.listening.wait()
            async with httpx.AsyncClient(
                transport=httpx.AsyncHTTPTransport(uds=str(path)), base_url="http://localhost", timeout=20
            ) as http:
                assert len((await http.get("/admin/backends")).json()["backends"]) == 2
                assert (await http.post("/admin/start_profile")).status_code == 200 and p.profiling and d.profiling
                for known in ("/metrics", "/version", "/v1/models"):
                    assert (await http.get(known)).status_code == 200, known
                change = {"type": "decode", "instances": [d.url]}
                assert (await http.post("/instances/remove", json=change)).status_code == 200
                refused = await http.post("/instances/remove", json=change, headers={"x-forwarded-for": "1.1.1.1"})
                assert refused.status_code == 403
                assert (await http.post("/v1/chat/completions", json={})).status_code == 404, "it is for operators"
            server.should_exit = True
            await serving
        assert not path.exists()


def test_a_socket_replaces_one_without_a_listener_and_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    with own_socket(path, reuse=False):
        with pytest.raises(ListenError, match="another process listens there"), own_socket(path, reuse=False):
            pass
        with own_socket(path, reuse=True):
            successor = path.stat().st_ino
        assert not path.exists()
    with own_socket(path, reuse=False) as first:
        with own_socket(path, reuse=True):
            first.close()
            successor = path.stat().st_ino
        assert successor and not path.exists()
    file = tmp_path / "file"
    file.write_text("kept")
    with pytest.raises(ListenError, match="not a socket"), own_socket(file, reuse=True):
        pass
    assert file.read_text() == "kept"
    with pytest.raises(ListenError, match="cannot listen at"), own_socket(tmp_path / "no" / "such", reuse=False):
        pass
    assert list(tmp_path.iterdir()) == [file]


def test_a_process_that_ends_does_not_remove_its_successors_socket(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    older, newer = own_socket(path, reuse=True), own_socket(path, reuse=True)
    older.__enter__()
    newer.__enter__()
    older.__exit__(None, None, None)
    assert path.is_socket()
    newer.__exit__(None, None, None)
    assert not path.exists()
