"""The one-leg routes, as plain ASGI: no router and no middleware between a request and its flow."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from math import inf
from secrets import token_hex
from time import monotonic
from typing import Any

import msgspec

from pd_proxy.admission.admission import Admission
from pd_proxy.admission.gate import Gate
from pd_proxy.admission.ticket import Ticket
from pd_proxy.api.credentials import Credentials
from pd_proxy.api.error_shapes import ANTHROPIC, OPENAI
from pd_proxy.api.exchange import (
    ClientLeft,
    check_length,
    enter,
    exchange,
    introduce,
    no_route,
    read_whole,
    time_limit,
    turn,
)
from pd_proxy.errors import BodyTooLarge, EncodingNotSupported, MethodNotAllowed, RequestTimedOut, TotalTimedOut
from pd_proxy.fleet.fleet import Fleet
from pd_proxy.fleet.model_names import Names
from pd_proxy.flow.hops import HEADER
from pd_proxy.flow.single import ROUTES, Single, SingleRequest
from pd_proxy.http.content_coding import coding_of
from pd_proxy.http.direct import DirectClient
from pd_proxy.http.response import AsgiClient, Client, Receive, Scope, Send
from pd_proxy.requests.body import read_members, read_model
from pd_proxy.requests.form import Form
from pd_proxy.requests.output_bounds import bound_output
from pd_proxy.settings.tree import Settings
from pd_proxy.telemetry.records import RequestRecord, Telemetry

KEPT = 1024 * 1024
"""Bytes of a form that are kept so that it can be sent to another backend, and in which its model is looked for before
a backend is chosen."""

_BYTES_PER_TOKEN = 4  # of English text
_BYTES_PER_AUDIO_TOKEN = 500  # 50 tokens a second; compressed audio has 16 kB in one, plain audio 32
_USUAL_AUDIO = 64 * 1024  # bytes, of a form that does not say its length

_BATCH = "/v1/chat/completions/batch"  # the only one that generates as much as it is asked for

_encode = msgspec.json.Encoder().encode


class SingleRoute:
    """Serves one route.

    Arguments:
        paths: gives all that the gateway serves, to be told to whoever asks for what no backend here offers.
    """

    def __init__(
        self,
        path: str,
        settings: Settings,
        fleet: Fleet,
        flow: Single,
        gate: Gate,
        admission: Admission,
        credentials: Credentials,
        telemetry: Telemetry,
        paths: Callable[[], list[str]],
        names: Names,
    ) -> None:
        self._path = path
        self._route = ROUTES[path]
        self._shape = ANTHROPIC if path.startswith("/v1/messages/") else OPENAI
        self._listed = "/openapi.json" if settings.routes.docs else ""
        self._limits = settings.limits
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
        self._paths = paths
        self._names = names

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Coroutine[Any, Any, None]:
        record = RequestRecord(self._route.endpoint)
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
        if self._path not in self._fleet.routes():
            raise no_route(self._path, self._paths(), self._listed)
        if scope["method"] != "POST":
            raise MethodNotAllowed(f"{self._path} takes POST", allow="POST")
        hops = self._flow.hops.passed(headers[HEADER]) if HEADER in headers else b""
        record.client = self._credentials.check_client(
            headers.get(b"authorization", b""), headers.get(b"x-api-key", b"")
        )
        total = time_limit(headers, self._total)
        check_length(headers, self._limit)
        if self._route.form:
            if coding := coding_of(headers):
                raise EncodingNotSupported(f"a form is sent on as it comes; it may not be encoded with {coding}")
            client.on_gone = task.cancel
            form = ClientForm(
                headers.get(b"content-type", b""),
                client,
                receive,
                self._limit,
                self._body_seconds,
                self._names.aliases,
            )
            await form.until_named()
            length = headers.get(b"content-length", b"")
            size = int(length) if length.isdigit() else _USUAL_AUDIO
            request = SingleRequest(self._path, client, record, form, form.model, size // _BYTES_PER_AUDIO_TOKEN + 1)
            size = min(size, KEPT)  # what is held of it while it waits
        else:
            raw = await read_whole(client, receive, headers, self._limit, self._body_seconds)
            size = len(raw)
            members = read_members(raw)
            if self._path == _BATCH:
                bound_output(members, "chat", self._limits.default_max_tokens, self._limits.max_tokens)
            if (asked := read_model(members)) is not None:
                model = record.model = await self._named(asked, record)
                members["model"] = msgspec.Raw(_encode(model))
            else:
                model = None
            request = SingleRequest(self._path, client, record, _encode(members), model, size // _BYTES_PER_TOKEN + 1)
        request.hops = hops
        if self._route.form and request.model is not None:
            record.model = request.model
            if not self._fleet.knows(request.model):
                await self._names.known(request.model)
        if client.gone:
            raise ClientLeft
        client.on_gone = task.cancel
        ticket = Ticket(
            self._admission.clients[record.client],
            request.model,
            False,
            request.tokens,
            request.tokens,
            size,
            min(total, self._queue_timeout),
        )
        with enter(self._admission, record, ticket):
            if ticket.state == "waiting":
                await turn(self._admission, ticket, record)
            try:
                async with asyncio.timeout(None if total == inf else total - record.queued_seconds):
                    await self._flow.run(request)
            except TimeoutError:
                raise TotalTimedOut(f"the request was not finished within {total:g} s") from None

    async def _named(self, asked: str, record: RequestRecord) -> str:
        """The model that a client means.

        Raises:
            ModelNotFound: nobody has it.
        """
        record.model = asked
        model = await self._names.meant(asked) or asked
        record.alias = asked if model != asked else ""
        return model


class ClientForm:
    """A multipart form as it comes from the client, as the engine is to get it (`flow.single.Source`).

    Arguments:
        limit: bytes that it may have.
        seconds: for which the client may be waited for in all. What the engine's slowness takes does not count.
        aliases: other names of models, and the engines' own.
    """

    def __init__(
        self,
        content_type: bytes,
        client: Client,
        receive: Receive,
        limit: int,
        seconds: float,
        aliases: Mapping[str, str],
    ) -> None:
        self._form = Form(content_type, token_hex(16).encode("ascii"), aliases=aliases)
        self._client = client
        self._receive = receive
        self._limit = limit
        self._seconds = self._left = seconds
        self._taken = 0
        self._ended = False
        self.kept: bytearray | None = bytearray()

    @property
    def content_type(self) -> bytes:
        return self._form.content_type

    @property
    def model(self) -> str | None:
        return self._form.fields.get("model")

    @property
    def whole(self) -> bool:
        return self._ended

    async def until_named(self) -> None:
        """Read until the model is known, or the form is whole, or as much is here as may be kept."""
        assert self.kept is not None
        while self.model is None and not self._ended and len(self.kept) < KEPT:
            await self.more()

    async def more(self) -> bytes:
        """The next piece, which may be empty. Safe to be cancelled: what has been taken is in `kept`.

        Raises:
            BodyTooLarge, RequestTimedOut, InvalidRequest, ClientLeft, BodiesFull
        """
        asked = monotonic()
        try:
            async with asyncio.timeout(self._left):
                message = await self._receive()
        except TimeoutError:
            raise RequestTimedOut(f"the request body did not arrive within {self._seconds:g} s") from None
        self._left -= monotonic() - asked
        if message["type"] == "http.disconnect":
            raise ClientLeft
        client = self._client if isinstance(self._client, DirectClient) else None
        if client is not None and client.refusal is not None:
            raise client.refusal
        data = message.get("body", b"")
        self._taken += len(data)
        if self._taken > self._limit:
            raise BodyTooLarge(f"the request body exceeds the limit of {self._limit} bytes")
        piece = self._form.feed(data)
        if not message.get("more_body", False):
            self._form.end()
            self._ended = True
            if isinstance(self._client, AsgiClient):
                self._client.watch()
        if self.kept is not None:
            if len(self.kept) < KEPT:
                self.kept += piece
            else:
                self.kept = None
        if self.kept is None and client is not None:
            client.let_go(client.held)  # what comes from here on is sent on at once
        return piece
