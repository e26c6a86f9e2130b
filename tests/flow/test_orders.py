"""The orders of legs: when each leg begins, and what the end of one means for the other."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from pd_proxy.errors import BackendCut
from pd_proxy.flow.orders import Alone, Concurrent, Sequential
from pd_proxy.telemetry.records import RequestRecord, Stage


async def at_once() -> None:
    await asyncio.sleep(0)


async def never() -> None:
    await asyncio.get_running_loop().create_future()


async def cut() -> None:
    raise BackendCut("cut")


class Steps:
    """Notes what is done."""

    def __init__(
        self, prefill: Callable[[], Awaitable[None]] = at_once, decode: Callable[[], Awaitable[None]] = at_once
    ) -> None:
        self.done: list[str] = []
        self.whole = False
        self._legs = {"prefill": prefill, "decode": decode}

    async def _leg(self, name: str) -> None:
        self.done.append(name)
        try:
            await self._legs[name]()
        except asyncio.CancelledError:
            self.done.append(f"{name} cancelled")
            raise
        except BackendCut:
            self.done.append(f"{name} cut")
            raise
        self.done.append(f"{name} answered")

    async def prefill(self, attempt: Any) -> None:
        await self._leg("prefill")

    async def decode(self, attempt: Any) -> None:
        await self._leg("decode")

    def hand_over(self, attempt: Any) -> bool:
        return not self.whole

    def begin_both(self, attempt: Any) -> None: ...

    async def wait_for_call(self, attempt: Any, call: Any) -> None: ...

    def both_failed(self, attempt: Any) -> None:
        self.done.append("failed")

    async def finish_prefill(self, attempt: Any, prefilling: asyncio.Task[None], *, decoded: bool) -> None:
        self.done.append("prefill is wanted" if decoded else "prefill is not wanted")
        prefilling.cancel()
        await asyncio.wait((prefilling,))


def attempt(role: str = "decode") -> Any:
    """A try of a request that was just placed."""
    record = RequestRecord("chat")
    record.placed(role, "http://backend")
    request = SimpleNamespace(record=record, reach=record.reach, live=False)
    return SimpleNamespace(request=request, pending=None, lease=SimpleNamespace(backend=SimpleNamespace(role=role)))


@pytest.mark.parametrize(("role", "stage"), [("mixed", Stage.DECODING), ("prefill", Stage.PREFILLING)])
async def test_alone_one_backend_answers(role: str, stage: Stage) -> None:
    steps, made = Steps(), attempt(role)
    await Alone(steps).run(made)
    assert (steps.done, made.request.record.stage) == (["decode", "decode answered"], stage)


async def test_in_sequence_decode_follows_prefills_answer() -> None:
    steps = Steps()
    await Sequential(steps).run(attempt())
    assert steps.done == ["prefill", "prefill answered", "decode", "decode answered"]


async def test_in_sequence_decode_gets_no_leg_if_prefill_has_the_whole_answer() -> None:
    steps = Steps()
    steps.whole = True
    await Sequential(steps).run(attempt())
    assert steps.done == ["prefill", "prefill answered"]


async def test_both_begin_at_once_and_decodes_answer_is_enough() -> None:
    steps = Steps(prefill=never)
    await Concurrent(steps).run(attempt())
    assert steps.done == ["prefill", "decode", "decode answered", "prefill is wanted", "prefill cancelled"]


async def test_a_prefill_that_fails_ends_decodes_leg() -> None:
    steps = Steps(prefill=cut, decode=never)
    with pytest.raises(BackendCut):
        await Concurrent(steps).run(attempt())
    assert steps.done == ["prefill", "prefill cut", "decode", "failed", "decode cancelled", "prefill is not wanted"]


async def test_a_decode_that_fails_leaves_prefill_unwanted() -> None:
    steps = Steps(prefill=never, decode=cut)
    with pytest.raises(BackendCut):
        await Concurrent(steps).run(attempt())
    assert steps.done == ["prefill", "decode", "decode cut", "failed", "prefill is not wanted", "prefill cancelled"]


async def test_a_client_that_leaves_ends_both_legs() -> None:
    steps = Steps(prefill=never, decode=never)
    running = asyncio.create_task(Concurrent(steps).run(attempt()))
    while len(steps.done) < 2:
        await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert steps.done[2:] == ["decode cancelled", "prefill is not wanted", "prefill cancelled"]
