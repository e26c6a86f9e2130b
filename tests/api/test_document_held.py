"""Checks the gateway against its OpenAPI document: schemathesis makes valid and invalid requests from it, and checks
that the document has each answer."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from pd_proxy.app import build
from pd_proxy.settings.tree import Settings
from pd_proxy_simulator import Simulator
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.support import Running, running_gateway, simulators, until

pytestmark = pytest.mark.slow

DOCUMENT = build(Settings()).surface.openapi()
CHECKS = [
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    response_headers_conformance,
]
EXAMPLES = 6


class Service:
    """A gateway before a prefill, a decode and two mixed engines, in a thread of its own."""

    def __init__(self) -> None:
        self._ended = asyncio.Event()
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self.running: Running
        self._engines: list[Simulator]

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        async with (
            simulators("prefill", "decode") as [p, d],
            simulators("mixed", "mixed", task="any") as [one, other],
            running_gateway([p.url], [d.url], [one.url, other.url], limits={"request_body": 100_000}) as self.running,
        ):
            self._engines = [p, d, one, other]
            self._started.set()
            await self._ended.wait()

    def __enter__(self) -> Service:
        self._thread.start()
        assert self._started.wait(10)
        return self

    def __exit__(self, *error: object) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join(10)

    def restore(self) -> None:
        """Restore the state at the start, whatever the operations changed."""
        asyncio.run_coroutine_threadsafe(self._restore(), self._loop).result(10)

    async def _restore(self) -> None:
        fleet = self.running.gateway.fleet
        for engine in self._engines:
            engine.asleep = False
        ours = {engine.url for engine in self._engines}
        for backend in list(fleet):
            if backend.url in ours:
                fleet.undrain(backend)
            else:
                fleet.remove(backend.url, backend.role)
        await until(lambda: all(backend.up for backend in fleet))


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with Service() as service:
        yield service


schema = schemathesis.openapi.from_dict(DOCUMENT)


@schema.parametrize()
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],
)
def test_every_answer_conforms_to_the_document(case: Any, service: Service) -> None:
    if case.operation.path == "/instances/add" and isinstance(case.body, dict) and "instances" in case.body:
        case.body["instances"] = "127.0.0.1:9"  # added backends are probed; invented names must not be looked up in DNS
    answer = case.call(base_url=service.running.url, timeout=20)
    case.validate_response(answer, checks=CHECKS)
    if answer.status_code >= 500:
        assert answer.json()["error"]["code"] != "internal_error"
    if case.operation.path.startswith(("/admin", "/instances")):
        service.restore()
