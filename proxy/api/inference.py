"""The two hot routes, as plain ASGI: no router, no middleware, no dependency between a request and its flow."""

from __future__ import annotations

import asyncio
import re
from math import inf
from time import monotonic
from typing import Any

from proxy.admission.admission import Admission
from proxy.admission.gate import Gate
from proxy.admission.ticket import Ticket
from proxy.api.credentials import Credentials
from proxy.errors import (
    BodyTooLarge,
    Draining,
    GatewayError,
    InvalidRequest,
    MethodNotAllowed,
    ModelNotFound,
    RequestTimedOut,
    TotalTimedOut,
)
from proxy.fleet.fleet import Fleet
from proxy.flow.flow import Flow
from proxy.flow.request import Request, new_id
from proxy.handoff.body import Endpoint, read_body
from proxy.relay.client import EXTENSION, AsgiClient, Client, Receive, Scope, Send
from proxy.relay.direct import DirectClient
from proxy.settings import Settings
from proxy.telemetry.records import RequestRecord, Telemetry

_JSON = (b"content-type", b"application/json")
_SECONDS = re.compile(rb"\d{1,6}(\.\d{1,3})?").fullmatch
_SANE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}").fullmatch


class ClientLeft(Exception):
    """The client closed its connection before its request was whole."""


