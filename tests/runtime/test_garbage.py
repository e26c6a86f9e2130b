"""Garbage in cycles is collected when few would notice, and at last however many run."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Iterator

import pytest
from pd_proxy.runtime import garbage

from tests.support import until


class Knot:
    """An object that only a collection ends."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    thresholds = gc.get_threshold()
    yield
    gc.set_threshold(*thresholds)
    gc.unfreeze()
    gc.freeze()  # as the suite has it (conftest.py)


def old_knot() -> weakref.ref[Knot]:
    """One that has survived looks at the young, as garbage of a long stream has."""
    knot = Knot()
    for _ in range(4):
        gc.collect(0)
    assert gc.get_count()[1] >= 4
    return weakref.ref(knot)


async def test_old_garbage_goes_when_few_requests_run() -> None:
    garbage.settle()
    knot = old_knot()
    gc.collect(0)
    assert knot() is not None
    tidying = asyncio.create_task(garbage.collect_when_quiet(lambda: 99, look=0.001))
    await until(lambda: knot() is None)
    tidying.cancel()


async def test_while_many_run_it_waits_but_not_for_ever() -> None:
    garbage.settle()
    knot = old_knot()
    now, looks = 0.0, 0

    def many() -> int:
        nonlocal looks
        looks += 1
        return 10_000

    tidying = asyncio.create_task(garbage.collect_when_quiet(many, lambda: now, look=0.001))
    await until(lambda: looks > 3)
    assert knot() is not None
    now = 901.0
    await until(lambda: knot() is None)
    tidying.cancel()


async def test_where_nothing_grew_old_nothing_is_collected() -> None:
    garbage.settle()
    gc.collect()
    looks = 0

    def none() -> int:
        nonlocal looks
        looks += 1
        return 0

    tidying = asyncio.create_task(garbage.collect_when_quiet(none, look=0.001))
    await asyncio.sleep(0.02)  # what is shown is that nothing happens
    assert not looks
    tidying.cancel()


async def test_only_the_young_are_looked_through_by_themselves() -> None:
    garbage.settle()
    before = [generation["collections"] for generation in gc.get_stats()]
    kept = [[] for _ in range(300_000)]  # type: ignore[var-annotated]
    after = [generation["collections"] for generation in gc.get_stats()]
    assert after[0] > before[0]
    assert after[1:] == before[1:]
    del kept
