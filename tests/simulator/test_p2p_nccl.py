"""P2pNcclConnector as the engines have it: everything depends on the request's id."""

from __future__ import annotations

import pytest
from pd_proxy_simulator import Simulator

from .helpers import Client, Start, start_pair


def named(p: Simulator, d: Simulator, end: str = "0" * 32) -> str:
    return f"___prefill_addr_127.0.0.1:{p.side_port}___decode_addr_127.0.0.1:{d.side_port}_{end}"


async def test_a_pair_answers_as_one_engine_does(start: Start, client: Client) -> None:
    p, d = await start_pair(start, "p2p_nccl", lease=0.3)
    assert (await client.complete(p, request_id=named(p, d))).json()["kv_transfer_params"] is None
    answer = await client.complete(d, request_id=named(p, d), tokens=12)
    assert (
        answer.json()["choices"][0]["text"]
        == (await client.complete(await start(), tokens=12)).json()["choices"][0]["text"]
    )
    assert d.engine.pulls == 1
    assert p.engine.used_blocks == 0


@pytest.mark.parametrize("name", [None, "plain", "___decode_addr_x", "___prefill_addr_127.0.0.1:1_"])
async def test_an_id_without_addresses_kills_either_engine(start: Start, client: Client, name: str | None) -> None:
    for engine in await start_pair(start, "p2p_nccl", lease=0.3):
        assert (await client.complete(engine, request_id=name)).status_code == 500
        assert engine.engine.dead is not None


async def test_a_decode_leg_with_another_id_waits_until_its_lease_ends(start: Start, client: Client) -> None:
    p, d = await start_pair(start, "p2p_nccl", lease=0.3)
    await client.complete(p, request_id=named(p, d))
    assert (await client.complete(d, request_id=named(p, d, "1" * 32))).status_code == 500
    assert d.engine.pulls == 0


async def test_kv_that_is_sent_to_an_unreachable_engine_is_freed(start: Start, client: Client) -> None:
    p, _ = await start_pair(start, "p2p_nccl", lease=0.3)
    name = f"___prefill_addr_127.0.0.1:{p.side_port}___decode_addr_127.0.0.1:1_{'0' * 32}"
    assert (await client.complete(p, request_id=name)).status_code == 200
    await p.wait_for(lambda: p.engine.stats.failed_transfers == 1)
    assert p.engine.used_blocks == 0
