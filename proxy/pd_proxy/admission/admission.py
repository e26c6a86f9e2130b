"""Admission of requests: runs the decisions of `schedule.py` with a clock, timers and futures.

Only a request that waits has a future and a timer. One that may start at once needs neither.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from time import monotonic

from pd_proxy.admission.clients import clients
from pd_proxy.admission.schedule import Capacity, Schedule
from pd_proxy.admission.ticket import Ticket
from pd_proxy.errors import Draining, GatewayError, Unavailable
from pd_proxy.settings.tree import Settings

log = logging.getLogger("pd_proxy.admission")

_LOG_INTERVAL = 10.0  # seconds; under overload a line for each refusal would hide all other lines


class Admission:
    """Admits, queues or refuses the requests of a gateway.

    Arguments:
        capacity: the capacity of the backends; None where they have no bounds.
        clock: a monotonic clock, in seconds.
    Attributes:
        clients: the clients by name.
        on_wait: called when a request begins to wait.
    """

    def __init__(
        self, settings: Settings, capacity: Capacity | None = None, clock: Callable[[], float] = monotonic
    ) -> None:
        self.clients = clients(settings)
        self.on_wait: Callable[[], object] | None = None
        self._schedule = Schedule(settings.admission, capacity)
        self._clock = clock
        self._closed = False
        self._recheck_due = False
        self._refused = 0
        self._refusals_logged: float | None = None
        self._on_leave = self._leave  # bound once, not for each request

    @property
    def waiting(self) -> int:
        """The number of requests in the queue."""
        return self._schedule.waiting

    @property
    def requests(self) -> int:
        """The number of requests that run."""
        return self._schedule.requests

    @property
    def tokens(self) -> int:
        """The estimated tokens of the requests that run."""
        return self._schedule.tokens

    def enter(self, ticket: Ticket) -> Ticket:
        """Admit a request, or put it into the queue.

        The caller ends the ticket with `with` or with `leave`. Where the ticket's state is `waiting`, the caller must
        await `wait` next.

        Raises:
            TooManyTokens, RateLimited, QueueFull, DeadlineTooClose, TargetMissed, Draining: the request is refused.
        """
        ticket.arrived = now = self._clock()
        ticket.deadline = now + ticket.timeout
        try:
            self._schedule.arrive(ticket)
        except Unavailable as error:
            self._note_refusal(error)
            raise
        if ticket.state == "waiting":
            if self._closed:
                self._schedule.leave(ticket, now)
                raise _draining()
            self.recheck()
            if self.on_wait is not None:
                self.on_wait()
        ticket.on_leave = self._on_leave
        return ticket

    async def wait(self, ticket: Ticket) -> None:
        """Wait until a waiting ticket is admitted.

        The capacity that was reserved for the request is released when this returns, so the caller must take its leases
        before its next `await`.

        Raises:
            QueueTimedOut, QueueFull, TargetMissed, Draining: the request is refused.
        """
        loop = asyncio.get_running_loop()
        decided: asyncio.Future[None] = loop.create_future()
        ticket.on_decision = partial(self._decide, decided)
        timer = loop.call_later(max(0.0, ticket.deadline - self._clock()), self._expire, ticket)
        try:
            await decided
        finally:
            timer.cancel()
            ticket.on_decision = None
        if ticket.reservation is not None:
            ticket.reservation.release()
            ticket.reservation = None

    def recheck(self) -> None:
        """Check in the next turn of the event loop which waiting requests may start. Costs nothing while none waits.

        Called after a change that may have freed capacity.
        """
        if self._schedule.waiting and not self._recheck_due:
            self._recheck_due = True
            asyncio.get_running_loop().call_soon(self._recheck)

    def close(self) -> None:
        """Refuse the requests that wait, and from now on every request that would have to wait.

        Called when the gateway shuts down.
        """
        self._closed = True
        self._schedule.refuse_all(_draining, self._clock())

    def _recheck(self) -> None:
        self._recheck_due = False
        self._schedule.admit(self._clock())

    def _leave(self, ticket: Ticket) -> None:
        self._schedule.leave(ticket, self._clock())
        if self._schedule.waiting:
            self.recheck()

    def _expire(self, ticket: Ticket) -> None:
        self._schedule.expire(ticket, self._clock())
        self.recheck()

    def _decide(self, decided: asyncio.Future[None], error: GatewayError | None) -> None:
        if error is not None:
            self._note_refusal(error)
        if decided.done():  # cancelled: its client disconnected in the same turn of the event loop
            return
        if error is None:
            decided.set_result(None)
        else:
            decided.set_exception(error)

    def _note_refusal(self, error: GatewayError) -> None:
        """Count a refusal, and log the count at most once in `_LOG_INTERVAL`."""
        self._refused += 1
        now = self._clock()
        if self._refusals_logged is None or now - self._refusals_logged >= _LOG_INTERVAL:
            log.warning(
                "%d request(s) refused since the last such line, the last one as %s; %d run, %d wait",
                self._refused,
                error.code,
                self.requests,
                self.waiting,
            )
            self._refused = 0
            self._refusals_logged = now


def _draining() -> Draining:
    return Draining("this gateway is shutting down; try again elsewhere", retry_after=1)
