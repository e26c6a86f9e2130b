"""KV events of a real engine: the index believes cached what the engine reports as cached, request by request."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import httpx
import pytest
from pd_proxy.fleet.fleet import Fleet
from pd_proxy.fleet.zmq.kv_events import KvEvents
from pd_proxy.prefix.chain import chain_of, chain_of_ids, root_of_ids
from pd_proxy.prefix.index import PrefixIndex
from pd_proxy.requests.body import read_body
from pd_proxy.settings.tree import build_settings

from tests.support import until

from .engines import BLOCK_SIZE, MODEL_NAME, Engine, Role, running
from .processes import free_port
from .questions import prompt_of

pytest.importorskip("zmq")
pytestmark = pytest.mark.real

KEY = b"k" * 32
BLOCKS = 80
"""Blocks of the engine: so few that it evicts repeatedly."""


@dataclass
class Publishing:
    """An engine, and the ports at which it publishes."""

    engine: Engine
    events: int
    replay: int


@pytest.fixture(scope="module")
def publishing(venv_python: Path, model: Path, logs: Path) -> Iterator[Publishing]:
    ports = free_port(), free_port()
    # vLLM binds addresses with a star and connects to all others, so loopback alone cannot be asked for.
    config = {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": f"tcp://*:{ports[0]}",
        "replay_endpoint": f"tcp://*:{ports[1]}",
    }
    arguments = ["--kv-events-config", json.dumps(config), "--num-gpu-blocks-override", str(BLOCKS)]
    folder = logs / "kv-events"
    folder.mkdir()
    with running(venv_python, model, [Role.SINGLE], folder, more_arguments=arguments, dev_mode=(0,)) as (engine,):
        yield Publishing(engine, *ports)


class Believer:
    """The belief about the engine, from its events alone."""

    def __init__(self, publishing: Publishing) -> None:
        self.engine = publishing.engine
        url = self.engine.url
        location = {"backend": url, "kv_events_port": publishing.events, "kv_replay_port": publishing.replay}
        endpoints = {"endpoint": "tcp://{host}:1", "replay": "tcp://{host}:2"}
        settings = build_settings({"mixed": [url], "kv_events": endpoints, "locations": [location]}, {})
        fleet = Fleet(settings)
        (backend,) = fleet
        backend.models = {MODEL_NAME: {"id": MODEL_NAME}}
        self.index = PrefixIndex()
        self.index.join(url, 1 << 20)
        self.events = KvEvents(settings, fleet, self.index, KEY)
        self.http = httpx.AsyncClient(base_url=url, timeout=60, trust_env=False)

    def believed(self, ids: list[int], salt: str = "") -> int:
        chain = chain_of_ids(ids, root_of_ids(MODEL_NAME, KEY, salt), KEY)
        return self.index.cached(chain).get(self.engine.url, 0)

    async def ask(self, ids: list[int], salt: str = "") -> int:
        """Have a prompt computed; returns how many of its tokens the engine reports as cached."""
        body = {"model": MODEL_NAME, "prompt": ids, "max_tokens": 1, "temperature": 0}
        if salt:
            body["cache_salt"] = salt
        answer = (await self.http.post("/v1/completions", json=body)).raise_for_status().json()
        details = answer["usage"].get("prompt_tokens_details") or {}
        return int(details.get("cached_tokens") or 0)

    async def stored(self, ids: list[int], salt: str = "") -> None:
        """Wait until the events of a prompt's last blocks are here, and with them those of the blocks evicted for
        it."""
        await until(lambda: self.believed(ids, salt) == len(ids) // BLOCK_SIZE * BLOCK_SIZE)

    async def __aenter__(self) -> Believer:
        self.events.start()
        list(self.events.corrections.want_ids())
        await until(lambda: self.events.connected == 1)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.events.close()
        await self.http.aclose()


async def test_the_believed_tokens_are_those_that_a_real_engine_reports_as_cached(publishing: Publishing) -> None:
    random = Random(5)
    beginnings = [[random.randrange(10, 700) for _ in range(BLOCK_SIZE * length)] for length in (4, 9, 16)]
    async with Believer(publishing) as it:
        found = []
        for number in range(40):
            ids = [*random.choice(beginnings), *(random.randrange(10, 700) for _ in range(random.randrange(1, 300)))]
            salt = "pepper" if number % 7 == 6 else ""
            believed = it.believed(ids, salt)
            cached = await it.ask(ids, salt)
            # The last token is computed in any case, since the next one is drawn from it.
            assert cached == min(believed, (len(ids) - 1) // BLOCK_SIZE * BLOCK_SIZE), f"request {number}"
            found.append(cached)
            await it.stored(ids, salt)
        assert sum(map(bool, found)) >= 20
        assert it.events.events["removed"] >= 20
        for what in ("unplaced", "malformed", "unknown", "ignored"):
            assert it.events.events[what] == 0
        assert it.events.batches["lost"] == 0


async def test_the_cache_of_a_warm_real_engine_is_known_by_its_replay(publishing: Publishing) -> None:
    ids = [number % 600 + 20 for number in range(10 * BLOCK_SIZE)]
    async with Believer(publishing) as before:
        await before.ask(ids)
    async with Believer(publishing) as it:
        await it.stored(ids)
        assert it.events.batches["replayed"] > 0
        assert await it.ask(ids) == 9 * BLOCK_SIZE


async def test_a_chats_ids_make_events_count_for_its_text(publishing: Publishing) -> None:
    """The belief about the text rises and falls with the ids that the engine has of it."""
    body = {"model": MODEL_NAME, "messages": [{"role": "user", "content": prompt_of(1200, "a chat")}], "max_tokens": 1}
    read = read_body(json.dumps(body).encode(), "chat")
    chain = chain_of(read, KEY)

    async def had(it: Believer) -> float:
        answer = (await it.http.post("/v1/chat/completions", json=body)).raise_for_status().json()
        usage = answer["usage"]
        return int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0) / int(usage["prompt_tokens"])

    async with Believer(publishing) as it:

        def believed() -> float:
            return it.index.cached(chain).get(it.engine.url, 0) / chain.tokens

        answer = await it.http.post("/v1/chat/completions", json={**body, "return_token_ids": True})
        ids = answer.raise_for_status().json()["prompt_token_ids"]
        it.events.reported(chain, read.members, ",".join(map(str, ids)).encode())
        await until(lambda: believed() > 0.85)
        assert await had(it) > 0.9
        random = Random(6)
        seen = [believed()]
        for _ in range(12):  # until the chat's blocks are evicted, the last ones first
            others = [random.randrange(10, 700) for _ in range(10 * BLOCK_SIZE)]
            await it.ask(others)
            await it.stored(others)
            seen.append(believed())
        assert seen == sorted(seen, reverse=True)
        assert len(set(seen)) > 2  # block by block
        assert seen[-1] == 0
        assert await had(it) == 0
        await until(lambda: believed() > 0.85)


async def test_a_reset_cache_is_empty_at_once(publishing: Publishing) -> None:
    ids = [number % 500 + 30 for number in range(6 * BLOCK_SIZE)]
    async with Believer(publishing) as it:
        await it.ask(ids)
        await it.stored(ids)

        async def reset() -> bool:
            await it.http.post("/reset_prefix_cache")
            await it.http.post("/v1/completions", json={"model": MODEL_NAME, "prompt": [5] * 40, "max_tokens": 1})
            return it.events.events["cleared"] > 0

        for _ in range(20):  # a reset is refused while blocks are held, and its event comes with the next step
            if await reset():
                break
            await asyncio.sleep(0.1)
        await until(lambda: it.believed(ids) == 0)
        assert await it.ask(ids) == 0


async def test_a_restarted_engine_has_nothing(publishing: Publishing) -> None:
    ids = [number % 400 + 40 for number in range(6 * BLOCK_SIZE)]
    async with Believer(publishing) as it:
        await it.ask(ids)
        await it.stored(ids)
        it.engine.kill()
        it.engine.start_again()
        await until(lambda: it.believed(ids) == 0)
        assert await it.ask(ids) == 0
        await it.stored(ids)
        assert it.events.batches["restart"] == 1
