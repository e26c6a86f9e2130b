"""Cyclic garbage is collected while few requests run, and after a limit however many run."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Iterator

import pytest
from pd_proxy.runtime import garbage

from tests.support import until


class Knot:
    """An object in a cycle, which only a collection frees."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    thresholds = gc.get_threshold()
    yield
    gc.set_threshold(*thresholds)
    gc.unfreeze()
    gc.freeze()  # as conftest.py does for the suite


def old_knot() -> weakref.ref[Knot]:
    """An object that has survived collections of the young generation, as garbage of a long stream does."""
    knot = Knot()
    for _ in range(4):
        gc.collect(0)
    assert gc.get_count()[1] >= 4
    return weakref.ref(knot)


async def test_old_garbage_is_collected_while_few_requests_run() -> None:
    garbage.freeze()
    knot = old_knot()
    gc.collect(0)
    assert knot() is not None
    tidying = asyncio.create_task(garbage.collect_when_quiet(lambda: 99, interval=0.001))
    await until(lambda: knot() is None)
    tidying.cancel()


async def test_while_many_requests_run_the_collection_waits_for_a_limited_time() -> None:
    garbage.freeze()
    knot = old_knot()
    now, looks = 0.0, 0

    def many() -> int:
        nonlocal looks
        looks += 1
        return 10_000

    tidying = asyncio.create_task(garbage.collect_when_quiet(many, lambda: now, interval=0.001))
    await until(lambda: looks > 3)
    assert knot() is not None
    now = 901.0
    await until(lambda: knot() is None)
    tidying.cancel()


async def test_without_old_garbage_nothing_is_collected() -> None:
    garbage.freeze()
    gc.collect()
    looks = 0

    def none() -> int:
        nonlocal looks
        looks += 1
        return 0

    tidying = asyncio.create_task(garbage.collect_when_quiet(none, interval=0.001))
    await asyncio.sleep(0.02)  # the test shows that nothing happens in this time
    assert not looks
    tidying.cancel()


async def test_automatic_collections_cover_only_the_young_generations() -> None:
    garbage.freeze()
    before = [generation["collections"] for generation in gc.get_stats()]
    kept = [[] for _ in range(300_000)]  # type: ignore[var-annotated]
    after = [generation["collections"] for generation in gc.get_stats()]
    assert after[0] > before[0]
    assert after[1:] == before[1:]
    del kept
