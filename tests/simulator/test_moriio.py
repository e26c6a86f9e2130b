"""MoRIIOConnector as the engines have it: how legs are paired, and the effect of inexact parameters."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
import zmq
from pd_proxy_simulator import Simulator

from .helpers import Client, Start, start_pair


def peer(engine: Simulator, **more: Any) -> dict[str, Any]:
    return {
        "transfer_id": "tx-1",
        "remote_engine_id": None,
        "remote_block_ids": None,
        "remote_host": "127.0.0.1",
        "remote_handshake_port": engine.side_port,
        "remote_notify_port": engine.side_port,
        "remote_dp_size": 1,
        "remote_tp_size": 1,
        **more,
    }


def prefill_params(decode: Simulator, **more: Any) -> dict[str, Any]:
    return {"do_remote_decode": True, "do_remote_prefill": False, **peer(decode, **more)}


def decode_params(prefill: Simulator, **more: Any) -> dict[str, Any]:
    return {"do_remote_decode": False, "do_remote_prefill": True, "remote_dp_rank": 0, **peer(prefill, **more)}


def text(answer: Any) -> str:
    return str(answer.json()["choices"][0]["text"])


async def pair(start: Start, mode: str, **more: Any) -> tuple[Simulator, Simulator]:
    return await start_pair(start, f"moriio_{mode}", **{"lease": 0.5, **more})


async def right_text(start: Start, client: Client) -> str:
    return text(await client.complete(await start(), tokens=12))


async def test_in_read_mode_a_pair_answers_as_one_engine_does(start: Start, client: Client) -> None:
    p, d = await pair(start, "read")
    params = (await client.complete(p, params=prefill_params(d), ignore_eos=True)).json()["kv_transfer_params"]
    assert text(await client.complete(d, params=params, tokens=12)) == await right_text(start, client)
    await p.wait_for(lambda: p.engine.used_blocks == 0)
    assert d.engine.pulls == 1


async def test_in_read_mode_decode_answers_an_ordinary_request_wrong(start: Start, client: Client) -> None:
    _, d = await pair(start, "read")
    answer = await client.complete(d, tokens=12)
    assert answer.status_code == 200
    assert text(answer) != await right_text(start, client)


async def test_in_write_mode_the_legs_run_concurrently_and_pair_by_the_transfer(start: Start, client: Client) -> None:
    p, d = await pair(start, "write")
    both = await asyncio.gather(
        client.complete(p, params=prefill_params(d), ignore_eos=True),
        client.complete(d, params=decode_params(p), tokens=12),
    )
    assert text(both[1]) == await right_text(start, client)
    await p.wait_for(lambda: p.engine.used_blocks == 0)
    assert d.engine.pulls == 1


async def test_in_write_mode_an_ordinary_request_is_computed(start: Start, client: Client) -> None:
    _, d = await pair(start, "write")
    assert text(await client.complete(d, tokens=12)) == await right_text(start, client)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"transfer_id": "tx-2"}, {}),  # another transfer
        ({}, {"remote_dp_rank": 1}),  # prefill is on another rank
        ({"remote_notify_port": 1}, {}),  # prefill writes to another address
        ({}, {"remote_notify_port": 1}),  # decode names its blocks to another address
    ],
)
async def test_legs_that_do_not_pair_wait_until_their_lease_ends(
    start: Start, client: Client, asked: dict[str, Any], said: dict[str, Any]
) -> None:
    p, d = await pair(start, "write")
    both = await asyncio.gather(
        client.complete(p, params=prefill_params(d, **asked), ignore_eos=True),
        client.complete(d, params=decode_params(p, **said), tokens=12),
    )
    assert [answer.status_code for answer in both] == [200, 500]
    assert d.engine.pulls == 0
    await p.wait_for(lambda: p.engine.used_blocks == 0)


@pytest.mark.parametrize("mode", ["read", "write"])
@pytest.mark.parametrize("leg", ["prefill", "decode"])
@pytest.mark.parametrize(
    "name",
    [
        "transfer_id",
        "remote_block_ids",
        "remote_engine_id",
        "remote_host",
        "remote_handshake_port",
        "remote_notify_port",
    ],
)
async def test_a_missing_parameter_kills_either_engine(
    start: Start, client: Client, mode: str, leg: str, name: str
) -> None:
    p, d = await pair(start, mode)
    engine, params = (p, prefill_params(d)) if leg == "prefill" else (d, decode_params(p))
    del params[name]
    assert (await client.complete(engine, params=params)).status_code == 500
    assert engine.engine.dead is not None
    assert engine.engine.dead.split(":")[0] in ("KeyError", "ValueError")


async def test_prefill_keeps_nothing_of_a_request_that_ended_with_the_end_of_sequence_token(
    start: Start, client: Client
) -> None:
    p, d = await pair(start, "read", eos_rate=0.999)
    assert (await client.complete(p, params=prefill_params(d))).json()["kv_transfer_params"] is None
    assert p.engine.used_blocks == 0


@pytest.mark.parametrize("mode", ["read", "write"])
async def test_a_refused_decode_leg_releases_prefills_blocks(start: Start, client: Client, mode: str) -> None:
    p, d = await pair(start, mode, lease=30.0)
    reply = (await client.complete(p, params=prefill_params(d), ignore_eos=True)).json()["kv_transfer_params"]
    assert p.engine.used_blocks > 0
    params = reply if mode == "read" else decode_params(p)
    assert (await client.complete(d, params=params, min_tokens=2)).status_code == 400
    await p.wait_for(lambda: p.engine.used_blocks == 0)


@pytest.mark.parametrize(("name", "mode"), [("moriio_read", "READ"), ("moriio_write", "WRITE"), ("p2p_nccl", None)])
async def test_engines_register_again_and_again(start: Start, name: str, mode: str | None) -> None:
    context = zmq.Context()
    try:
        router = context.socket(zmq.ROUTER)
        port = router.bind_to_random_port("tcp://127.0.0.1")
        d = await start(role="decode", connector=name, proxy=f"127.0.0.1:{port}", register_every=0.05)
        for _ in range(3):
            assert await asyncio.to_thread(router.poll, 3000)
            said = msgspec.msgpack.decode(router.recv_multipart()[1])
            assert (said["type"], said["http_address"]) == ("D", d.url.removeprefix("http://"))
            assert said.get("transfer_mode") == mode
        d.kill()
        while await asyncio.to_thread(router.poll, 200):
            router.recv_multipart()
    finally:
        context.destroy(linger=0)
