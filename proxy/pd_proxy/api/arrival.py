"""A request on its way in: its head and its body."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from math import inf
from typing import Any

from pd_proxy.api.trace_context import trace_context
from pd_proxy.errors import BodyTooLarge, InvalidRequest, RequestTimedOut
from pd_proxy.flow.request import new_id
from pd_proxy.http.content_coding import coding_of, plain
from pd_proxy.http.direct import DirectResponse
from pd_proxy.http.response import AsgiResponse, ClientResponse, Receive, Scope
from pd_proxy.telemetry.records import RequestRecord

_SECONDS = re.compile(rb"\d{1,6}(\.\d{1,3})?").fullmatch
_SANE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}").fullmatch


class ClientLeft(Exception):
    """The client closed its connection before its request was whole."""


@dataclass(slots=True, eq=False)
class Arrival:
    """A request from its head on.

    Attributes:
        scope, receive: as ASGI has them.
        client: what answers its client.
        task: in which it is served.
        headers: those of the scope.
        hops: the gateways that it has come through; empty where it came from a client.
        seconds: that it may take in all.
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
        """Have the request's task cancelled when its client closes the connection.

        Raises:
            ClientLeft: it has.
        """
        if self.client.gone:
            raise ClientLeft
        self.client.on_gone = self.task.cancel


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
    client: ClientResponse | None, receive: Receive, headers: dict[bytes, bytes], limit: int, seconds: float
) -> bytes | bytearray:
    """The request's body, without its content coding.

    Raises:
        BodyTooLarge, BodiesFull, EncodingNotSupported, InvalidRequest, RequestTimedOut, ClientLeft
    """
    coding = coding_of(headers) if b"content-encoding" in headers else ""
    body: bytes | bytearray | None = client.body if isinstance(client, DirectResponse) else None
    if body is None:
        try:
            async with asyncio.timeout(seconds):
                body = await (client.gather(limit) if isinstance(client, DirectResponse) else _gather(receive, limit))
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
    """As `DirectResponse.gather`, from any server."""
    whole = bytearray()  # not a list: a body of single bytes would weigh fifty times its length
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        whole += message.get("body", b"")
        if len(whole) > limit or not message.get("more_body", False):
            return whole
