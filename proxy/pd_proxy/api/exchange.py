"""One request from its head to its end, on every route that engines serve; and the answers to errors."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from difflib import get_close_matches
from time import monotonic

from pd_proxy.admission.gate import Gate
from pd_proxy.api.arrival import Arrival, ClientLeft, introduce
from pd_proxy.api.error_shapes import ErrorShape
from pd_proxy.errors import (
    BodiesFull,
    BodyTooLarge,
    Draining,
    EncodingNotSupported,
    GatewayError,
    MethodNotAllowed,
    RequestTimedOut,
    RouteNotFound,
)
from pd_proxy.flow.request import new_id
from pd_proxy.http.content_coding import ACCEPTED
from pd_proxy.http.response import EXTENSION, AsgiResponse, ClientResponse, Receive, Scope, Send
from pd_proxy.telemetry.records import RequestRecord, Telemetry

JSON = (b"content-type", b"application/json")

log = logging.getLogger("pd_proxy.api")

_OWN_FAULT = "the gateway failed on this request; its log says more"

_NO_FAILURE = ("ok", "client_gone")

Work = Callable[[Arrival], Awaitable[None]]


async def exchange(
    gate: Gate,
    telemetry: Telemetry,
    record: RequestRecord,
    scope: Scope,
    receive: Receive,
    send: Send,
    work: Work,
    shape: ErrorShape,
) -> None:
    """Serve one request: count it, answer it even where `work` fails, and record it.

    Arguments:
        work: reads the request and answers it. It raises a `GatewayError` where the request cannot be served;
            `client.started` says whether the answer has begun.
        shape: the form of errors in the request's API.
    """
    # Removed, since the client refers to its scope: only the garbage collector would end a reference cycle.
    record.peer = scope.get("client")
    client: ClientResponse = scope.pop("extensions", {}).get(EXTENSION) or AsgiResponse(receive, send)
    task = asyncio.current_task()
    assert task is not None, "ASGI servers call applications from a task"
    try:
        gate.enter(task)
        headers: dict[bytes, bytes] = dict(scope["headers"])
        introduce(record, scope, headers)
        await work(Arrival(scope, receive, client, record, task, headers))
        record.outcome = "ok"
    except ClientLeft:
        record.outcome = "client_gone"
    except GatewayError as error:
        record.outcome = "client_gone" if client.gone else error.code
        give_error(client, record, error, shape)
    except asyncio.CancelledError:
        if client.gone:  # by `on_gone`, when its connection closed
            record.outcome = "client_gone"
            task.uncancel()
        else:
            record.outcome = Draining.code
            give_error(client, record, Draining("the gateway shut down before the answer was whole"), shape)
    except Exception:  # a fault of the gateway's own: the client gets an answer, and the log the traceback
        _give_fault(client, record, shape)
    finally:
        gate.leave(task)
        client.on_gone = None
        record.end(monotonic())
        if record.error and record.outcome in _NO_FAILURE:  # the errors of earlier tries are in `retries` and `resumes`
            record.error = ""
        telemetry.finished(record)
    await client.flushed()


def _give_fault(client: ClientResponse, record: RequestRecord, shape: ErrorShape) -> None:
    """Log the exception that is being handled, and answer with an error that shows nothing of it."""
    record.outcome = "client_gone" if client.gone else GatewayError.code
    record.request_id = record.request_id or new_id()
    log.exception("%s: the gateway failed on this request", record.request_id, extra=record.known_as)
    give_error(client, record, GatewayError(_OWN_FAULT), shape)


_MOST_COMPARED = 64  # characters of a path; the time to compare two grows with the square of their length


def no_route(path: str, known: Iterable[str], listed: str = "/openapi.json") -> RouteNotFound:
    """The error for a path that is not served here. It names the most similar paths.

    Arguments:
        known: the paths that errors may name.
        listed: the path of the list of all paths, or empty.
    """
    near = get_close_matches(path[:_MOST_COMPARED], known, n=3, cutoff=0.7)
    served = ", ".join(near or ("/v1/chat/completions", "/v1/completions", "/v1/models"))
    more = f"what else GET {listed} lists" if listed else "others"
    return RouteNotFound(f"there is no {path[:256]} here; this gateway serves {served} and {more}")


def give_error(client: ClientResponse, record: RequestRecord, error: GatewayError, shape: ErrorShape) -> None:
    """Answer with an error: as the whole answer, or as the last event of a stream that has begun."""
    said = str(error)
    # The error that ends the request may differ from the one that ended its last try.
    record.error = f"{said}; the last try: {record.error}" if record.error and record.error not in said else said
    record.request_id = record.request_id or new_id()
    if client.gone:
        return
    try:
        _give(client, record, error, shape)
    except Exception:  # the shaped answer cannot be written: answer with a plain error
        log.exception("%s: the gateway could not answer with %s", record.request_id, error.code, extra=record.known_as)
        if client.started:
            client.cut()
            return
        record.status = GatewayError.status
        client.respond(500, _headers(record), GatewayError(_OWN_FAULT).body())


def _headers(record: RequestRecord) -> list[tuple[bytes, bytes]]:
    return [JSON, (b"x-request-id", record.request_id.encode("ascii"))]


def _give(client: ClientResponse, record: RequestRecord, error: GatewayError, shape: ErrorShape) -> None:
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
        headers.append((b"connection", b"close"))  # the rest of the body is not read
    client.respond(error.status, headers, shape.body(error))
