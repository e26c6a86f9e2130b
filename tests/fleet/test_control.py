"""The control plane's client: what it trusts, and when it learns that."""

from __future__ import annotations

import ssl

import httpx
import pytest
import respx

from proxy.fleet.control import control_client


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[ssl.SSLContext]:
    """The contexts with the system's certificates that were made."""
    made: list[ssl.SSLContext] = []
    default = ssl.create_default_context

    def create() -> ssl.SSLContext:
        made.append(default())
        return made[-1]

    monkeypatch.setattr(ssl, "create_default_context", create)
    return made


@respx.mock
async def test_certificates_are_loaded_with_the_first_https_backend_and_kept(loaded: list[ssl.SSLContext]) -> None:
    respx.get(host="engine").respond(200)
    async with control_client(1.0, None) as http:
        await http.get("http://engine/health")
        assert loaded == []
        for _ in range(2):
            await http.get("https://engine/health")
    [context] = loaded
    assert context.verify_mode == ssl.CERT_REQUIRED
    assert context.check_hostname


@respx.mock
@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_backends_are_shown_their_key(scheme: str) -> None:
    route = respx.get(f"{scheme}://engine/health").respond(200)
    async with control_client(1.0, "k") as http:
        await http.get(f"{scheme}://engine/health")
    assert route.calls.last.request.headers["authorization"] == "Bearer k"


async def test_no_proxy_of_the_environment_comes_between(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    async with control_client(1.0, None) as http:
        with respx.mock(using="httpcore") as engine:
            engine.get(host="engine").respond(200)
            assert (await http.get("http://engine/health")).status_code == 200
            assert (await http.get("https://engine/health")).status_code == 200
    assert isinstance(http, httpx.AsyncClient)
