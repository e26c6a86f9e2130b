"""The routes that generate, as plain ASGI: no router, middleware or dependency injection before the flow."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

from msgspec import structs

from pd_proxy.admission.ticket import Ticket
from pd_proxy.api.arrival import Arrival
from pd_proxy.api.entrance import Entrance
from pd_proxy.api.error_shapes import ERROR_SHAPES
from pd_proxy.errors import ResponseNotFound
from pd_proxy.fleet.fleet import Fleet
from pd_proxy.flow.flow import Flow
from pd_proxy.flow.placing import Placing
from pd_proxy.flow.request import Request
from pd_proxy.flow.stored_responses import StoredResponses
from pd_proxy.http.response import Receive, Scope, Send
from pd_proxy.requests.body import Body, read_body, renamed
from pd_proxy.requests.endpoints import Endpoint
from pd_proxy.requests.output_bounds import bound_output
from pd_proxy.requests.sessions import session_of
from pd_proxy.settings.tree import Settings
from pd_proxy.telemetry.records import RequestRecord

EXPLAIN = b"x-pd-proxy-explain"
"""With this header an operator asks for the placement decision in the answer. The decision names engines, so the header
is ignored without the admin key."""


class Inference:
    """Serves one endpoint.

    Arguments:
        stored: names stored responses by the backends that have them.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        settings: Settings,
        fleet: Fleet,
        flow: Flow,
        placing: Placing,
        entrance: Entrance,
        stored: StoredResponses,
    ) -> None:
        self._endpoint = endpoint
        self._shape = ERROR_SHAPES[endpoint]
        self._stored = stored
        self._default_output, self._most_output = settings.limits.default_max_tokens, settings.limits.max_tokens
        self._bounds_output = self._default_output is not None or self._most_output is not None
        self._fleet = fleet
        self._flow = flow
        self._placing = placing
        self._wants_sessions = placing.wants_sessions
        self._session_header = settings.policy.session_header.encode("ascii")
        self._has_targets = settings.admission.slo != "off"
        self._entrance = entrance
        self._renames = entrance.names.any

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Coroutine[Any, Any, None]:
        record = RequestRecord(self._endpoint)
        return self._entrance.serve(record, scope, receive, send, self._serve, self._shape)

    async def _serve(self, arrival: Arrival) -> None:
        """Read a request and answer it.

        Raises:
            GatewayError: the request cannot be served; `client.started` says whether the answer has begun.
        """
        entrance, record = self._entrance, arrival.record
        entrance.check_head(arrival)
        raw = await entrance.read_body(arrival)
        body = read_body(raw, self._endpoint)
        if self._bounds_output:
            body = bounded(body, self._default_output, self._most_output)
        asked = body.model
        record.model = asked or ""
        record.stream = body.stream
        if not body.follows if asked is None else self._renames or not self._fleet.knows(asked):
            model = await entrance.model_for(asked, record)
            if model is not None and model != asked:
                body = renamed(body, model)
        arrival.cancel_when_client_leaves()
        request = self._request(body, arrival)
        ticket = Ticket(
            client=entrance.admission.clients[record.client],
            model=body.model,
            split=self._placing.may_split(body),
            prefill_tokens=request.prefill_tokens,
            tokens=request.decode_tokens,
            size=len(raw),
            expected=self._placing.seconds_to_first_token(request) if self._has_targets else 0.0,
        )
        async with entrance.admitted(arrival, ticket):
            await self._flow.run(request)

    def _request(self, body: Body, arrival: Arrival) -> Request:
        """The request of a body and its headers.

        Raises:
            ResponseNotFound: it continues a stored response that no backend has.
        """
        headers = arrival.headers
        request = Request(body, arrival.client, arrival.record, hops=arrival.hops)
        if self._wants_sessions:
            request.session = headers.get(self._session_header, b"") or session_of(body)
        if EXPLAIN in headers:
            request.explain = headers[EXPLAIN].strip() == b"1" and self._entrance.credentials.has_admin_key(
                headers.get(b"authorization", b"")
            )
        if body.follows or body.stored:
            self._bind_to_stored(request)
        return request

    def _bind_to_stored(self, request: Request) -> None:
        """Bind a request to the backend that has the response it continues; let the id of its own answer name the
        backend that stores it.

        Raises:
            ResponseNotFound: no backend has the response.
        """
        body = request.body
        if body.stored:
            request.stored = self._stored
        if body.follows:
            request.affinity = self._stored.holder(
                body.follows, request.record.client, (backend.url for backend in self._fleet)
            )
            if not request.affinity:
                raise not_stored(body.follows, param="previous_response_id")


def bounded(body: Body, usual: int | None, most: int | None) -> Body:
    """The request with a bound on the length of its answer.

    Arguments:
        usual: tokens of the answer where the request has no bound; `limits.default_max_tokens`.
        most: the highest bound that a request may have; `limits.max_tokens`.
    Raises:
        InvalidRequest: the request's bound is higher.
    """
    applied = bound_output(body.members, body.endpoint, usual, most)
    return body if applied is None else structs.replace(body, max_tokens=applied * max(1, body.prompts))


def not_stored(response_id: str, *, param: str) -> ResponseNotFound:
    """The error for a stored response that no backend has."""
    return ResponseNotFound(f"Response with id '{response_id[:256]}' not found.", param=param)
