"""Whether and when a request may start: the decisions, without a clock, a task or a socket.

Invariants: what runs never exceeds a bound; no request waits while there is capacity for the next one (once `admit` has
been called); what a ticket has is returned once.
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
        """Whether a request could start on some backends now without putting one above its bound. Also true when no
        backend is up: then capacity is not what is missing, and waiting would not help."""

    def reserve(self, ticket: Ticket) -> Reservation:
        """Keep capacity for a request, until it takes its own leases."""


class Schedule:
    """Decides for every request of a gateway.

    Arguments:
        capacity: of the backends; None where they have no bounds.
    Attributes:
        requests, tokens: what runs.
    """

    def __init__(self, settings: AdmissionSettings, capacity: Capacity | None = None) -> None:
        self._capacity = capacity
        self._most_requests: float = settings.requests or inf
        self._most_tokens: float = settings.tokens or inf
        self._largest = min(self._most_tokens, settings.decode_tokens or inf)
        self._targets = settings.slo != "off"
        self._refuses = settings.slo == "refuse"
        self._most_waiting = settings.queue
        self._most_bytes = settings.queue_bytes
        self._queue = FairQueue()
        self._pace = Pace()
        self.requests = 0
        self.tokens = 0

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return self._queue.count

    def arrive(self, ticket: Ticket) -> None:
        """Let a new request in, or put it into the queue; its state says which.

        Raises:
            TooManyTokens, RateLimited: by its client's bounds, or by its size.
            QueueFull, DeadlineTooClose, TargetMissed: it may neither start nor wait.
        """
        tokens = ticket.tokens
        if tokens > self._largest:
            raise TooManyTokens(
                f"the request counts {tokens} tokens (its prompt's, estimated, and max_tokens); this gateway takes at "
                f"most {self._largest}"
            )
        client = ticket.client
        if self._targets:
            self._see_to_target(ticket)
        client.enter(tokens)
        if (
            not self._queue.count
            and self.requests < self._most_requests
            and self.tokens + tokens <= self._most_tokens
            and (self._capacity is None or self._capacity.has(ticket))
        ):
            charge(ticket, start_tag(client))
            self._start(ticket, ticket.arrived)
            return
        try:
            self._wait(ticket)
        except GatewayError:
            client.leave(tokens, None)
            raise

    def admit(self, now: float) -> None:
        """Let in the requests that may start now, in order, and call the `on_decision` of each."""
        blocked: set[str | None] = set()
        while (ticket := self._queue.first(blocked)) is not None:
            if ticket.deadline <= now:
                self.expire(ticket, now)
            elif now > ticket.due and not ticket.best_effort:
                self._miss(ticket, now)
            elif self._capacity is not None and not self._capacity.has(ticket):
                blocked.add(ticket.model)
            elif self.requests >= self._most_requests or self.tokens + ticket.tokens > self._most_tokens:
                return  # not the next lane either: small requests would take for ever what this one waits for
            else:
                self._pace.let_in(now)
                self._queue.take(ticket)
                self._note_queue(now)
                self._start(ticket, now)
                if self._capacity is not None:
                    ticket.reservation = self._capacity.reserve(ticket)
                _decide(ticket, None)

    def leave(self, ticket: Ticket, now: float) -> None:
        """A request ends, in whatever state it is."""
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
        """A waiting request's deadline has come."""
        if ticket.state == "waiting":
            error = QueueTimedOut(
                f"the service is at its limits; the request waited {now - ticket.arrived:.1f} s and its time is up",
                retry_after=self._pace.retry_after(self._queue.count, now),
            )
            self.leave(ticket, now)
            _decide(ticket, error)

    def _see_to_target(self, ticket: Ticket) -> None:
        """Note when a new request has to start, and that it is best effort where that has passed.

        Raises:
            TargetMissed: it has, and such a request is refused.
        """
        ticket.due = ticket.arrived + ticket.client.target - ticket.expected
        if ticket.due < ticket.arrived:
            if self._refuses:
                raise self._missed(ticket, ticket.expected, ticket.arrived)
            ticket.best_effort = True

    def _miss(self, ticket: Ticket, now: float) -> None:
        """A request that waits can no longer meet its target."""
        if not self._refuses:
            self._queue.put_behind(ticket)
            return
        error = self._missed(ticket, now - ticket.arrived + ticket.expected, now)
        self.leave(ticket, now)
        _decide(ticket, error)

    def _missed(self, ticket: Ticket, seconds: float, now: float) -> TargetMissed:
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

    def _wait(self, ticket: Ticket) -> None:
        queue, now = self._queue, ticket.arrived
        last: Ticket | None = None
        count, size = queue.count + 1, queue.size + ticket.size
        if count > self._most_waiting or size > self._most_bytes:
            # A client that fills the queue's end must not keep others out of it: the last in turn gives way.
            last = queue.gives_way(ticket)
            if last is None or count - 1 > self._most_waiting or size - last.size > self._most_bytes:
                raise self._full(now)
        # An empty queue always takes a request: the rate is measured only while there is one.
        wait = self._pace.seconds(queue.ahead(ticket) + 1, now) if queue.count else None
        if wait is not None and now + wait > ticket.deadline:
            raise DeadlineTooClose(
                f"the service is at its limits; the request would wait about {wait:.1f} s, longer than it may "
                f"({ticket.deadline - now:.1f} s)",
                retry_after=self._pace.retry_after(queue.count, now),
            )
        if wait is not None and now + wait > ticket.due and not ticket.best_effort:
            if self._refuses:
                raise self._missed(ticket, wait + ticket.expected, now)
            ticket.best_effort = True
        if last is not None:
            self.leave(last, now)
            _decide(last, self._full(now))
        ticket.state = "waiting"
        queue.push(ticket)
        self._note_queue(now)

    def _start(self, ticket: Ticket, now: float) -> None:
        ticket.state = "running"
        ticket.started = now
        self.requests += 1
        self.tokens += ticket.tokens

    def _full(self, now: float) -> QueueFull:
        return QueueFull(
            "the service is at its limits and so is its queue; try again later",
            retry_after=self._pace.retry_after(self._queue.count, now),
        )

    def _note_queue(self, now: float) -> None:
        self._pace.waiting(self._queue.count > 0, now)


def _decide(ticket: Ticket, error: GatewayError | None) -> None:
    on_decision, ticket.on_decision = ticket.on_decision, None
    if on_decision is not None:
        on_decision(error)
