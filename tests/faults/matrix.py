"""Runs the cells, and collects the result of each."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from unittest import mock

from pd_proxy.handoff.connectors.registry import CONNECTORS
from pd_proxy.handoff.traits import Order

from tests.contract.cases import CASES, Case
from tests.faults import bed as beds
from tests.faults.bed import Bed, Heard
from tests.faults.cells import ENDPOINTS, TOKENS, Cell, WallClock, request, settings_for, strike
from tests.faults.clock import virtual_time


@dataclass(frozen=True)
class Result:
    """What came of a cell.

    Attributes:
        outcome: in the words of `expected.py`.
        left: what was still held when it should not have been; empty when all is as before.
        detail: what the client was given, for people.
    """

    outcome: str
    left: str
    detail: str


Shape = tuple[str, bool]


def _kind(cell: Cell) -> tuple[str, bool]:
    return cell.fault, cell.ahead


def run(cells: Iterable[Cell], case: Case = CASES[0]) -> dict[Cell, Result]:
    """Run cells one after the other, in virtual time, before engines that speak the connector of `case`."""
    wall = WallClock()
    with mock.patch.object(time, "time", wall), virtual_time() as runner:
        return runner.run(_run(list(cells), wall, case))


async def _run(cells: list[Cell], wall: WallClock, case: Case) -> dict[Cell, Result]:
    good = await _fault_free(case)
    results = {}
    kinds = groupby(sorted(cells, key=_kind), key=_kind)
    for (fault, ahead), group in kinds:
        waiting = list(group)[::-1]
        while waiting:  # one bed as long as it stays clean
            before = len(asyncio.all_tasks())
            async with beds.made(settings_for(fault, ahead=ahead), case) as bed:
                while waiting and not bed.dirty:
                    cell = waiting.pop()
                    results[cell] = await _one(bed, cell, good, wall, case)
            await asyncio.sleep(0.1)
            left = len(asyncio.all_tasks()) - before
            assert left <= 0, f"{left} tasks outlived the gateway and the engines"
    return results


async def _fault_free(case: Case) -> dict[Shape, Heard]:
    """The answers of a fleet to which nothing happens; all tokens are decode's. Where the connector of `case` lets the
    gateway ask for no token ids, it takes no members out."""
    good = {}
    async with beds.made({"first_token": "decode", "resume": _resume(case)}) as bed:
        for endpoint in ENDPOINTS:
            for stream in (False, True):
                bed.forget()
                good[endpoint, stream] = await bed.ask(endpoint, request(endpoint, stream))
                assert bed.legs() == Counter("PD")
    return good


def _resume(case: Case) -> str:
    return "exact" if CONNECTORS[case.name].traits.resumable else "off"


async def _one(bed: Bed, cell: Cell, good: dict[Shape, Heard], wall: WallClock, case: Case) -> Result:
    loop = asyncio.get_running_loop()
    with bed.steered():
        # Connections to the pair are open, and it has just done well.
        bed.forget()
        first = await bed.ask(cell.endpoint, {**request(cell.endpoint, False), "max_tokens": 2})
        assert first.status == 200 and not first.flaws, first
        assert await bed.until(lambda: not bed.engines_idle(), beds.SOON)
        assert [len(engine.requests) > 0 for engine in bed.engines] == [True, False, True, False], "the wrong pair"
        bed.forget()
        tasks, connections = len(asyncio.all_tasks()), bed.idle_connections()
        expired = [engine.engine.handoffs.expired for engine in bed.prefill]
        engines = [engine.engine for engine in bed.prefill]
        strikes = strike(bed, cell, wall)
        striking = None if strikes is None else asyncio.ensure_future(strikes)
        await asyncio.sleep(0)
        heard = await bed.ask(cell.endpoint, request(cell.endpoint, cell.stream))
        left = []
        if striking is not None:
            if not striking.done():
                left.append("the fault did not come about")
                striking.cancel()
            with suppress(asyncio.CancelledError):
                await striking
    began = loop.time()
    if not await bed.until(lambda: not bed.gateway_idle(), beds.SOON):
        left.append(f"gateway: {bed.gateway_idle()}")
    at_once = await bed.until(lambda: not bed.engines_idle(), beds.SOON + began - loop.time())
    if not at_once and not await bed.until(lambda: not bed.engines_idle(), beds.LEASE):
        left.append(bed.engines_idle())
    now = [
        engine.engine.handoffs.expired - before
        for engine, before, core in zip(bed.prefill, expired, engines, strict=True)
        if engine.engine is core and engine.alive
    ]
    if at_once == any(now):
        left.append(f"at once: {at_once}, leases that ended: {now}")
    legs = bed.legs()
    await bed.repair()
    if not await bed.until(lambda: len(asyncio.all_tasks()) <= tasks, beds.SOON):
        left.append(f"{len(asyncio.all_tasks())} tasks, {tasks} before")
    # One more may be kept alive where two legs went to one engine at the same time, and one where none had gone before
    # (two, where the leg that releases a hand-off is beside the next try's); and one is held to an engine that has been
    # found again, so that what is known of it can be believed.
    more = 1 + cell.ahead + (CONNECTORS[case.name].traits.order in (Order.CONCURRENT, Order.CALLED_BACK))
    if any(n > before + more for n, before in zip(bed.idle_connections(), connections, strict=True)):
        left.append(f"connections: {bed.idle_connections()}, {connections} before")
    bed.dirty = bool(left)
    words = [_verdict(heard, good[cell.endpoint, cell.stream])]
    words += [f"{legs[letter]}{letter}" for letter in "PDLR" if legs[letter]]
    words += [] if at_once else ["lease"]
    return Result(" ".join(words), "; ".join(left), f"{heard}")


def _verdict(heard: Heard, good: Heard) -> str:
    """`ok` if the client was given what it is given without a fault; the error's name if it ended in one; else what
    is wrong."""
    stream = good.dones == 1
    flaws = list(heard.flaws)
    if not heard.whole:
        flaws.append("not framed to its end")
    if heard.error:
        if heard.status == 200:
            if not (stream and good.text.startswith(heard.text) and heard.dones == 0):
                flaws.append("an error after a wrong stream")
            return "; ".join([f"error event {heard.error}", *flaws])
        return "; ".join([f"{heard.status} {heard.error}", *flaws])
    names = ("status", "pieces", "finish_reasons", "usages", "roles", "dones", "models", "members")
    both = [(name, getattr(heard, name), getattr(good, name)) for name in names]
    flaws += [f"{name}: {had} instead of {wanted}" for name, had, wanted in both if had != wanted]
    if len(heard.ids) != 1 or len(heard.created) != 1:
        flaws.append(f"{len(heard.ids)} ids, {len(heard.created)} times of creation")
    return "; ".join(flaws) or "ok"


def check_reference(good: dict[Shape, Heard]) -> None:
    """The fault-free run is worth comparing with."""
    for (endpoint, stream), heard in good.items():
        assert heard.status == 200 and heard.whole and not heard.flaws and not heard.error
        assert heard.finish_reasons == ["length"] and [usage[1] for usage in heard.usages] == [TOKENS]
        assert heard.dones == stream and heard.roles == (stream and endpoint == "chat")
