"""A request as it arrives: its head and its body."""

from __future__ import annotations

import asyncio
import re
from math import inf
from typing import Any

import msgspec

from pd_proxy.api.trace_context import trace_context
from pd_proxy.errors import BodyTooLarge, InvalidRequest, RequestTimedOut
from pd_proxy.flow.request import new_id
from pd_proxy.http.content_coding import coding_of, plain
from pd_proxy.http.response import AsgiResponse, ClientResponse, Receive, Scope
from pd_proxy.http.server_exchange import ServerExchange
from pd_proxy.telemetry.records import RequestRecord

_SECONDS = re.compile(rb"\d{1,6}(\.\d{1,3})?").fullmatch
_SANE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}").fullmatch


class ClientLeft(Exception):
    """The client closed its connection before its request was complete."""


class Arrival(msgspec.Struct, eq=False):
    """A request whose head has been read.

    Attributes:
        scope, receive: those of ASGI.
        client: writes the answer to the client.
        task: the task in which the request is served.
        headers: the headers of the scope; of repeated ones the last.
        hops: the gateways that it has come through; empty where it came from a client.
        seconds: how long it may take in all.
    """

    scope: Scope
    receive: Receive
    client: ClientResponse
    record: RequestRecord
    task: asyncio.Task[Any]
    headers: dict[bytes, bytes]
    hops: bytes = b""
    seconds: float = inf

    def cancel_when_client_leaves(self) -> None:
        """Cancel the request's task when the client closes the connection.

        Raises:
            ClientLeft: the client has closed it already.
        """
        if self.client.gone:
            raise ClientLeft
        self.client.on_gone = self.task.cancel


def identify(headers: dict[bytes, bytes]) -> str:
    """The request's id: the client's X-Request-Id where that is valid, else a new one."""
    name = headers.get(b"x-request-id")
    return name.decode("latin-1") if name is not None and _SANE_ID(name) else new_id()


def introduce(record: RequestRecord, scope: Scope, headers: dict[bytes, bytes]) -> None:
    """Set the request's id and its trace context in its record.

    Arguments:
        headers: the headers of the scope.
    """
    record.request_id = identify(headers)
    if b"traceparent" in headers:
        record.trace = trace_context(scope["headers"])


def time_limit(headers: dict[bytes, bytes], most: float) -> float:
    """How many seconds the request may take: `most`, or its x-request-timeout where that is shorter.

    Raises:
        InvalidRequest: x-request-timeout is not a number of seconds.
    """
    value = headers.get(b"x-request-timeout")
    if value is None:
        return most
    seconds = float(value) if _SECONDS(value) else 0.0
    if seconds <= 0:
        raise InvalidRequest("x-request-timeout is a number of seconds above 0, such as 30 or 2.5")
    return min(most, seconds)


def check_length(headers: dict[bytes, bytes], limit: int) -> None:
    """Refuse a body whose Content-Length is above the limit.

    Raises:
        BodyTooLarge
    """
    length = headers.get(b"content-length", b"")
    if length.isdigit() and int(length) > limit:
        raise BodyTooLarge(f"the request body of {int(length)} bytes exceeds the limit of {limit}")


async def read_whole(
    client: ClientResponse | None, receive: Receive, headers: dict[bytes, bytes], limit: int, seconds: float
) -> bytes | bytearray:
    """Read the request's body and decode its content coding.

    Raises:
        BodyTooLarge, BodiesFull, EncodingNotSupported, InvalidRequest, RequestTimedOut, ClientLeft
    """
    coding = coding_of(headers) if b"content-encoding" in headers else ""
    body: bytes | bytearray | None = client.body if isinstance(client, ServerExchange) else None
    if body is None:
        try:
            async with asyncio.timeout(seconds):
                body = await (client.gather(limit) if isinstance(client, ServerExchange) else _gather(receive, limit))
        except TimeoutError:
            raise RequestTimedOut(f"the request body did not arrive within {seconds:g} s") from None
        if body is None:
            raise ClientLeft
    if len(body) > limit:
        raise BodyTooLarge(f"the request body exceeds the limit of {limit} bytes")
    if isinstance(client, AsgiResponse):
        client.watch()
    return body if not coding else await plain(body, coding, limit, client)


async def _gather(receive: Receive, limit: int) -> bytearray | None:
    """As `ServerExchange.gather`, for any ASGI server."""
    whole = bytearray()  # not a list, in which a body that arrives byte by byte would take fifty times its length
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        whole += message.get("body", b"")
        if len(whole) > limit or not message.get("more_body", False):
            return whole
