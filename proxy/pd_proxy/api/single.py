"""The one-leg routes, as plain ASGI: no router or middleware before the flow."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from secrets import token_hex
from time import monotonic
from typing import Any

import msgspec

from pd_proxy.admission.ticket import Ticket
from pd_proxy.api.arrival import Arrival, ClientLeft
from pd_proxy.api.entrance import Entrance
from pd_proxy.api.error_shapes import ANTHROPIC, OPENAI
from pd_proxy.api.exchange import no_route
from pd_proxy.encoding import encode_json
from pd_proxy.errors import BodyTooLarge, EncodingNotSupported, RequestTimedOut
from pd_proxy.fleet.fleet import Fleet
from pd_proxy.flow.single import Single
from pd_proxy.flow.single_request import ROUTES, SingleRequest
from pd_proxy.http.content_coding import coding_of
from pd_proxy.http.response import AsgiResponse, Receive, Scope, Send
from pd_proxy.http.server_exchange import ServerExchange
from pd_proxy.requests.body import read_model
from pd_proxy.requests.form import Form
from pd_proxy.requests.members import read_members
from pd_proxy.requests.output_bounds import bound_output
from pd_proxy.settings.tree import Settings
from pd_proxy.telemetry.records import RequestRecord

KEPT = 1024 * 1024
"""Bytes of a form that are kept, so that it can be sent to another backend. The form's model has to stand in them to be
known before a backend is chosen."""

_BYTES_PER_TOKEN = 4  # of English text
_BYTES_PER_AUDIO_TOKEN = 500  # 50 tokens a second; compressed audio has 16 kB in one, plain audio 32
_USUAL_AUDIO = 64 * 1024  # bytes; the estimate for a form without Content-Length

_BATCH = "/v1/chat/completions/batch"  # the only route here whose requests bound their output


class SingleRoute:
    """Serves one route.

    Arguments:
        paths: returns all paths of the gateway, for the error about a route that no backend offers.
    """

    def __init__(
        self,
        path: str,
        settings: Settings,
        fleet: Fleet,
        flow: Single,
        entrance: Entrance,
        paths: Callable[[], list[str]],
    ) -> None:
        self._path = path
        self._route = ROUTES[path]
        self._shape = ANTHROPIC if path.startswith("/v1/messages/") else OPENAI
        self._listed = "/openapi.json" if settings.routes.docs else ""
        self._limits = settings.limits
        self._fleet = fleet
        self._flow = flow
        self._entrance = entrance
        self._paths = paths

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Coroutine[Any, Any, None]:
        record = RequestRecord(self._route.endpoint)
        return self._entrance.serve(record, scope, receive, send, self._serve, self._shape)

    async def _serve(self, arrival: Arrival) -> None:
        """Read a request and answer it.

        Raises:
            GatewayError: the request cannot be served; `client.started` says whether the answer has begun.
        """
        entrance = self._entrance
        if self._path not in self._fleet.routes():
            raise no_route(self._path, self._paths(), self._listed)
        entrance.check_head(arrival)
        request, size = await (self._read_form(arrival) if self._route.form else self._read_json(arrival))
        request.hops = arrival.hops
        arrival.cancel_when_client_leaves()
        ticket = Ticket(
            client=entrance.admission.clients[arrival.record.client],
            model=request.model,
            split=False,
            prefill_tokens=request.tokens,
            tokens=request.tokens,
            size=size,
        )
        async with entrance.admitted(arrival, ticket):
            await self._flow.run(request)

    async def _read_json(self, arrival: Arrival) -> tuple[SingleRequest, int]:
        """Read a request with a JSON body. Returns it, and how many bytes of it are held while it waits."""
        record = arrival.record
        raw = await self._entrance.read_body(arrival)
        members = read_members(raw)
        if self._path == _BATCH:
            bound_output(members, "chat", self._limits.default_max_tokens, self._limits.max_tokens)
        model = read_model(members)
        if model is not None:
            record.model = model
            model = await self._entrance.model_for(model, record)
            members["model"] = msgspec.Raw(encode_json(model))
        size = len(raw)
        tokens = size // _BYTES_PER_TOKEN + 1
        return SingleRequest(self._path, arrival.client, record, encode_json(members), model, tokens), size

    async def _read_form(self, arrival: Arrival) -> tuple[SingleRequest, int]:
        """Read a request with a multipart form, up to its model. Returns it, and how many bytes of it are held while it
        waits."""
        entrance, headers, record = self._entrance, arrival.headers, arrival.record
        if coding := coding_of(headers):
            raise EncodingNotSupported(f"a form is forwarded while it arrives, so it may not be encoded with {coding}")
        arrival.client.on_gone = arrival.task.cancel
        form = ClientForm(arrival, entrance.body_limit, entrance.body_seconds, entrance.names.aliases)
        await form.until_named()
        length = headers.get(b"content-length", b"")
        size = int(length) if length.isdigit() else _USUAL_AUDIO
        tokens = size // _BYTES_PER_AUDIO_TOKEN + 1
        model = form.model
        if model is not None:
            record.model = model
            if not self._fleet.knows(model):
                await entrance.names.require(model)
        return SingleRequest(self._path, arrival.client, record, form, model, tokens), min(size, KEPT)


class ClientForm:
    """A client's multipart form, which is sent to the engine while it arrives (`flow.single.Source`).

    Arguments:
        limit: the longest form, in bytes.
        seconds: how long the gateway waits for the client in total. Time spent waiting for the engine does not count.
        aliases: other names of models, and the engines' own.
    Attributes:
        kept: the form so far; None once it is longer than may be kept.
    """

    def __init__(self, arrival: Arrival, limit: int, seconds: float, aliases: Mapping[str, str]) -> None:
        content_type = arrival.headers.get(b"content-type", b"")
        self._form = Form(content_type, token_hex(16).encode("ascii"), aliases=aliases)
        self._client = arrival.client
        self._receive = arrival.receive
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
        """Read until the model is known, the form is complete, or as much has been read as may be kept."""
        assert self.kept is not None
        while self.model is None and not self._ended and len(self.kept) < KEPT:
            await self.more()

    async def more(self) -> bytes:
        """Read the next piece, which may be empty. It may be cancelled: what has been read is in `kept`.

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
        client = self._client if isinstance(self._client, ServerExchange) else None
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
            if isinstance(self._client, AsgiResponse):
                self._client.watch()
        if self.kept is not None:
            if len(self.kept) < KEPT:
                self.kept += piece
            else:
                self.kept = None
        if self.kept is None and client is not None:
            client.let_go(client.held)  # from here on each piece is sent to the engine at once
        return piece
