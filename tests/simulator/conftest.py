from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from pd_proxy_simulator import Simulator, SimulatorConfig

from .helpers import Client, Start


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    client = Client()
    yield client
    await client.http.aclose()


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Starts simulators with the given options, and stops them all at the end."""
    running: list[Simulator] = []

    async def start(**options: Any) -> Simulator:
        sim = Simulator(SimulatorConfig(**{"handshake_timeout": 0.1, "death_delay": 0.05, **options}))
        running.append(sim)
        await sim.start()
        return sim

    yield start
    for sim in running:
        await sim.stop(grace=0)


@pytest.fixture
async def mixed(start: Start) -> Simulator:
    return await start()


@pytest.fixture
async def pair(start: Start) -> tuple[Simulator, Simulator]:
    return await start(role="prefill"), await start(role="decode")
