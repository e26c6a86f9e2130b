"""Admission as requests meet it: the schedule's decisions, with a clock, timers and futures.

A request that may start at once costs neither. Only one that waits has a future and a timer.
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

_LOG_INTERVAL = 10.0  # seconds; a line for each refusal would bury the log just when it is needed


class Admission:
    """The bounds, the queue and the clients of a gateway.

    Arguments:
        room: what the backends have room for; None where they have no bounds.
        clock: seconds, never going back.
    Attributes:
        clients: by name.
        on_wait: called when a request begins to wait.
    """

    def __init__(
        self, settings: Settings, room: Capacity | None = None, clock: Callable[[], float] = monotonic
    ) -> None:
        self.clients = clients(settings)
        self.on_wait: Callable[[], object] | None = None
        self._schedule = Schedule(settings.admission, room)
        self._clock = clock
        self._closed = False
        self._looking = False
        self._refused = 0
        self._refusals_said: float | None = None
        self._give_back = self._leave

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return self._schedule.waiting

    @property
    def requests(self) -> int:
        """Requests that run."""
        return self._schedule.requests

    @property
    def tokens(self) -> int:
        """Their tokens, estimated."""
        return self._schedule.tokens

    def enter(
        self,
        client: str,
        model: str | None,
        *,
        split: bool,
        prefill_tokens: int,
        tokens: int,
        size: int,
        patience: float,
        expected: float = 0.0,
    ) -> Ticket:
        """A request's ticket, to be left by `with`. When its state is `waiting`, `turn` must be awaited next.

        Arguments: as of `Ticket`; client: its name; patience: seconds until its deadline.
        Raises:
            TooManyTokens, RateLimited, QueueFull, DeadlineTooClose, TargetMissed, Draining: it is refused.
        """
        now = self._clock()
        ticket = Ticket(self.clients[client], model, split, prefill_tokens, tokens, size, now, now + patience, expected)
        try:
            self._schedule.arrive(ticket)
        except Unavailable as error:
            self._note_refusal(error)
            raise
        if ticket.state == "waiting":
            if self._closed:
                self._schedule.leave(ticket, now)
                raise _draining()
            self.look()
            if self.on_wait is not None:
                self.on_wait()
        ticket.on_leave = self._give_back
        return ticket

    async def turn(self, ticket: Ticket) -> None:
        """Wait until a waiting ticket is let in. What the caller does next, up to its first `await`, sees the room
        that was kept for it.

        Raises:
            QueueTimedOut, QueueFull, TargetMissed, Draining: it will not be.
        """
        loop = asyncio.get_running_loop()
        told: asyncio.Future[None] = loop.create_future()
        ticket.settle = partial(self._settle, told)
        timer = loop.call_later(max(0.0, ticket.deadline - self._clock()), self._expire, ticket)
        try:
            await told
        finally:
            timer.cancel()
            ticket.settle = None
        if ticket.claim is not None:
            ticket.claim.release()
            ticket.claim = None

    def look(self) -> None:
        """See soon who may start: something has changed. Costs nothing while nobody waits."""
        if self._schedule.waiting and not self._looking:
            self._looking = True
            asyncio.get_running_loop().call_soon(self._look)

    def close(self) -> None:
        """Nobody may wait any more; those who do are told that the gateway leaves."""
        self._closed = True
        self._schedule.refuse_all(_draining, self._clock())

    def _look(self) -> None:
        self._looking = False
        self._schedule.admit(self._clock())

    def _leave(self, ticket: Ticket) -> None:
        self._schedule.leave(ticket, self._clock())
        if self._schedule.waiting:
            self.look()

    def _expire(self, ticket: Ticket) -> None:
        self._schedule.expire(ticket, self._clock())
        self.look()

    def _settle(self, told: asyncio.Future[None], error: GatewayError | None) -> None:
        if error is not None:
            self._note_refusal(error)
        if told.done():  # its client has left in this very moment
            return
        if error is None:
            told.set_result(None)
        else:
            told.set_exception(error)

    def _note_refusal(self, error: GatewayError) -> None:
        """Say that requests are refused, now and then."""
        self._refused += 1
        now = self._clock()
        if self._refusals_said is None or now - self._refusals_said >= _LOG_INTERVAL:
            log.warning(
                "%d request(s) refused since the last such line, the last one as %s; %d run, %d wait",
                self._refused,
                error.code,
                self.requests,
                self.waiting,
            )
            self._refused = 0
            self._refusals_said = now


def _draining() -> Draining:
    return Draining("this gateway is shutting down; try again elsewhere", retry_after=1)
