"""The KV events of a simulated engine, as a subscriber reads them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import zmq
import zmq.asyncio
from pd_proxy_simulator import Simulator, SimulatorConfig
from pd_proxy_simulator.kv_events import END

from .helpers import Client


class Bed:
    def __init__(self, sim: Simulator, client: Client, subscription: Any, context: Any) -> None:
        self.sim = sim
        self.client = client
        self._subscription = subscription
        self._context = context

    async def batch(self) -> tuple[int, list[Any]]:
        """The next batch's number and events."""
        _, number, payload = await asyncio.wait_for(self._subscription.recv_multipart(), 10)
        _, events, rank = msgspec.msgpack.decode(payload)
        assert rank == 0
        return int.from_bytes(number, "big"), events

    async def events(self, count: int) -> list[Any]:
        found: list[Any] = []
        while len(found) < count:
            found += (await self.batch())[1]
        return found

    async def replay(self, start: int) -> list[list[bytes]]:
        with self._context.socket(zmq.DEALER) as asking:
            asking.connect(f"tcp://127.0.0.1:{self.sim.kv_replay_port}")
            await asking.send_multipart([b"", start.to_bytes(8, "big")])
            answers = []
            while not answers or answers[-1][2] != END:
                answers.append(await asyncio.wait_for(asking.recv_multipart(), 10))
            return answers


@asynccontextmanager
async def bed(**config: Any) -> AsyncIterator[Bed]:
    context = zmq.asyncio.Context()
    client = Client()
    async with Simulator(SimulatorConfig(kv_events=0, **config)) as sim:
        with context.socket(zmq.SUB) as subscription:
            subscription.setsockopt(zmq.SUBSCRIBE, b"")
            subscription.connect(f"tcp://127.0.0.1:{sim.kv_events_port}")
            while not (sim.publisher and sim.publisher.subscriptions):
                await asyncio.sleep(0.002)
            yield Bed(sim, client, subscription, context)
        await client.http.aclose()
    context.destroy(linger=0)


async def test_stored_blocks_name_their_parents_and_tokens() -> None:
    async with bed() as it:
        await it.client.text(it.sim, prompt=list(range(5, 45)), max_tokens=1)
        first, second = await it.events(2)
        assert (first["type"], first["parent_block_hash"], first["token_ids"]) == (
            "BlockStored",
            None,
            list(range(5, 21)),
        )
        assert second["parent_block_hash"] == first["block_hashes"][0]
        assert (second["token_ids"], second["block_size"]) == (list(range(21, 37)), 16)
        assert second["medium"] == "GPU"


async def test_a_salt_is_with_the_first_block_and_changes_all_hashes() -> None:
    async with bed() as it:
        await it.client.text(it.sim, prompt=list(range(5, 45)), max_tokens=1)
        plain = await it.events(2)
        await it.client.text(it.sim, prompt=list(range(5, 45)), max_tokens=1, cache_salt="pepper")
        salted = await it.events(2)
        assert [event["extra_keys"] for event in salted] == [[["pepper"]], [None]]
        assert {event["block_hashes"][0] for event in plain}.isdisjoint(event["block_hashes"][0] for event in salted)


async def test_evicted_blocks_are_removed_and_a_reset_clears_all() -> None:
    async with bed(blocks=4, kv_events_encoding="array", kv_events_hashes="bytes") as it:
        await it.client.text(it.sim, prompt=list(range(5, 37)), max_tokens=1)
        stored = [event[1][0] for event in await it.events(2)]
        await it.client.text(it.sim, prompt=list(range(50, 82)), max_tokens=1)
        events = await it.events(3)
        removed = [event for event in events if event[0] == "BlockRemoved"]
        assert removed and all(event[1][0] in stored and len(event[1][0]) == 32 for event in removed)
        (await it.client.post(it.sim, "/reset_prefix_cache", {})).raise_for_status()
        assert (await it.events(1))[-1] == ["AllBlocksCleared"]


async def test_missed_batches_can_be_replayed() -> None:
    async with bed(kv_events_topic="kv") as it:
        for start in (5, 50, 95):
            await it.client.text(it.sim, prompt=[*range(start, start + 16), 7], max_tokens=1)
            await it.batch()
        answers = await it.replay(1)
        assert [int.from_bytes(answer[2], "big", signed=True) for answer in answers] == [1, 2, -1]
        assert [answer[1] for answer in answers] == [b"kv", b"kv", b""]
        assert len(await it.replay(9)) == 1


async def test_a_restarted_engine_counts_from_zero_at_the_same_ports() -> None:
    async with bed() as it:
        await it.client.text(it.sim, prompt=list(range(5, 45)), max_tokens=1)
        assert (await it.batch())[0] == 0
        ports = it.sim.kv_events_port, it.sim.kv_replay_port
        await it.sim.restart()
        assert (it.sim.kv_events_port, it.sim.kv_replay_port) == ports
        assert len(await it.replay(0)) == 1
        await it.client.text(it.sim, prompt=list(range(5, 45)), max_tokens=1)
        assert it.sim.publisher is not None
        it.sim.publisher.flush()
        assert len(await it.replay(0)) == it.sim.publisher.sequence + 1


async def test_without_the_option_nothing_is_published() -> None:
    async with Simulator(SimulatorConfig()) as sim:
        assert sim.publisher is None
