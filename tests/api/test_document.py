"""The OpenAPI document: its contents and its route. test_document_held.py checks every answer against it."""

from __future__ import annotations

import pytest
from pd_proxy.app import build
from pd_proxy.fleet.engine_families import KINDS
from pd_proxy.flow.single_request import ROUTES
from pd_proxy.settings.tree import Settings

from tests.support import running_gateway, simulators

DOCUMENT = build(Settings()).surface.openapi()


async def test_the_document_has_the_engines_routes_and_all_its_routes_are_served() -> None:
    async with (
        simulators("prefill", "decode") as [p, d],
        simulators("mixed", task="any") as [mixed],
        running_gateway([p.url], [d.url], [mixed.url]) as running,
    ):
        direct = {path.decode() for path in running.gateway.surface.direct}
        assert ROUTES.keys() < direct < DOCUMENT["paths"].keys()
        offered = running.gateway.fleet.routes()
        for path in DOCUMENT["paths"]:
            answer = await running.http.put(path)
            there = path not in direct or path in offered
            assert (answer.status_code, path) == (405 if there else 404, path)


def test_every_one_leg_route_is_offered_by_some_engine_family() -> None:
    assert ROUTES.keys() <= {route for kind in KINDS.values() for route in kind.routes}


@pytest.mark.parametrize(
    ("path", "method", "statuses"),
    [
        ("/v1/chat/completions", "post", {"200", "400", "401", "404", "408", "413", "429", "431", "502", "503", "504"}),
        ("/v1/audio/transcriptions", "post", {"200", "400", "404", "413", "502", "503", "504"}),
        ("/v1/models/{model}", "get", {"200", "401", "404"}),
        ("/admin/sleep", "post", {"200", "400", "401", "403", "404", "502"}),
        ("/reset_prefix_cache", "post", {"200", "400", "401", "403", "500"}),
        ("/ready", "get", {"200", "503"}),
    ],
)
def test_the_errors_of_an_operation_are_in_the_document(path: str, method: str, statuses: set[str]) -> None:
    operation = DOCUMENT["paths"][path][method]
    assert statuses <= operation["responses"].keys()
    assert "422" not in operation["responses"]
    for status in statuses - {"200", "502"}:
        content = operation["responses"][status]["content"]
        assert content == {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
