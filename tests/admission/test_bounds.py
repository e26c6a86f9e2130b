"""What holds for any events in any order: bounds, order, deadlines, work, and that everything is released once."""

from __future__ import annotations

from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from pd_proxy.admission.clients import Level
from pd_proxy.admission.ticket import Ticket
from pd_proxy.errors import GatewayError

from tests.admission.helpers import Place, Slots, client, schedule, ticket

MODELS = ("m", "n")


class Overload(RuleBasedStateMachine):
    """Requests of four clients arrive, wait, start, end, leave and time out, with a clock of its own."""

    @initialize(
        requests=st.integers(1, 6),
        tokens=st.integers(20, 100),
        queue=st.integers(0, 8),
        bodies=st.integers(100, 2000),
        places=st.none() | st.tuples(st.integers(0, 3), st.integers(1, 3)),
        weight=st.floats(0.1, 10),
    )
    def begin(
        self,
        requests: int,
        tokens: int,
        queue: int,
        bodies: int,
        places: tuple[int, int] | None,
        weight: float,
    ) -> None:
        self.now = 0.0
        self.bounds = (requests, tokens, queue, bodies)
        self.slots = Slots(dict(zip(MODELS, places, strict=True))) if places else None
        self.plan = schedule(self.slots, requests=requests, tokens=tokens, queue=queue, queue_bytes=bodies)
        low, high = Level(0), Level(1)
        self.clients = [
            client("a", low, weight=weight),
            client("b", low, max_requests=3),
            client("c", high, max_tokens=40),
            client("d", high),
        ]
        self.running: dict[Ticket, Place | None] = {}
        self.waiting: list[Ticket] = []
        self.told: dict[Ticket, int] = {}

    # Events

    @rule(
        who=st.integers(0, 3),
        model=st.sampled_from(MODELS),
        tokens=st.integers(1, 110),
        size=st.integers(0, 1000),
        timeout=st.floats(0.01, 20),
    )
    def arrive(self, who: int, model: str, tokens: int, size: int, timeout: float) -> None:
        new = ticket(self.clients[who], tokens, now=self.now, timeout=timeout, model=model, size=size)
        waited = bool(self.waiting)
        try:
            self.plan.arrive(new)
        except GatewayError as error:
            assert new.state == "new"
            assert error.status in (400, 429, 503)
            assert (error.retry_after is None) == (error.status == 400)
            assert error.retry_after is None or 1 <= error.retry_after <= 60
            assert (error.status == 429) <= (who in (1, 2)), "429 is for a client's own bounds"
            return
        if new.state == "running":
            assert not waited, "nobody passes those who wait"
            self.running[new] = self.slots.reserve(new) if self.slots else None
        else:
            new.on_decision = lambda error: self.settle(new, error)
            self.waiting.append(new)
            self.plan.admit(self.now)

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 100))
    def end(self, which: int) -> None:
        gone = list(self.running)[which % len(self.running)]
        if place := self.running.pop(gone):
            place.release()
        self.give_back(gone)

    @precondition(lambda self: self.waiting)
    @rule(which=st.integers(0, 100))
    def leave_the_queue(self, which: int) -> None:
        self.give_back(self.waiting.pop(which % len(self.waiting)))

    @rule(seconds=st.floats(0.01, 15))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        for late in [t for t in self.waiting if t.deadline <= self.now]:
            self.plan.expire(late, self.now)
        self.plan.admit(self.now)

    @rule(model=st.sampled_from(MODELS), places=st.integers(0, 4))
    def a_pool_grows(self, model: str, places: int) -> None:
        if self.slots:
            self.slots.places[model] = max(places, self.slots.taken[model])
            self.plan.admit(self.now)

    def give_back(self, gone: Ticket) -> None:
        self.plan.leave(gone, self.now)
        self.plan.leave(gone, self.now)  # a second call does nothing
        self.plan.admit(self.now)

    def settle(self, one: Ticket, error: GatewayError | None) -> None:
        self.told[one] = self.told.get(one, 0) + 1
        self.waiting.remove(one)
        if error is not None:
            assert error.status == 503 and error.retry_after is not None
            return
        assert one.deadline > self.now
        rivals = [t for t in self.waiting if t.model == one.model and t.deadline > self.now]
        assert not any(t.client is one.client and t.number < one.number for t in rivals), "first come, first served"
        assert not any(t.client.level.priority > one.client.level.priority for t in rivals)
        if one.reservation is not None:  # its leases replace the reservation that was kept for it
            one.reservation.release()
            one.reservation = None
        self.running[one] = self.slots.reserve(one) if self.slots else None

    # Invariants

    @invariant()
    def no_bound_is_exceeded(self) -> None:
        requests, tokens, queue, bodies = self.bounds
        assert self.plan.requests == len(self.running) <= requests
        assert self.plan.tokens == sum(t.tokens for t in self.running) <= tokens
        assert self.plan.waiting == len(self.waiting) <= queue
        assert sum(t.size for t in self.waiting) <= bodies
        for one in self.clients:
            here = [t for t in (*self.running, *self.waiting) if t.client is one]
            assert (one.requests, one.tokens) == (len(here), sum(t.tokens for t in here))
            assert one.max_requests is None or one.requests <= one.max_requests
            assert one.max_tokens is None or one.tokens <= one.max_tokens
        if self.slots:
            for model in MODELS:
                mine = [t for t in self.running if t.model == model]
                assert self.slots.taken[model] == len(mine) <= self.slots.places[model]

    @invariant()
    def no_request_waits_while_there_is_capacity_for_the_next(self) -> None:
        requests, tokens, _, _ = self.bounds
        blocked: set[str | None] = set()
        while (following := self.plan._queue.first(blocked)) is not None:
            if self.slots and not self.slots.has(following):
                blocked.add(following.model)
                continue
            assert self.plan.requests >= requests or self.plan.tokens + following.tokens > tokens
            break

    @invariant()
    def no_request_waits_past_its_deadline_and_each_is_answered_once(self) -> None:
        assert all(t.deadline > self.now for t in self.waiting)
        assert set(self.told.values()) <= {1}

    def teardown(self) -> None:
        for gone in (*self.running, *self.waiting):
            self.plan.leave(gone, self.now)
        assert (self.plan.requests, self.plan.tokens, self.plan.waiting) == (0, 0, 0)
        assert self.plan._queue.size == 0 and not self.plan._queue._models


TestOverload = Overload.TestCase
TestOverload.settings = hypothesis_settings(
    max_examples=hypothesis_settings.default.max_examples * 3 // 2, stateful_step_count=40, deadline=None
)
