"""Engine families: each is probed at its own paths, and offers the routes that it has."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import get_args

import pytest
import respx
from pd_proxy.fleet.backend import Backend
from pd_proxy.fleet.engine_families import KINDS
from pd_proxy.fleet.fleet import Fleet
from pd_proxy.fleet.health.probe import ProbeFailed
from pd_proxy.fleet.health.prober import Prober
from pd_proxy.http.control import Control
from pd_proxy.settings.tree import Settings
from pd_proxy.settings.types import KindName

URL = "http://engine:8000"
MODELS = {"data": [{"id": "m"}]}

# The answers of each kind by path. Other paths answer 404.
ANSWERS: dict[KindName, dict[str, object]] = {
    "vllm": {"/health": None, "/v1/models": MODELS, "/version": {"version": "0.32.0"}},
    "sglang": {"/health": None, "/v1/models": MODELS, "/server_info": {"version": "0.5.9", "tp_size": 1}},
    "tensorrt_llm": {"/health": None, "/v1/models": MODELS, "/version": {"version": "1.3.0"}},
    "nim": {"/v1/health/ready": None, "/v1/models": MODELS, "/v1/version": {"release": "2.1.6", "api": "1.0"}},
    "openai": {"/v1/models": MODELS},
}
VERSIONS = {"vllm": "0.32.0", "sglang": "0.5.9", "tensorrt_llm": "1.3.0", "nim": "2.1.6", "openai": ""}


@asynccontextmanager
async def probing(kind: KindName) -> AsyncIterator[tuple[Prober, Backend, respx.MockRouter]]:
    settings = Settings(mixed=[URL], kind=kind)
    fleet = Fleet(settings)
    with respx.mock(base_url=URL, assert_all_called=False) as router:
        for path, answer in ANSWERS[kind].items():
            router.get(path, name=path).respond(200, json=answer)
        router.route().respond(404)
        yield Prober(fleet, settings.health, Control(0.05)), fleet.pool("mixed")[0], router


def test_every_kind_that_can_be_set_is_known() -> None:
    assert tuple(KINDS) == get_args(KindName)
    assert all(kind.name == name and kind.health for name, kind in KINDS.items())


@pytest.mark.parametrize("kind", get_args(KindName))
async def test_a_backend_is_probed_and_asked_for_its_version_at_the_paths_of_its_kind(kind: KindName) -> None:
    async with probing(kind) as (prober, backend, router):
        await prober.probe(backend)
        await prober._discovery.learn(backend)
        assert backend.models == {"m": {"id": "m"}}
        assert backend.version == VERSIONS[kind]
        router[KINDS[kind].health].respond(503)
        with pytest.raises(ProbeFailed, match=f"{KINDS[kind].health} answered 503"):
            await prober.probe(backend)


def test_the_paths_that_no_kind_offers_are_those_that_no_client_may_reach() -> None:
    offered = {route for kind in KINDS.values() for route in kind.routes}
    operations = {path for kind in KINDS.values() for path in kind.operations.values()}
    dangerous = {"/invocations", "/collective_rpc", "/abort_requests", "/scale_elastic_ep", "/server_info", "/metrics"}
    assert not offered & (operations | dangerous)


def test_a_fleet_offers_what_the_kinds_of_its_backends_offer() -> None:
    assert Fleet(Settings(kind="nim")).routes() == KINDS["nim"].routes
    fleet = Fleet(Settings(mixed=[URL], kind="openai"))
    assert fleet.routes() == KINDS["openai"].routes
    [backend] = fleet
    group = {"name": "more", "kind": "nim", "mixed": ["http://nim:8000"]}
    both = Fleet(Settings(mixed=[URL], kind="openai", groups=[group]))
    assert [backend.kind.name for backend in both] == ["openai", "nim"]
    assert both.routes() == KINDS["openai"].routes | KINDS["nim"].routes
    assert backend.offers("/v1/moderations") and not backend.offers("/tokenize")
    backend.lacks.add("/v1/moderations")
    assert not backend.offers("/v1/moderations")
