"""The checks before placement, on every route that engines serve: key, limits, model names, admission, time limit."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from math import inf
from time import monotonic
from types import TracebackType
from typing import Any

import msgspec

from pd_proxy.admission.admission import Admission
from pd_proxy.admission.gate import Gate
from pd_proxy.admission.ticket import Ticket
from pd_proxy.api.arrival import Arrival, check_length, read_whole, time_limit
from pd_proxy.api.credentials import Credentials
from pd_proxy.api.error_shapes import ErrorShape
from pd_proxy.api.exchange import Work, exchange
from pd_proxy.errors import GatewayError, MethodNotAllowed, TotalTimedOut
from pd_proxy.fleet.model_names import Names
from pd_proxy.flow.hops import HEADER, Hops
from pd_proxy.http.response import Receive, Scope, Send
from pd_proxy.telemetry.records import RequestRecord, Telemetry


@dataclass(frozen=True, slots=True)
class Entrance:
    """Everything that a request passes before it is placed. A route calls the methods in the order below.

    Attributes:
        body_limit: the largest body, in bytes.
        body_seconds: seconds in which a body must arrive.
        total: seconds that a request may take in all; infinite where there is no limit.
        queue_timeout: seconds that a request may wait in the queue.
    """

    gate: Gate
    admission: Admission
    credentials: Credentials
    names: Names
    telemetry: Telemetry
    hops: Hops
    body_limit: int
    body_seconds: float
    total: float
    queue_timeout: float

    def serve(
        self, record: RequestRecord, scope: Scope, receive: Receive, send: Send, work: Work, shape: ErrorShape
    ) -> Coroutine[Any, Any, None]:
        """Serve one request (`exchange`)."""
        return exchange(self.gate, self.telemetry, record, scope, receive, send, work, shape)

    def check_head(self, arrival: Arrival) -> None:
        """Check a request's head; set its client, its hops and its time limit.

        Raises:
            MethodNotAllowed, LoopDetected, Unauthorized, InvalidRequest, BodyTooLarge
        """
        headers = arrival.headers
        if arrival.scope["method"] != "POST":
            raise MethodNotAllowed(f"{arrival.scope['path']} takes POST", allow="POST")
        if HEADER in headers:
            arrival.hops = self.hops.passed(headers[HEADER])
        arrival.record.client = self.credentials.check_client(
            headers.get(b"authorization", b""), headers.get(b"x-api-key", b"")
        )
        arrival.seconds = time_limit(headers, self.total)
        check_length(headers, self.body_limit)

    def read_body(self, arrival: Arrival) -> Coroutine[Any, Any, bytes | bytearray]:
        """Read the request's body (`read_whole`)."""
        return read_whole(arrival.client, arrival.receive, arrival.headers, self.body_limit, self.body_seconds)

    async def model_for(self, asked: str | None, record: RequestRecord) -> str | None:
        """Translate the model name of a request into the engines' own, and note both in its record. None where the
        request names no model and needs none.

        Raises:
            InvalidRequest: it names no model, and there are several.
            ModelNotFound: no backend has the model.
        """
        model = await self.names.resolve(asked)
        if model is None or model == asked:
            return asked
        record.alias, record.model = asked or "", model
        return model

    def admitted(self, arrival: Arrival, ticket: Ticket) -> Admitted:
        """The context in which a request is served; entering it waits until the request may start."""
        ticket.timeout = min(arrival.seconds, self.queue_timeout)
        return Admitted(self.admission, arrival, ticket)


class Admitted(msgspec.Struct, eq=False):
    """The time from a request's admission to its end.

    It is a class and not an `@asynccontextmanager`, since the event loop keeps track of every asynchronous generator,
    which would be a cost of every request.
    """

    _admission: Admission
    _arrival: Arrival
    _ticket: Ticket
    _timeout: asyncio.Timeout | None = None

    async def __aenter__(self) -> None:
        """Wait until the request may start.

        Raises:
            GatewayError: it may neither start nor wait, its time in the queue ran out, or its place went to another.
        """
        ticket, record = self._ticket, self._arrival.record
        try:
            self._admission.enter(ticket)
        except GatewayError as error:
            record.refused = error.code
            raise
        record.admitted = ticket.state == "running"
        record.best_effort = ticket.best_effort
        if not record.admitted:
            try:
                await self._wait()
            except BaseException:
                ticket.leave()
                raise
        seconds = self._arrival.seconds
        if seconds != inf:
            self._timeout = asyncio.timeout(seconds - record.queued_seconds)
            await self._timeout.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the request.

        Raises:
            TotalTimedOut: the request was cancelled because its time limit ran out.
        """
        try:
            if self._timeout is not None:
                await self._timeout.__aexit__(kind, error, trace)
        except TimeoutError:  # the limit's own: one that was raised inside is not raised again here
            seconds = self._arrival.seconds
            raise TotalTimedOut(f"the request was not finished within {seconds:g} s") from None
        finally:
            self._ticket.leave()

    async def _wait(self) -> None:
        ticket, record = self._ticket, self._arrival.record
        try:
            await self._admission.wait(ticket)
            record.admitted = True
            record.best_effort = ticket.best_effort
        except GatewayError as error:
            record.refused = error.code
            raise
        finally:
            record.queued_seconds = monotonic() - ticket.arrived
