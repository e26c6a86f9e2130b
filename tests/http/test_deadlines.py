"""Limits end in their order, once, and not at all when the wait has ended."""

from __future__ import annotations

import asyncio

import pytest
from pd_proxy.http.deadlines import Deadlines

from tests.faults.clock import VirtualLoop, virtual_time


class Wait:
    def __init__(self, said: list[tuple[str, float]], name: str) -> None:
        self.said = said
        self.name = name

    def overdue(self, seconds: float) -> None:
        self.said.append((self.name, round(asyncio.get_running_loop().time() - 1000, 3)))


@pytest.fixture
def said() -> list[tuple[str, float]]:
    return []


def test_each_is_told_when_its_own_time_is_up(said: list[tuple[str, float]]) -> None:
    async def run() -> None:
        loop = asyncio.get_running_loop()
        limits = Deadlines(5.0)
        for name in "abc":
            limits.watch(Wait(said, name), loop)
            await asyncio.sleep(1)
        await asyncio.sleep(10)
        limits.watch(Wait(said, "d"), loop)
        await asyncio.sleep(10)

    with virtual_time() as runner:
        runner.run(run())
    assert said == [("a", 5.0), ("b", 6.0), ("c", 7.0), ("d", 18.0)]


def test_what_has_ended_is_told_nothing(said: list[tuple[str, float]]) -> None:
    async def run() -> None:
        loop = asyncio.get_running_loop()
        limits = Deadlines(5.0)
        first, second = Wait(said, "first"), Wait(said, "second")
        limits.watch(first, loop)
        limits.watch(second, loop)
        limits.forget(first)
        limits.forget(Wait(said, "never watched"))
        await asyncio.sleep(10)

    with virtual_time() as runner:
        runner.run(run())
    assert said == [("second", 5.0)]


def test_who_is_watched_again_has_all_its_time_again(said: list[tuple[str, float]]) -> None:
    async def run() -> None:
        loop = asyncio.get_running_loop()
        limits = Deadlines(5.0)
        wait, other = Wait(said, "again"), Wait(said, "other")
        limits.watch(wait, loop)
        await asyncio.sleep(3)
        limits.watch(other, loop)
        limits.forget(wait)
        limits.watch(wait, loop)
        await asyncio.sleep(10)

    with virtual_time() as runner:
        runner.run(run())
    assert said == [("other", 8.0), ("again", 8.0)]


def test_without_a_limit_nobody_is_told(said: list[tuple[str, float]]) -> None:
    async def run() -> None:
        Deadlines(None).watch(Wait(said, "a"), asyncio.get_running_loop())
        await asyncio.sleep(10_000)

    with virtual_time() as runner:
        runner.run(run())
    assert said == []


def test_many_limits_take_one_timer() -> None:
    async def run() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        limits = Deadlines(5.0)
        before = len(loop._scheduled)  # type: ignore[attr-defined]
        waits = [Wait([], str(number)) for number in range(100)]
        for wait in waits:
            limits.watch(wait, loop)
        assert len(loop._scheduled) == before + 1  # type: ignore[attr-defined]
        for wait in waits:
            limits.forget(wait)
        assert not limits._open

    with virtual_time() as runner:
        runner.run(run())


def test_another_loop_gets_a_timer_of_its_own(said: list[tuple[str, float]]) -> None:
    limits = Deadlines(5.0)

    async def run(seconds: float) -> None:
        limits.watch(Wait(said, "a"), asyncio.get_running_loop())
        await asyncio.sleep(seconds)

    with virtual_time() as runner:
        runner.run(run(1))
    with virtual_time() as runner:
        runner.run(run(10))
    assert ("a", 5.0) in said
