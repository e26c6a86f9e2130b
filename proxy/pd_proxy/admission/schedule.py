"""Decides whether and when a request may start, without a clock, a task or a socket.

Invariants:

- The requests that run never exceed a bound.
- After `admit`, no request waits while there is capacity for the next one.
- What a ticket holds is returned once.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, inf
from typing import Protocol

from pd_proxy.admission.clients import LATEST
from pd_proxy.admission.fair import FairQueue, charge, start_tag
from pd_proxy.admission.pace import Pace
from pd_proxy.admission.ticket import Reservation, Ticket
from pd_proxy.errors import DeadlineTooClose, GatewayError, QueueFull, QueueTimedOut, TargetMissed, TooManyTokens
from pd_proxy.settings.bounds import AdmissionSettings


class Capacity(Protocol):
    """The backends' capacity for further requests."""

    def has(self, ticket: Ticket) -> bool:
        """Whether a request could start now on some backends without exceeding the bound of one.

        Also true when no backend is up, since capacity is not what is missing then, and waiting would not help.
        """

    def reserve(self, ticket: Ticket) -> Reservation:
        """Reserve capacity for a request until it takes its own leases."""


class Schedule:
    """Admits, queues or refuses each request of a gateway.

    Arguments:
        capacity: the capacity of the backends; None where they have no bounds.
    Attributes:
        requests, tokens: the number of the requests that run, and the sum of their tokens.
    """

    def __init__(self, settings: AdmissionSettings, capacity: Capacity | None = None) -> None:
        self._capacity = capacity
        self._max_requests: float = settings.requests or inf
        self._max_tokens: float = settings.tokens or inf
        self._largest = min(self._max_tokens, settings.decode_tokens or inf)
        self._targets = settings.slo != "off"
        self._refuses = settings.slo == "refuse"
        self._max_waiting = settings.queue
        self._max_bytes = settings.queue_bytes
        self._queue = FairQueue()
        self._pace = Pace()
        self.requests = 0
        self.tokens = 0

    @property
    def waiting(self) -> int:
        """The number of requests in the queue."""
        return self._queue.count

    def arrive(self, ticket: Ticket) -> None:
        """Admit a new request, or put it into the queue. Afterwards the ticket's state is `running` or `waiting`.

        Raises:
            TooManyTokens, RateLimited: the request exceeds a bound of its client, or is too large for this gateway.
            QueueFull, DeadlineTooClose, TargetMissed: the request may neither start nor wait.
        """
        tokens = ticket.tokens
        if tokens > self._largest:
            raise TooManyTokens(
                f"the request counts {tokens} tokens (its prompt's, estimated, and max_tokens); this gateway takes at "
                f"most {self._largest}"
            )
        client = ticket.client
        if self._targets:
            self._set_due(ticket)
        client.enter(tokens)
        if (
            not self._queue.count
            and self.requests < self._max_requests
            and self.tokens + tokens <= self._max_tokens
            and (self._capacity is None or self._capacity.has(ticket))
        ):
            charge(ticket, start_tag(client))
            self._start(ticket, ticket.arrived)
            return
        try:
            self._enqueue(ticket)
        except GatewayError:
            client.leave(tokens, None)
            raise

    def admit(self, now: float) -> None:
        """Admit the waiting requests that may start now, in order, and call the `on_decision` of each."""
        blocked: set[str | None] = set()
        while (ticket := self._queue.first(blocked)) is not None:
            if ticket.deadline <= now:
                self.expire(ticket, now)
            elif now > ticket.due and not ticket.best_effort:
                self._miss_target(ticket, now)
            elif self._capacity is not None and not self._capacity.has(ticket):
                blocked.add(ticket.model)
            elif self.requests >= self._max_requests or self.tokens + ticket.tokens > self._max_tokens:
                return  # nor one for another model: small requests could keep this one waiting for ever
            else:
                self._pace.note_admitted(now)
                self._queue.take(ticket)
                self._note_queue(now)
                self._start(ticket, now)
                if self._capacity is not None:
                    ticket.reservation = self._capacity.reserve(ticket)
                _decide(ticket, None)

    def leave(self, ticket: Ticket, now: float) -> None:
        """End a request in any state, and return what its ticket holds."""
        state, ticket.state = ticket.state, "gone"
        if state == "running":
            self.requests -= 1
            self.tokens -= ticket.tokens
            ticket.client.leave(ticket.tokens, now - ticket.started)
            if ticket.reservation is not None:
                ticket.reservation.release()
        elif state == "waiting":
            self._queue.remove(ticket)
            self._note_queue(now)
            ticket.client.leave(ticket.tokens, None)

    def expire(self, ticket: Ticket, now: float) -> None:
        """Refuse a request that still waits at its deadline. Does nothing where it does not wait any more."""
        if ticket.state == "waiting":
            error = QueueTimedOut(
                f"the service is at its limits; the request waited {now - ticket.arrived:.1f} s and its time is up",
                retry_after=self._pace.retry_after(self._queue.count, now),
            )
            self.leave(ticket, now)
            _decide(ticket, error)

    def _set_due(self, ticket: Ticket) -> None:
        """Set when a new request has to start to meet its target. Where that time has passed, it is best effort.

        Raises:
            TargetMissed: the time has passed, and `admission.slo` is `refuse`.
        """
        ticket.due = ticket.arrived + ticket.client.target - ticket.expected
        if ticket.due < ticket.arrived:
            if self._refuses:
                raise self._target_missed(ticket, ticket.expected, ticket.arrived)
            ticket.best_effort = True

    def _miss_target(self, ticket: Ticket, now: float) -> None:
        """Refuse a waiting request that can no longer meet its target, or make it best effort."""
        if not self._refuses:
            self._queue.make_best_effort(ticket)
            return
        error = self._target_missed(ticket, now - ticket.arrived + ticket.expected, now)
        self.leave(ticket, now)
        _decide(ticket, error)

    def _target_missed(self, ticket: Ticket, seconds: float, now: float) -> TargetMissed:
        return TargetMissed(
            f"the first token is expected {seconds:.2g} s after the request came, later than its target of "
            f"{ticket.client.target:g} s",
            retry_after=max(
                self._pace.retry_after(self._queue.count, now),
                min(LATEST, ceil(seconds - ticket.client.target)),
            ),
        )

    def refuse_all(self, error: Callable[[], GatewayError], now: float) -> None:
        """Refuse all requests that wait."""
        for ticket in list(self._queue):
            self.leave(ticket, now)
            _decide(ticket, error())

    def _enqueue(self, ticket: Ticket) -> None:
        queue, now = self._queue, ticket.arrived
        last: Ticket | None = None
        count, size = queue.count + 1, queue.size + ticket.size
        if count > self._max_waiting or size > self._max_bytes:
            # A client that has filled the queue must not keep others out: the request whose turn is last is removed.
            last = queue.to_displace(ticket)
            if last is None or count - 1 > self._max_waiting or size - last.size > self._max_bytes:
                raise self._queue_full(now)
        # An empty queue takes every request, since the rate is measured only while the queue is not empty.
        wait = self._pace.seconds(queue.ahead(ticket) + 1, now) if queue.count else None
        if wait is not None and now + wait > ticket.deadline:
            raise DeadlineTooClose(
                f"the service is at its limits; the request would wait about {wait:.1f} s, longer than it may "
                f"({ticket.deadline - now:.1f} s)",
                retry_after=self._pace.retry_after(queue.count, now),
            )
        if wait is not None and now + wait > ticket.due and not ticket.best_effort:
            if self._refuses:
                raise self._target_missed(ticket, wait + ticket.expected, now)
            ticket.best_effort = True
        if last is not None:
            self.leave(last, now)
            _decide(last, self._queue_full(now))
        ticket.state = "waiting"
        queue.push(ticket)
        self._note_queue(now)

    def _start(self, ticket: Ticket, now: float) -> None:
        ticket.state = "running"
        ticket.started = now
        self.requests += 1
        self.tokens += ticket.tokens

    def _queue_full(self, now: float) -> QueueFull:
        return QueueFull(
            "the service is at its limits and so is its queue; try again later",
            retry_after=self._pace.retry_after(self._queue.count, now),
        )

    def _note_queue(self, now: float) -> None:
        self._pace.note_waiting(self._queue.count > 0, now)


def _decide(ticket: Ticket, error: GatewayError | None) -> None:
    on_decision, ticket.on_decision = ticket.on_decision, None
    if on_decision is not None:
        on_decision(error)
