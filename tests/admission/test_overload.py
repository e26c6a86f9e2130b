"""Overload at five times capacity: goodput stays, memory is bounded, and refusals come early.

The engines' step time dominates: a slot serves a request in about a second, and the load is a few per cent of what the
gateway can relay. Goodput is counted in tokens for each step of the decode engine, of answers that clients received
whole (every admitted request ends well here), and waits are measured by a clock that does not run while the whole
machine stalls. So neither depends on other load on this machine. `test_goodput.py` tests the same over time, exactly.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import Counter
from dataclasses import dataclass, field
from time import monotonic

import pytest
from pd_proxy_simulator import Simulator

from tests.support import Running, chat, pools, until

CHAT = "/v1/chat/completions"
SLOTS = 8
STEP = 0.04
LENGTHS = (18, 24, 30, 21, 27)  # tokens; mixed, so that slots do not become free in step
CAPACITY = SLOTS / STEP / (sum(LENGTHS) / len(LENGTHS))  # requests a second
TIMEOUT = 2.5  # seconds that a client waits in the queue
QUEUE = 24
STEPS = 100  # of each measurement
RAMP = 25  # steps before it
LATE = 0.5  # seconds by which this machine may delay an answer


class Clock:
    """Seconds in which this process was running: a longer stall counts as 10 ms."""

    def __init__(self) -> None:
        self.now = 0.0

    async def run(self) -> None:
        while True:
            before = monotonic()
            await asyncio.sleep(0.002)
            self.now += min(monotonic() - before, 0.01)


@dataclass
class Seen:
    """What clients received.

    Attributes:
        refused: seconds until each refusal.
    """

    clock: Clock
    served: int = 0
    refused: list[float] = field(default_factory=list)
    codes: Counter[str] = field(default_factory=Counter)
    retry_after: set[int] = field(default_factory=set)


async def ask(running: Running, seen: Seen, length: int) -> None:
    """One request on a connection of its own, by a client that needs little CPU time."""
    before = seen.clock.now
    body = json.dumps(chat(max_tokens=length, ignore_eos=True)).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
    writer.write(b"POST %b HTTP/1.1\r\nhost: x\r\nconnection: close\r\n" % CHAT.encode())
    writer.write(b"content-length: %d\r\n\r\n%b" % (len(body), body))
    head, _, answer = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    status = int(head.split()[1])
    parsed = json.loads(answer)
    if status == 200:
        assert parsed["usage"]["completion_tokens"] == length
        seen.served += 1
        return
    assert status == 503, head
    seen.refused.append(seen.clock.now - before)
    seen.codes[parsed["error"]["code"]] += 1
    [retry_after] = [line for line in head.lower().splitlines() if line.startswith(b"retry-after:")]
    seen.retry_after.add(int(retry_after.partition(b":")[2]))


async def goodput(decode: Simulator) -> float:
    """Tokens for each step over `STEPS`, after a ramp."""
    stats, first = decode.engine.stats, decode.engine.stats.steps + RAMP
    await until(lambda: stats.steps >= first, TIMEOUT * 10)
    steps, tokens = stats.steps, stats.generation_tokens
    await until(lambda: stats.steps >= first + STEPS, TIMEOUT * 10)
    return (stats.generation_tokens - tokens) / (stats.steps - steps)


async def peak(running: Running, decode: Simulator, clock: Clock) -> float:
    """Goodput with every slot full and no other request."""
    seen, lengths = Seen(clock), itertools.cycle(LENGTHS)
    measured = asyncio.create_task(goodput(decode))

    async def worker() -> None:
        while not measured.done():
            await ask(running, seen, next(lengths))

    await asyncio.gather(*(worker() for _ in range(SLOTS)))
    assert not seen.refused
    return await measured


@pytest.mark.slow
async def test_at_five_times_capacity_goodput_stays_and_refusals_are_early_and_their_retry_after_is_right() -> None:
    bounds = {"decode_requests": SLOTS, "queue": QUEUE, "queue_timeout": TIMEOUT}
    engine = {"step_time": STEP, "max_num_seqs": 4 * SLOTS}
    async with pools(1, 1, engine=engine, admission=bounds) as (running, _, [decode]):
        door, [backend] = running.gateway.admission, running.gateway.fleet.pool("decode")
        clock = Clock()
        ticking = asyncio.create_task(clock.run())
        best = await peak(running, decode, clock)
        seen, lengths, most = Seen(clock), itertools.cycle(LENGTHS), Counter[str]()
        tasks: list[asyncio.Task[None]] = []
        measured = asyncio.create_task(goodput(decode))
        begin = monotonic()
        while not measured.done():
            await asyncio.sleep(max(0.0, begin + len(tasks) / (5 * CAPACITY) - monotonic()))
            tasks.append(asyncio.create_task(ask(running, seen, next(lengths))))
            most |= {"waiting": door.waiting, "running": door.requests, "decode": backend.inflight_requests}
        await asyncio.gather(*tasks)
        await until(running.idle)

        assert await measured >= 0.9 * best
        assert len(seen.refused) > 0.5 * len(tasks), "at five times capacity four of five cannot be served"
        assert seen.codes.keys() <= {"queue_full", "deadline_too_close", "queue_timeout"}
        assert seen.retry_after <= set(range(1, 61))
        assert max(seen.refused) < TIMEOUT + LATE, "nobody waits past its deadline"
        early = [seconds for seconds in seen.refused if seconds < LATE]
        assert len(early) > 0.5 * len(seen.refused), "who cannot make it is told so at once"
        # What the gateway holds is bounded by its settings while the load lasts, and released afterwards.
        assert most["waiting"] <= QUEUE and most["running"] <= SLOTS and most["decode"] <= SLOTS
        assert (door.requests, door.tokens, door.waiting) == (0, 0, 0)
        metrics = await running.metrics()
        assert sum(v for name, v in metrics.items() if name.startswith("pd_proxy_refused_total")) == len(seen.refused)
        assert decode.engine.stats.aborted == 0
        ticking.cancel()
