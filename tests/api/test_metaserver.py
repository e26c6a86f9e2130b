"""The route that engines call back: which callers it accepts, and its answers."""

from __future__ import annotations

from tests.handoff.helpers import CALL
from tests.support import running_gateway, simulators

PATH = "/v1/metaserver"
LAYERWISE = {"connector": "ascend_layerwise"}


async def test_a_call_for_an_unknown_try_gets_404_and_has_no_effect() -> None:
    async with (
        simulators("prefill", "decode", **LAYERWISE) as [p, d],
        running_gateway([p.url], [d.url], **LAYERWISE) as running,
    ):
        answer = await running.http.post(PATH, json=CALL)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "call_unexpected")
        assert not p.requests


async def test_an_invalid_call_gets_400_and_one_that_is_too_long_413() -> None:
    async with running_gateway(["http://127.0.0.1:1"], ["http://127.0.0.1:2"], ready=False, **LAYERWISE) as running:
        assert (await running.http.post(PATH, content=b"[1]")).status_code == 400
        assert (await running.http.post(PATH, content=b" " * 2_000_000)).status_code == 413


async def test_a_call_needs_no_key_but_has_to_come_from_the_engines_networks() -> None:
    backends = ["http://127.0.0.1:1"], ["http://127.0.0.1:2"]
    for allow, status in ((["127.0.0.0/8"], 404), (["10.0.0.0/8", "::1"], 403)):
        async with running_gateway(
            *backends, ready=False, api_keys=["secret"], metaserver={"allow": allow}, **LAYERWISE
        ) as running:
            assert (await running.http.post(PATH, json=CALL)).status_code == status


async def test_the_route_exists_only_where_a_connector_uses_callbacks() -> None:
    async with running_gateway(["http://127.0.0.1:1"], ["http://127.0.0.1:2"], ready=False) as running:
        answer = await running.http.post(PATH, json=CALL)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_route")
        assert PATH not in answer.text.split("this gateway serves")[1]