class Inference:
    """Serves one endpoint."""

    def __init__(
        self,
        endpoint: Endpoint,
        settings: Settings,
        fleet: Fleet,
        flow: Flow,
        gate: Gate,
        admission: Admission,
        credentials: Credentials,
        telemetry: Telemetry,
    ) -> None:
        self._endpoint = endpoint
        self._limit = settings.limits.request_body
        self._body_seconds = settings.timeouts.request_body
        self._total = settings.timeouts.total or inf
        self._queue_timeout = settings.admission.queue_timeout
        self._fleet = fleet
        self._flow = flow
        self._gate = gate
        self._admission = admission
        self._credentials = credentials
        self._telemetry = telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        record = RequestRecord(self._endpoint)
        # Taken out, since the client knows its scope: a circle would leave every request to the garbage collector.
        client: Client = scope.pop("extensions", {}).get(EXTENSION) or AsgiClient(receive, send)
        task = asyncio.current_task()
        assert task is not None, "ASGI servers call applications from a task"
        try:
            self._gate.enter(task)
            await self._serve(scope, receive, client, record, task)
            record.outcome = "ok"
        except ClientLeft:
            record.outcome = "client_gone"
        except GatewayError as error:
            record.outcome = "client_gone" if client.gone else error.code
            self._give_error(client, record, error)
        except asyncio.CancelledError:
            if client.gone:  # by our own hand, when its connection closed
                record.outcome = "client_gone"
                task.uncancel()
            else:
                record.outcome = Draining.code
                self._give_error(client, record, Draining("the gateway shut down before the answer was whole"))
        finally:
            self._gate.leave(task)
            client.on_gone = None
            record.ended = monotonic()
            self._telemetry.finished(record)
        await client.flushed()

    async def _serve(
        self, scope: Scope, receive: Receive, client: Client, record: RequestRecord, task: asyncio.Task[Any]
    ) -> None:
        """From the head of a request to the end of its answer.

        Raises:
            GatewayError: the request cannot be served; `client.started` says whether a part of it was.
        """
        headers: dict[bytes, bytes] = dict(scope["headers"])
        name = headers.get(b"x-request-id", b"")
        record.request_id = name.decode("ascii") if name and _SANE_ID(name) else new_id()
        if scope["method"] != "POST":
            raise MethodNotAllowed(f"{scope['path']} takes POST", allow="POST")
        record.client = self._credentials.check_client(headers.get(b"authorization", b""))
        timeout = headers.get(b"x-request-timeout")
        total = min(self._total, _seconds(timeout)) if timeout is not None else self._total
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > self._limit:
            raise BodyTooLarge(f"the request body of {int(length)} bytes exceeds the limit of {self._limit}")
        raw = await self._read(client, receive)
        body = read_body(raw, self._endpoint)
        record.model = body.model or ""
        record.stream = body.stream
        if body.model is not None and not self._fleet.knows(body.model):
            raise ModelNotFound(f"The model `{body.model[:256]}` does not exist.", param="model")
        if client.gone:
            raise ClientLeft
        client.on_gone = task.cancel
        request = Request(body, client, record)
        with self._admit(request, len(raw), total) as ticket:
            if ticket.state == "waiting":
                await self._turn(ticket, record)
            if total == inf:
                await self._flow.run(request)
                return
            try:
                async with asyncio.timeout(total - record.queued_seconds):
                    await self._flow.run(request)
            except TimeoutError:
                raise TotalTimedOut(f"the request was not finished within {total:g} s") from None

    def _admit(self, request: Request, size: int, total: float) -> Ticket:
        """A ticket for a request of `size` bytes that may take `total` seconds.

        Raises:
            GatewayError: it may neither start nor wait.
        """
        body, record = request.body, request.record
        try:
            ticket = self._admission.enter(
                record.client,
                body.model,
                split=not body.alone,
                prefill_tokens=request.prefill_tokens,
                tokens=request.decode_tokens,
                size=size,
                patience=min(total, self._queue_timeout),
            )
        except GatewayError as error:
            record.refused = error.code
            raise
        record.admitted = ticket.state == "running"
        return ticket

    async def _turn(self, ticket: Ticket, record: RequestRecord) -> None:
        """Wait in the queue.

        Raises:
            GatewayError: its time ran out, or its place was lost.
        """
        try:
            await self._admission.turn(ticket)
            record.admitted = True
        except GatewayError as error:
            record.refused = error.code
            raise
        finally:
            record.queued_seconds = monotonic() - ticket.arrived

    async def _read(self, client: Client, receive: Receive) -> bytes | bytearray:
        """The request's body.

        Raises:
            BodyTooLarge, RequestTimedOut, ClientLeft
        """
        if isinstance(client, DirectClient) and (body := client.body) is not None:
            if len(body) > self._limit:
                raise BodyTooLarge(f"the request body exceeds the limit of {self._limit} bytes")
            return body
        whole = bytearray()  # not a list: a body of single bytes would weigh fifty times its length
        try:
            async with asyncio.timeout(self._body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientLeft
                    whole += message.get("body", b"")
                    if len(whole) > self._limit:
                        raise BodyTooLarge(f"the request body exceeds the limit of {self._limit} bytes")
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            raise RequestTimedOut(f"the request body did not arrive within {self._body_seconds:g} s") from None
        if isinstance(client, AsgiClient):
            client.watch()
        return whole

    def _give_error(self, client: Client, record: RequestRecord, error: GatewayError) -> None:
        record.error = record.error or str(error)
        if client.gone:
            return
        if client.started:
            client.write(error.event())
            client.end()
            return
        record.status = error.status
        headers = [_JSON, (b"x-request-id", record.request_id.encode("ascii"))]
        if error.retry_after is not None:
            headers.append((b"retry-after", b"%d" % error.retry_after))
        if isinstance(error, MethodNotAllowed):
            headers.append((b"allow", error.allow.encode("ascii")))
        if isinstance(error, BodyTooLarge | RequestTimedOut | Draining):
            headers.append((b"connection", b"close"))  # the rest of the body is not going to be read
        client.respond(error.status, headers, error.body())


def _seconds(value: bytes) -> float:
    """The value of x-request-timeout.

    Raises:
        InvalidRequest: it is none.
    """
    seconds = float(value) if _SECONDS(value) else 0.0
    if seconds <= 0:
        raise InvalidRequest("x-request-timeout is a number of seconds above 0, such as 30 or 2.5")
    return seconds
