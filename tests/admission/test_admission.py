"""Admission with tasks, timers and a loop."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from pd_proxy.admission.admission import Admission
from pd_proxy.admission.gate import Gate
from pd_proxy.admission.ticket import Ticket
from pd_proxy.errors import GatewayError, RateLimited
from pd_proxy.settings.tree import build_settings

from tests.admission.helpers import Slots
from tests.support import until


def admission(capacity: Slots | None = None, clients: list[dict[str, Any]] | None = None, **settings: Any) -> Admission:
    return Admission(build_settings({"admission": settings, "clients": clients or []}, {}), capacity)


def enter(door: Admission, client: str = "anonymous", **more: Any) -> Ticket:
    fields = {"model": "m", "split": True, "prefill_tokens": 5, "tokens": 10, "size": 100, "timeout": 30.0, **more}
    return door.enter(Ticket(door.clients[client], **fields))


class Runner:
    """Requests that run until they are ended; `order` is the order in which they started."""

    def __init__(self, door: Admission) -> None:
        self.door = door
        self.order: list[str] = []
        self.ends: dict[str, asyncio.Event] = {}

    async def run(self, name: str, **more: Any) -> str:
        try:
            with enter(self.door, **more) as ticket:
                if ticket.state == "waiting":
                    await self.door.wait(ticket)
                self.order.append(name)
                self.ends[name] = asyncio.Event()
                await self.ends[name].wait()
        except GatewayError as error:
            return error.code
        return "ended"

    def start(self, name: str, **more: Any) -> asyncio.Task[str]:
        return asyncio.create_task(self.run(name, **more))


def empty(door: Admission) -> bool:
    return (door.requests, door.tokens, door.waiting) == (0, 0, 0) and all(
        (c.requests, c.tokens) == (0, 0) for c in door.clients.values()
    )


async def test_a_request_that_need_not_wait_makes_no_future_and_no_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    door, loop = admission(), asyncio.get_running_loop()
    made: list[str] = []
    for name in ("create_future", "call_later", "call_at", "call_soon", "create_task"):
        monkeypatch.setattr(loop, name, lambda *args, name=name: made.append(name))
    with enter(door) as ticket:
        assert (ticket.state, door.requests, door.tokens) == ("running", 1, 10)
    monkeypatch.undo()
    assert made == [] and empty(door)


async def test_waiting_requests_start_in_order_as_others_end() -> None:
    door = admission(requests=1)
    runner = Runner(door)
    tasks = [runner.start(name) for name in "abcd"]
    for number, name in enumerate("abcd"):
        await until(lambda number=number: len(runner.order) == number + 1)  # type: ignore[misc]
        assert (door.requests, door.waiting) == (1, 3 - number)
        runner.ends[name].set()
    assert await asyncio.gather(*tasks) == ["ended"] * 4
    assert runner.order == list("abcd") and empty(door)


async def test_a_client_that_leaves_while_it_waits_leaves_the_queue_at_once() -> None:
    door = admission(requests=1)
    runner = Runner(door)
    running = runner.start("a")
    await until(lambda: runner.order == ["a"])
    waiting = runner.start("b")
    await until(lambda: door.waiting == 1)
    waiting.cancel()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert door.waiting == 0
    runner.ends["a"].set()
    assert await running == "ended" and waiting.cancelled() and empty(door)


async def test_when_the_head_of_the_queue_leaves_the_next_request_may_start() -> None:
    door = admission(tokens=100)
    runner = Runner(door)
    runner.start("a", tokens=50)
    await until(lambda: runner.order == ["a"])
    head = runner.start("large", tokens=90)
    small = runner.start("small", tokens=10)
    await until(lambda: door.waiting == 2)
    head.cancel()
    await until(lambda: runner.order == ["a", "small"])
    small.cancel()
    runner.ends["a"].set()
    await until(lambda: empty(door))


async def test_a_request_that_leaves_as_it_is_let_in_releases_its_reservation() -> None:
    capacity = Slots({"m": 1})
    door = admission(capacity)
    place = None
    with enter(door) as first:
        place = capacity.reserve(first)
        waiting = Runner(door).start("b")
        await until(lambda: door.waiting == 1)
        place.release()
        door.recheck()
        await asyncio.sleep(0)  # the queue is looked through: b is let in, and its task has not run yet
        assert (door.waiting, door.requests, capacity.taken["m"]) == (0, 2, 1)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert (door.requests, capacity.taken["m"]) == (1, 0)
    assert empty(door)


async def test_capacity_that_is_reserved_for_a_request_is_given_to_no_other() -> None:
    capacity = Slots({"m": 1})
    door = admission(capacity)
    seen = []

    async def one() -> None:
        with enter(door) as ticket:
            if ticket.state == "waiting":
                await door.wait(ticket)
            assert capacity.has(ticket)
            place = capacity.reserve(ticket)
            seen.append(capacity.taken["m"])
            await asyncio.sleep(0.001)
            place.release()
            door.recheck()

    await asyncio.gather(*(one() for _ in range(20)))
    assert seen == [1] * 20 and empty(door) and capacity.taken["m"] == 0


async def test_a_request_waits_no_longer_than_its_timeout() -> None:
    door = admission(requests=1)
    runner = Runner(door)
    runner.start("a")
    await until(lambda: runner.order == ["a"])
    assert await runner.start("b", timeout=0.05) == "queue_timeout"
    assert door.waiting == 0
    runner.ends["a"].set()
    await until(lambda: empty(door))


async def test_when_the_gate_closes_waiting_requests_are_refused_and_running_ones_go_on() -> None:
    door, gate = admission(requests=1), Gate()
    gate.on_close = door.close
    runner = Runner(door)
    running = runner.start("a")
    await until(lambda: runner.order == ["a"])
    waiting = [runner.start(name) for name in "bc"]
    await until(lambda: door.waiting == 2)
    gate.draining = True
    await asyncio.sleep(0)
    assert door.waiting == 2
    gate.closed = True
    assert await asyncio.gather(*waiting) == ["draining"] * 2
    assert await runner.start("d") == "draining", "it was inside the gate and would have to wait"
    runner.ends["a"].set()
    assert await running == "ended" and empty(door)


async def test_clients_have_their_own_bounds() -> None:
    door = admission(clients=[{"name": "one", "key": "k1", "requests": 1}, {"name": "two", "key": "k2"}])
    assert set(door.clients) == {"one", "two"}
    with enter(door, "one"):
        with pytest.raises(RateLimited):
            enter(door, "one")
        with enter(door, "two"), enter(door, "two"):
            assert door.requests == 3
    assert empty(door)


async def test_refusals_are_counted_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    door = Admission(build_settings({"admission": {"requests": 1, "queue": 0}}, {}), clock=lambda: now)

    def refuse(times: int) -> None:
        for _ in range(times):
            with pytest.raises(GatewayError):
                enter(door)

    with caplog.at_level(logging.WARNING, "pd_proxy.admission"), enter(door):
        refuse(1000)
        now = 11.0
        refuse(1)
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "1 request(s) refused since the last such line, the last one as queue_full; 1 run, 0 wait",
        "1000 request(s) refused since the last such line, the last one as queue_full; 1 run, 0 wait",
    ]
