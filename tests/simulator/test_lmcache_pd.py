"""LMCache's prefill-decode mode as the engines have it: a sender, a receiver, and the effect of inexact parameters."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
import zmq
from pd_proxy_simulator import Simulator

from tests.support import until

from .helpers import Client, Start, start_pair


class Gateway:
    """A PULL socket, as a gateway has it."""

    def __init__(self) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.PULL)
        self.address = f"127.0.0.1:{self.socket.bind_to_random_port('tcp://127.0.0.1')}"

    async def notification(self, seconds: float = 2.0) -> Any:
        """The next notification; None when none comes."""
        if not await asyncio.to_thread(self.socket.poll, int(seconds * 1000)):
            return None
        return msgspec.msgpack.decode(self.socket.recv())


@pytest.fixture
async def gateway() -> AsyncIterator[Gateway]:
    made = Gateway()
    yield made
    made.context.destroy(linger=0)


@pytest.fixture
async def engines(start: Start, gateway: Gateway) -> tuple[Simulator, Simulator]:
    return await start_pair(start, "lmcache_pd", proxy=gateway.address)


def spec(decode: Simulator, **more: Any) -> dict[str, Any]:
    ports = [decode.side_port]
    receiver = {"receiver_host": "127.0.0.1", "receiver_init_port": ports, "receiver_alloc_port": ports}
    return {"disagg_spec": {"req_id": "r1", **receiver, **more}}


async def test_decode_finds_by_its_prompt_what_prefill_wrote_and_only_once(
    engines: tuple[Simulator, Simulator], gateway: Gateway, client: Client
) -> None:
    p, d = engines
    answer = await client.complete(p, params={**spec(d), "ret_first_tok": True})
    assert isinstance(answer.json()["kv_transfer_params"]["first_tok"], int)
    assert await gateway.notification() == {"type": "ProxyNotif", "req_id": "r1"}
    assert p.engine.used_blocks == 0
    told = (await client.complete(d, tokens=12)).json()["choices"][0]["text"]
    assert d.engine.stats.pulls == 1
    d.engine.pool.forget()
    assert (await client.complete(d, tokens=12)).json()["choices"][0]["text"] == told
    assert d.engine.stats.pulls == 1, "the cache was read, and is there no more"


async def test_a_decode_leg_before_the_notification_generates_another_text(
    start: Start, gateway: Gateway, client: Client
) -> None:
    told = {"connector": "lmcache_pd", "proxy": gateway.address}
    p, d = await start(role="prefill", transfer_rate=100.0, **told), await start(role="decode", **told)
    right = (await client.complete(await start(), tokens=12)).json()["choices"][0]["text"]
    await client.complete(p, params=spec(d))
    side = d.engine.side
    await until(lambda: bool(side._received))  # type: ignore[attr-defined]
    assert (await client.complete(d, tokens=12)).json()["choices"][0]["text"] != right


async def test_each_rank_sends_a_notification(start: Start, gateway: Gateway, client: Client) -> None:
    told = {"connector": "lmcache_pd", "proxy": gateway.address, "tp": 2}
    p, d = await start(role="prefill", **told), await start(role="decode", **told)
    ports = [d.side_port] * 2
    await client.complete(p, params=spec(d, receiver_init_port=ports, receiver_alloc_port=ports))
    assert [await gateway.notification(), await gateway.notification()] == [{"type": "ProxyNotif", "req_id": "r1"}] * 2


@pytest.mark.parametrize("name", ["req_id", "receiver_host", "receiver_init_port", "receiver_alloc_port"])
async def test_a_key_that_is_missing_kills_prefill(
    engines: tuple[Simulator, Simulator], client: Client, name: str
) -> None:
    p, d = engines
    params = spec(d)
    del params["disagg_spec"][name]
    assert (await client.complete(p, params=params)).status_code == 500
    assert p.engine.dead == f"KeyError: {name!r}"


@pytest.mark.parametrize("ports", [[], "none", [None], {}])
async def test_no_port_for_a_rank_kills_prefill(
    engines: tuple[Simulator, Simulator], client: Client, ports: Any
) -> None:
    p, d = engines
    await client.complete(p, params=spec(d, receiver_init_port=ports))
    await p.wait_for(lambda: p.engine.dead is not None)


@pytest.mark.parametrize("name", ["receiver_init_port", "receiver_alloc_port"])
async def test_a_prefill_leg_with_a_wrong_port_is_answered_and_never_confirmed(
    engines: tuple[Simulator, Simulator], gateway: Gateway, client: Client, name: str
) -> None:
    p, d = engines
    assert (await client.complete(p, params=spec(d, **{name: [0]}))).status_code == 200
    await p.wait_for(lambda: p.engine.stats.failed_transfers == 1)
    assert await gateway.notification(0.05) is None
    assert p.engine.used_blocks == 0


async def test_an_engine_with_other_weights_is_not_written_to(start: Start, gateway: Gateway, client: Client) -> None:
    told = {"connector": "lmcache_pd", "proxy": gateway.address}
    p, d = await start(role="prefill", **told), await start(role="decode", weights=3, **told)
    await client.complete(p, params=spec(d))
    await p.wait_for(lambda: p.engine.stats.failed_transfers == 1)


async def test_a_request_without_a_receiver_is_an_ordinary_one(
    engines: tuple[Simulator, Simulator], gateway: Gateway, client: Client
) -> None:
    assert (await client.complete(engines[0])).status_code == 200
    assert (await client.complete(engines[1])).status_code == 200
    assert await gateway.notification(0.05) is None
