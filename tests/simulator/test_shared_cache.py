"""How engines with a shared cache treat legs that are sent by hand, without a gateway."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pd_proxy_simulator import SimulatorConfig

from tests.support import simulators

from .helpers import PROMPT, Client, text_of_one


@pytest.fixture
def shared(tmp_path: Path) -> dict[str, Any]:
    return {"connector": "shared_cache", "shared_path": str(tmp_path)}


async def test_decode_finds_what_prefill_has_computed(client: Client, shared: dict[str, Any]) -> None:
    async with simulators("prefill", "decode", **shared) as [p, d]:
        await client.text(p, max_tokens=1)
        assert await client.text(d) == await text_of_one(client)
        assert d.engine.pulls == 1
        whole_blocks = d.engine.stats.external_hits
        assert 0 < whole_blocks < d.engine.stats.prompt_tokens
        assert whole_blocks % d.config.block_size == 0
        assert p.engine.used_blocks == 0


async def test_a_miss_is_computed(client: Client, shared: dict[str, Any]) -> None:
    async with simulators("prefill", "decode", **shared) as [_, d]:
        assert await client.text(d) == await text_of_one(client)
        assert d.engine.pulls == 0


async def test_a_cached_prefix_is_used(client: Client, shared: dict[str, Any]) -> None:
    longer = PROMPT + "and then there was more of it than prefill has ever seen " * 3
    async with simulators("prefill", "decode", **shared) as [p, d]:
        await client.text(p, max_tokens=1)
        assert await client.text(d, prompt=longer) == await text_of_one(client, prompt=longer)
        assert d.engine.pulls == 1
        assert 0 < d.engine.stats.local_compute < d.engine.stats.prompt_tokens


async def test_requests_with_another_salt_share_nothing(client: Client, shared: dict[str, Any]) -> None:
    async with simulators("prefill", "decode", **shared) as [p, d]:
        await client.text(p, max_tokens=1, cache_salt="pepper")
        await client.text(d)
        assert d.engine.pulls == 0


async def test_engines_with_other_weights_share_nothing(client: Client, shared: dict[str, Any]) -> None:
    async with simulators("prefill", **shared) as [p], simulators("decode", weights=7, **shared) as [d]:
        await client.text(p, max_tokens=1)
        await client.text(d)
        assert d.engine.pulls == 0


def test_a_shared_cache_needs_a_folder() -> None:
    with pytest.raises(ValueError, match="shared_path"):
        SimulatorConfig(connector="shared_cache")
