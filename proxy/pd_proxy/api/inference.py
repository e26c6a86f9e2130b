"""The routes that generate, as plain ASGI: no router, no middleware, no dependency between a request and its flow."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from math import inf
from typing import Any

from msgspec import structs

from pd_proxy.admission.admission import Admission
from pd_proxy.admission.gate import Gate
from pd_proxy.admission.ticket import Ticket
from pd_proxy.api.credentials import Credentials
from pd_proxy.api.error_shapes import ERROR_SHAPES
from pd_proxy.api.exchange import ClientLeft, check_length, enter, exchange, introduce, read_whole, time_limit, turn
from pd_proxy.errors import MethodNotAllowed, ResponseNotFound, TotalTimedOut
from pd_proxy.fleet.fleet import Fleet
from pd_proxy.fleet.model_names import Names
from pd_proxy.flow.flow import Flow
from pd_proxy.flow.hops import HEADER
from pd_proxy.flow.placing import Placing
from pd_proxy.flow.request import Request
from pd_proxy.flow.stored_responses import StoredResponses
from pd_proxy.http.response import Client, Receive, Scope, Send
from pd_proxy.requests.body import Body, read_body, renamed
from pd_proxy.requests.endpoints import Endpoint
from pd_proxy.requests.output_bounds import bound_output
from pd_proxy.requests.sessions import session_of
from pd_proxy.settings.tree import Settings
from pd_proxy.telemetry.records import RequestRecord, Telemetry

EXPLAIN = b"x-pd-proxy-explain"
"""The header by which an operator asks for the decision about a request: it names engines, so without the admin key it
is ignored."""


class Inference:
    """Serves one endpoint.

    Arguments:
        stored: names responses by who has them.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        settings: Settings,
        fleet: Fleet,
        flow: Flow,
        placing: Placing,
        gate: Gate,
        admission: Admission,
        credentials: Credentials,
        telemetry: Telemetry,
        stored: StoredResponses,
        names: Names,
    ) -> None:
        self._endpoint = endpoint
        self._shape = ERROR_SHAPES[endpoint]
        self._stored = stored
        self._limit = settings.limits.request_body
        self._body_seconds = settings.timeouts.request_body
        self._total = settings.timeouts.total or inf
        self._queue_timeout = settings.admission.queue_timeout
        self._default_output, self._most_output = settings.limits.default_max_tokens, settings.limits.max_tokens
        self._bounds_output = self._default_output is not None or self._most_output is not None
        self._fleet = fleet
        self._flow = flow
        self._placing = placing
        self._wants_sessions = placing.wants_sessions
        self._session_header = settings.policy.session_header.encode("ascii")
        self._has_targets = settings.admission.slo != "off"
        self._gate = gate
        self._admission = admission
        self._credentials = credentials
        self._telemetry = telemetry
        self._names = names
        self._renames = names.any

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Coroutine[Any, Any, None]:
        record = RequestRecord(self._endpoint)
        return exchange(self._gate, self._telemetry, record, scope, receive, send, self._serve, self._shape)

    async def _serve(
        self, scope: Scope, receive: Receive, client: Client, record: RequestRecord, task: asyncio.Task[Any]
    ) -> None:
        """From the head of a request to the end of its answer.

        Raises:
            GatewayError: the request cannot be served; `client.started` says whether a part of it was.
        """
        headers: dict[bytes, bytes] = dict(scope["headers"])
        introduce(record, scope, headers)
        if scope["method"] != "POST":
            raise MethodNotAllowed(f"{scope['path']} takes POST", allow="POST")
        hops = self._flow.hops.passed(headers[HEADER]) if HEADER in headers else b""
        record.client = self._credentials.check_client(
            headers.get(b"authorization", b""), headers.get(b"x-api-key", b"")
        )
        total = time_limit(headers, self._total)
        check_length(headers, self._limit)
        raw = await read_whole(client, receive, headers, self._limit, self._body_seconds)
        body = read_body(raw, self._endpoint)
        if self._bounds_output:
            body = bounded(body, self._default_output, self._most_output)
        record.model = body.model or ""
        record.stream = body.stream
        asked = body.model
        if not body.follows if asked is None else self._renames or not self._fleet.knows(asked):
            model = await self._names.meant(asked)
            if model is not None and model != body.model:
                record.alias, record.model = record.model, model
                body = renamed(body, model)
        if client.gone:
            raise ClientLeft
        client.on_gone = task.cancel
        request = Request(body, client, record, hops=hops)
        if self._wants_sessions:
            request.session = headers.get(self._session_header, b"") or session_of(body)
        if EXPLAIN in headers:
            request.explain = headers[EXPLAIN].strip() == b"1" and self._credentials.has_admin_key(
                headers.get(b"authorization", b"")
            )
        if body.follows or body.stored:
            self._see_to_stored(request)
        ticket = Ticket(
            self._admission.clients[record.client],
            body.model,
            self._placing.may_split(body),
            request.prefill_tokens,
            request.decode_tokens,
            len(raw),
            min(total, self._queue_timeout),
            self._placing.seconds_to_first_token(request) if self._has_targets else 0.0,
        )
        with enter(self._admission, record, ticket):
            if ticket.state == "waiting":
                await turn(self._admission, ticket, record)
            if total == inf:
                await self._flow.run(request)
                return
            try:
                async with asyncio.timeout(total - record.queued_seconds):
                    await self._flow.run(request)
            except TimeoutError:
                raise TotalTimedOut(f"the request was not finished within {total:g} s") from None

    def _see_to_stored(self, request: Request) -> None:
        """Send a request to the backend that has what it goes on from, and have its answer's name say who has that.

        Raises:
            ResponseNotFound: nobody has it.
        """
        body = request.body
        if body.stored:
            request.stored = self._stored
        if body.follows:
            request.pinned = self._stored.holder(
                body.follows, request.record.client, (backend.url for backend in self._fleet)
            )
            if not request.pinned:
                raise not_stored(body.follows, param="previous_response_id")


def bounded(body: Body, usual: int | None, most: int | None) -> Body:
    """A request whose answer is as long as may be.

    Arguments:
        usual: tokens of an answer whose request does not say; `limits.default_max_tokens`.
        most: tokens of any; `limits.max_tokens`.
    Raises:
        InvalidRequest: it asks for more.
    """
    applied = bound_output(body.members, body.endpoint, usual, most)
    return body if applied is None else structs.replace(body, max_tokens=applied * max(1, body.prompts))


def not_stored(response_id: str, *, param: str) -> ResponseNotFound:
    """The error for a stored response that nobody has."""
    return ResponseNotFound(f"Response with id '{response_id[:256]}' not found.", param=param)
