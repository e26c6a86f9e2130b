"""How the simulated P2P tier treats legs that are sent by hand, without a gateway."""

from __future__ import annotations

from typing import Any

import pytest
from pd_proxy_simulator import Simulator

from tests.support import simulators

from .helpers import Client, greedy, text_of_one

PATH = "/v1/completions"


def source(p: Simulator, name: str = "kv-1") -> dict[str, Any]:
    return {"remote_prefiller": {"kv_request_id": name, "remote_host": "127.0.0.1", "remote_port": p.side_port}}


async def prefilled(client: Client, p: Simulator, params: dict[str, Any]) -> dict[str, Any]:
    answer = await client.post(p, PATH, greedy(max_tokens=1, kv_transfer_params=params))
    assert answer.status_code == 200
    found: dict[str, Any] = answer.json()
    return found


async def text_from(client: Client, d: Simulator, params: dict[str, Any]) -> str:
    answer = await client.post(d, PATH, greedy(kv_transfer_params=params))
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


async def test_blocks_are_fetched_by_their_name_and_prefill_answers_without_parameters(client: Client) -> None:
    async with simulators("prefill", "decode", connector="offload_p2p") as [p, d]:
        answer = await prefilled(client, p, {"remote_decoder": {"kv_request_id": "kv-1"}})
        assert answer["kv_transfer_params"] is None
        assert await text_from(client, d, source(p)) == await text_of_one(client)
        assert d.engine.pulls == 1
        await p.wait_for(lambda: p.engine.used_blocks == 0)


@pytest.mark.parametrize("wrong", ["name", "gone"])
async def test_blocks_that_cannot_be_fetched_are_computed(client: Client, wrong: str) -> None:
    async with simulators("prefill", "decode", connector="offload_p2p", lease=0.3) as [p, d]:
        await prefilled(client, p, {"remote_decoder": {"kv_request_id": "kv-1"}})
        params = source(p, "kv-2" if wrong == "name" else "kv-1")
        if wrong == "gone":
            p.kill()
        assert await text_from(client, d, params) == await text_of_one(client)
        assert d.engine.pulls == 0


@pytest.mark.parametrize("missing", ["kv_request_id", "remote_host", "remote_port"])
async def test_an_incomplete_source_is_ignored(client: Client, missing: str) -> None:
    async with simulators("prefill", "decode", connector="offload_p2p") as [p, d]:
        params = source(p)
        del params["remote_prefiller"][missing]
        assert await text_from(client, d, params) == await text_of_one(client)
        assert d.requests[0].leg == "local"


@pytest.mark.parametrize("target", [{}, {"kv_request_id": ""}])
async def test_blocks_without_a_name_are_not_kept(client: Client, target: dict[str, Any]) -> None:
    async with simulators("prefill", connector="offload_p2p") as [p]:
        await prefilled(client, p, {"remote_decoder": target})
        assert p.engine.used_blocks == 0


async def test_blocks_that_are_not_fetched_are_freed_when_their_lease_ends(client: Client) -> None:
    async with simulators("prefill", connector="offload_p2p", lease=0.2) as [p]:
        await prefilled(client, p, {"remote_decoder": {"kv_request_id": "kv-1"}})
        assert p.engine.used_blocks > 0
        await p.wait_for(lambda: p.engine.expired == 1)
        assert p.engine.used_blocks == 0
