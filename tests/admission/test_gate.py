"""The gate that every request passes."""

from __future__ import annotations

import asyncio

import pytest
from pd_proxy.admission.gate import Gate
from pd_proxy.errors import Draining

TIMEOUT = 5.0


async def request(gate: Gate, begun: asyncio.Event, end: asyncio.Event) -> str:
    """Run one request through the gate; returns how it ended."""
    task = asyncio.current_task()
    assert task is not None
    try:
        gate.enter(task)
        begun.set()
        await end.wait()
    except asyncio.CancelledError:
        return "evicted"
    except Draining as error:
        assert (error.status, error.retry_after) == (503, 1)
        return "refused"
    finally:
        gate.leave(task)
    return "ended"


async def begin(gate: Gate, end: asyncio.Event) -> asyncio.Task[str]:
    """Start a request; returns once it is inside the gate."""
    begun = asyncio.Event()
    task = asyncio.create_task(request(gate, begun, end))
    async with asyncio.timeout(TIMEOUT):
        await begun.wait()
    return task


async def test_the_gate_counts_the_requests_inside() -> None:
    gate, end = Gate(), asyncio.Event()
    tasks = [await begin(gate, end) for _ in range(3)]
    assert gate.inside == 3
    end.set()
    assert await asyncio.gather(*tasks) == ["ended"] * 3
    assert gate.inside == 0


async def test_an_empty_gate_is_empty_at_once() -> None:
    assert await Gate().wait_empty(0.01)


async def test_a_closed_gate_refuses_requests_and_says_when_to_try_again() -> None:
    gate = Gate()
    gate.closed = True
    assert await request(gate, asyncio.Event(), asyncio.Event()) == "refused"
    assert gate.inside == 0


async def test_a_refused_request_does_not_end_the_wait_for_requests_inside() -> None:
    gate, end = Gate(), asyncio.Event()
    task = await begin(gate, end)
    gate.closed = True
    assert await request(gate, asyncio.Event(), asyncio.Event()) == "refused"
    assert gate.inside == 1
    assert not await gate.wait_empty(0.01)
    end.set()
    assert await task == "ended"
    assert await gate.wait_empty(0.01)


async def test_a_draining_gate_still_lets_requests_in() -> None:
    gate, end = Gate(), asyncio.Event()
    gate.draining = True
    task = await begin(gate, end)
    assert gate.inside == 1
    end.set()
    assert await task == "ended"


async def test_waiting_for_an_empty_gate_ends_when_the_last_one_leaves() -> None:
    gate, first, second = Gate(), asyncio.Event(), asyncio.Event()
    tasks = [await begin(gate, first), await begin(gate, second)]
    waiting = asyncio.create_task(gate.wait_empty(TIMEOUT))
    first.set()
    await tasks[0]
    assert not waiting.done()
    second.set()
    assert await waiting


async def test_eviction_cancels_exactly_the_requests_inside() -> None:
    gate, end = Gate(), asyncio.Event()
    tasks = [await begin(gate, end) for _ in range(2)]
    bystander = asyncio.create_task(end.wait())
    gate.evict()
    assert await asyncio.gather(*tasks) == ["evicted"] * 2
    assert not bystander.done()
    assert gate.inside == 0
    end.set()
    await bystander


async def test_a_request_that_has_ended_is_not_evicted() -> None:
    gate, end = Gate(), asyncio.Event()
    end.set()
    assert await request(gate, asyncio.Event(), end) == "ended"
    gate.evict()
    try:
        await asyncio.sleep(0)  # a cancellation of this task would arrive here
    except asyncio.CancelledError:
        pytest.fail("it was evicted")
