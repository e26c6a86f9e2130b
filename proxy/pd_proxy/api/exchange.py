"""What every route with an engine behind it does alike: the way in up to its body, and how an error is answered."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Iterable
from difflib import get_close_matches
from time import monotonic
from typing import Any

from pd_proxy.admission.admission import Admission
from pd_proxy.admission.gate import Gate
from pd_proxy.admission.ticket import Ticket
from pd_proxy.api.error_shapes import OPENAI, ErrorShape
from pd_proxy.api.trace_context import trace_context
from pd_proxy.errors import (
    BodiesFull,
    BodyTooLarge,
    Draining,
    EncodingNotSupported,
    GatewayError,
    InvalidRequest,
    MethodNotAllowed,
    RequestTimedOut,
    RouteNotFound,
)
from pd_proxy.flow.request import new_id
from pd_proxy.http.content_coding import ACCEPTED, coding_of, plain
from pd_proxy.http.direct import DirectClient
from pd_proxy.http.response import EXTENSION, AsgiClient, Client, Receive, Scope, Send
from pd_proxy.telemetry.records import RequestRecord, Telemetry

JSON = (b"content-type", b"application/json")

_SECONDS = re.compile(rb"\d{1,6}(\.\d{1,3})?").fullmatch
_SANE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}").fullmatch

log = logging.getLogger("pd_proxy.api")

_OWN_FAULT = "the gateway failed on this request; its log says more"

_NO_FAILURE = ("ok", "client_gone")

Work = Callable[[Scope, Receive, Client, RequestRecord, asyncio.Task[Any]], Awaitable[None]]


class ClientLeft(Exception):
    """The client closed its connection before its request was whole."""


async def exchange(
    gate: Gate,
    telemetry: Telemetry,
    record: RequestRecord,
    scope: Scope,
    receive: Receive,
    send: Send,
    work: Work,
    shape: ErrorShape = OPENAI,
) -> None:
    """One request from its head to its end: counted, answered whatever befalls `work`, and recorded.

    Arguments:
        shape: how its API says that something failed.
    """
    # Taken out, since the client knows its scope: a circle would leave every request to the garbage collector.
    record.peer = scope.get("client")
    client: Client = scope.pop("extensions", {}).get(EXTENSION) or AsgiClient(receive, send)
    task = asyncio.current_task()
    assert task is not None, "ASGI servers call applications from a task"
    try:
        gate.enter(task)
        await work(scope, receive, client, record, task)
        record.outcome = "ok"
    except ClientLeft:
        record.outcome = "client_gone"
    except GatewayError as error:
        record.outcome = "client_gone" if client.gone else error.code
        give_error(client, record, error, shape)
    except asyncio.CancelledError:
        if client.gone:  # by our own hand, when its connection closed
            record.outcome = "client_gone"
            task.uncancel()
        else:
            record.outcome = Draining.code
            give_error(client, record, Draining("the gateway shut down before the answer was whole"), shape)
    except Exception:  # the last resort: a fault of the gateway's own, which is to be no riddle to anybody
        record.outcome = "client_gone" if client.gone else GatewayError.code
        record.request_id = record.request_id or new_id()
        log.exception("%s: the gateway failed on this request", record.request_id, extra=record.known_as)
        give_error(client, record, GatewayError(_OWN_FAULT), shape)
    finally:
        gate.leave(task)
        client.on_gone = None
        record.ended = monotonic()
        if record.error and record.outcome in _NO_FAILURE:  # why earlier tries failed is in `retries` and `resumes`
            record.error = ""
        telemetry.finished(record)
    await client.flushed()


_MOST_COMPARED = 64  # characters of a path: what it takes to compare grows with their square


def no_route(path: str, known: Iterable[str], listed: str = "/openapi.json") -> RouteNotFound:
    """The error for a path that is not served here. It names the nearest that are.

    Arguments:
        known: paths that clients may be told of.
        listed: the path at which all are listed, or empty.
    """
    near = get_close_matches(path[:_MOST_COMPARED], known, n=3, cutoff=0.7)
    served = ", ".join(near or ("/v1/chat/completions", "/v1/completions", "/v1/models"))
    more = f"what else GET {listed} lists" if listed else "others"
    return RouteNotFound(f"there is no {path[:256]} here; this gateway serves {served} and {more}")


def identify(headers: dict[bytes, bytes]) -> str:
    """The request's id: the client's own where it sent a sane one."""
    name = headers.get(b"x-request-id")
    return name.decode("latin-1") if name is not None and _SANE_ID(name) else new_id()


def introduce(record: RequestRecord, scope: Scope, headers: dict[bytes, bytes]) -> None:
    """Note by what the request is known: its id and its trace.

    Arguments:
        headers: those of the scope.
    """
    record.request_id = identify(headers)
    if b"traceparent" in headers:
        record.trace = trace_context(scope["headers"])


def time_limit(headers: dict[bytes, bytes], most: float) -> float:
    """Seconds that the request may take: `most`, or fewer where its x-request-timeout says so.

    Raises:
        InvalidRequest: that is no number of seconds.
    """
    value = headers.get(b"x-request-timeout")
    if value is None:
        return most
    seconds = float(value) if _SECONDS(value) else 0.0
    if seconds <= 0:
        raise InvalidRequest("x-request-timeout is a number of seconds above 0, such as 30 or 2.5")
    return min(most, seconds)


def check_length(headers: dict[bytes, bytes], limit: int) -> None:
    """Refuse a body that says itself that it is too long.

    Raises:
        BodyTooLarge
    """
    length = headers.get(b"content-length", b"")
    if length.isdigit() and int(length) > limit:
        raise BodyTooLarge(f"the request body of {int(length)} bytes exceeds the limit of {limit}")


async def read_whole(
    client: Client | None, receive: Receive, headers: dict[bytes, bytes], limit: int, seconds: float
) -> bytes | bytearray:
    """The request's body, without its content coding.

    Raises:
        BodyTooLarge, BodiesFull, EncodingNotSupported, InvalidRequest, RequestTimedOut, ClientLeft
    """
    coding = coding_of(headers) if b"content-encoding" in headers else ""
    body: bytes | bytearray | None = client.body if isinstance(client, DirectClient) else None
    if body is None:
        try:
            async with asyncio.timeout(seconds):
                body = await (client.gather(limit) if isinstance(client, DirectClient) else _gather(receive, limit))
        except TimeoutError:
            raise RequestTimedOut(f"the request body did not arrive within {seconds:g} s") from None
        if body is None:
            raise ClientLeft
    if len(body) > limit:
        raise BodyTooLarge(f"the request body exceeds the limit of {limit} bytes")
    if isinstance(client, AsgiClient):
        client.watch()
    return body if not coding else await plain(body, coding, limit, client)


async def _gather(receive: Receive, limit: int) -> bytearray | None:
    """As `DirectClient.gather`, from any server."""
    whole = bytearray()  # not a list: a body of single bytes would weigh fifty times its length
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        whole += message.get("body", b"")
        if len(whole) > limit or not message.get("more_body", False):
            return whole


def enter(admission: Admission, record: RequestRecord, ticket: Ticket) -> Ticket:
    """Let a request in, or into the queue (see `Admission.enter`), and note in its record which.

    Raises:
        GatewayError: it may neither start nor wait.
    """
    try:
        admission.enter(ticket)
    except GatewayError as error:
        record.refused = error.code
        raise
    record.admitted = ticket.state == "running"
    record.best_effort = ticket.best_effort
    return ticket


async def turn(admission: Admission, ticket: Ticket, record: RequestRecord) -> None:
    """Wait in the queue.

    Raises:
        GatewayError: its time ran out, or its place was lost.
    """
    try:
        await admission.wait(ticket)
        record.admitted = True
        record.best_effort = ticket.best_effort
    except GatewayError as error:
        record.refused = error.code
        raise
    finally:
        record.queued_seconds = monotonic() - ticket.arrived


def give_error(client: Client, record: RequestRecord, error: GatewayError, shape: ErrorShape) -> None:
    """Answer with an error: as the whole answer, or as the last event of one that has begun."""
    said = str(error)
    # What ended it may be another thing than what the last try failed of.
    record.error = f"{said}; the last try: {record.error}" if record.error and record.error not in said else said
    record.request_id = record.request_id or new_id()
    if client.gone:
        return
    try:
        _give(client, record, error, shape)
    except Exception:  # in place of an answer that cannot be written, one that can
        log.exception("%s: the gateway could not answer with %s", record.request_id, error.code, extra=record.known_as)
        if client.started:
            client.cut()
            return
        record.status = GatewayError.status
        client.respond(500, _headers(record), GatewayError(_OWN_FAULT).body())


def _headers(record: RequestRecord) -> list[tuple[bytes, bytes]]:
    return [JSON, (b"x-request-id", record.request_id.encode("ascii"))]


def _give(client: Client, record: RequestRecord, error: GatewayError, shape: ErrorShape) -> None:
    if client.started:
        client.write(shape.event(error, record.sequence))
        client.end()
        return
    record.status = error.status
    headers = _headers(record)
    if error.retry_after is not None:
        headers.append((b"retry-after", b"%d" % error.retry_after))
    if isinstance(error, MethodNotAllowed):
        headers.append((b"allow", error.allow.encode("ascii")))
    if isinstance(error, EncodingNotSupported):
        headers.append((b"accept-encoding", ", ".join(ACCEPTED).encode("ascii")))  # RFC 9110, section 15.5.16
    if isinstance(error, BodyTooLarge | BodiesFull | EncodingNotSupported | RequestTimedOut | Draining):
        headers.append((b"connection", b"close"))  # the rest of the body is not going to be read
    client.respond(error.status, headers, shape.body(error))
