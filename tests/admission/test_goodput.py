"""Goodput under overload over time, exactly: requests, slots and the clock are all simulated."""

from __future__ import annotations

import heapq
import itertools
from random import Random

import pytest
from pd_proxy.admission.clients import Level
from pd_proxy.admission.ticket import Ticket
from pd_proxy.errors import GatewayError, Unavailable

from tests.admission.helpers import client, schedule, ticket

SLOTS = 20
MEAN = 2.0  # seconds that a request runs
CAPACITY = SLOTS / MEAN
TIMEOUT = 10.0
SECONDS = 300.0
RAMP = 60.0


class Service:
    """Requests that arrive at random at a multiple of what `SLOTS` slots can serve, and run as long as their tokens
    say.

    Attributes:
        busy: slot-seconds of work done after the ramp.
        waits: seconds that admitted requests had waited.
        early, late: refusals on arrival, and out of the queue.
    """

    def __init__(self, load: float, *, heavy_tail: bool, seed: int) -> None:
        self.random = Random(seed)
        self.plan = schedule(requests=SLOTS, queue=10_000)
        self.events: list[tuple[float, int, Ticket | None]] = []
        self.numbers = itertools.count()
        self.heavy_tail = heavy_tail
        self.load = load
        self.client = client("a", Level(0))
        self.busy = 0.0
        self.most_waiting = 0
        self.waits: list[float] = []
        self.early, self.late = 0, 0

    def seconds(self) -> float:
        """How long a request runs: all the same time, or one in a hundred for a minute and the others briefly."""
        if not self.heavy_tail:
            return self.random.uniform(0.5 * MEAN, 1.5 * MEAN)
        return 60.0 if self.random.random() < 0.01 else (MEAN - 0.6) / 0.99

    def run(self) -> None:
        at = 0.0
        self.at(0.0, None)
        while self.events:
            now, _, ended = heapq.heappop(self.events)
            if ended is not None:
                self.plan.leave(ended, now)
                self.plan.admit(now)
                continue
            if now > SECONDS:
                continue
            at = now + self.random.expovariate(self.load * CAPACITY)
            self.at(at, None)
            self.arrive(now)

    def at(self, when: float, ticket: Ticket | None) -> None:
        heapq.heappush(self.events, (when, next(self.numbers), ticket))

    def arrive(self, now: float) -> None:
        new = ticket(self.client, now=now, timeout=TIMEOUT)
        new.on_decision = lambda error: self.settled(new, error)
        try:
            self.plan.arrive(new)
        except Unavailable:
            self.early += 1
        if new.state == "running":
            self.begin(new)
        self.most_waiting = max(self.most_waiting, self.plan.waiting)

    def settled(self, one: Ticket, error: GatewayError | None) -> None:
        if error is None:
            self.begin(one)
        else:
            self.late += 1

    def begin(self, one: Ticket) -> None:
        end = one.started + self.seconds()
        self.at(end, one)
        self.waits.append(one.started - one.arrived)
        self.busy += max(0.0, min(end, SECONDS) - max(one.started, RAMP))


@pytest.mark.parametrize("heavy_tail", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_at_five_times_capacity_every_slot_is_busy_and_most_refusals_come_on_arrival(
    seed: int, heavy_tail: bool
) -> None:
    service = Service(5.0, heavy_tail=heavy_tail, seed=seed)
    service.run()
    assert service.busy >= 0.99 * SLOTS * (SECONDS - RAMP)
    assert max(service.waits) < TIMEOUT
    # The queue is as long as the timeout allows, and no longer.
    assert service.most_waiting < 6 * TIMEOUT * CAPACITY
    assert service.late < 0.1 * service.early
    assert (service.plan.requests, service.plan.waiting) == (0, 0)


def test_below_capacity_no_request_is_refused() -> None:
    service = Service(0.8, heavy_tail=False, seed=1)
    service.run()
    assert (service.early, service.late) == (0, 0)
