"""The client's end of the relay: one answer on its way to the client's socket.

`ServerExchange` writes to the transport that `server.GatewayProtocol` holds; `AsgiResponse` does the same through a
plain ASGI `send`, for any other server.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from contextlib import suppress
from typing import Any, Protocol

Headers = Iterable[tuple[bytes, bytes]]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

EXTENSION = "pd_proxy.client"
"""The key under `scope["extensions"]` where the server offers a `ClientResponse`."""


class FlowControl(Protocol):
    """What a client's back-pressure acts upon."""

    def pause(self) -> None:
        """Send no more for now."""

    def resume(self) -> None:
        """Go on."""

    def stop(self) -> None:
        """The client is gone; nothing may be written any more."""


class ClientResponse(Protocol):
    """One request's way back. All calls return at once.

    Attributes:
        started: whether status and headers have gone out.
        gone: whether the client has closed its connection.
        flow: paused while the client does not keep up.
        on_gone: called once when the client closes its connection before the answer's end.
    """

    started: bool
    gone: bool
    flow: FlowControl | None
    on_gone: Callable[[], object] | None

    def respond(self, status: int, headers: Headers, body: bytes) -> None:
        """Send a whole answer."""

    def start(self, status: int, headers: Headers) -> None:
        """Begin an answer whose length is not known. Its head goes out with the first bytes of its body."""

    def write(self, data: bytes) -> None:
        """Send body bytes. Never empty."""

    def chunks(self) -> Callable[[bytes], object] | None:
        """A function that sends bytes which are whole chunks of the chunked coding already, or None if this client
        does not speak it. Good until the answer's end or `FlowControl.stop`."""

    def end(self, data: bytes = b"") -> None:
        """Send the last bytes, if there are any left; the answer is whole."""

    def cut(self) -> None:
        """Close the connection without a proper end: the client must not take what it has for whole."""

    async def flushed(self) -> None:
        """Wait until nothing that was written is still held here."""


class AsgiResponse:
    """A `ClientResponse` over ASGI's `send`: what is written waits in a list that one task empties."""

    HIGH_WATER = 64 * 1024

    def __init__(self, receive: Receive, send: Send) -> None:
        self.started = False
        self.gone = False
        self.flow: FlowControl | None = None
        self.on_gone: Callable[[], object] | None = None
        self._receive = receive
        self._send = send
        self._messages: list[MutableMapping[str, Any]] = []
        self._held = 0
        self._paused = False
        self._complete = False
        self._pump: asyncio.Task[None] | None = None
        self._watch: asyncio.Task[None] | None = None

    def watch(self) -> None:
        """Start to listen for the client's going away; only after the request's body has been read."""
        self._watch = asyncio.create_task(self._await_disconnect())

    def respond(self, status: int, headers: Headers, body: bytes) -> None:
        self.start(status, [*headers, (b"content-length", b"%d" % len(body))])
        self.end(body)

    def start(self, status: int, headers: Headers) -> None:
        self.started = True
        self._put({"type": "http.response.start", "status": status, "headers": list(headers)})

    def write(self, data: bytes) -> None:
        self._held += len(data)
        self._put({"type": "http.response.body", "body": data, "more_body": True})
        if self._held > self.HIGH_WATER and not self._paused and self.flow is not None:
            self._paused = True
            self.flow.pause()

    def chunks(self) -> Callable[[bytes], object] | None:
        return None

    def end(self, data: bytes = b"") -> None:
        self._complete = True
        self._put({"type": "http.response.body", "body": data, "more_body": False})

    def cut(self) -> None:
        # ASGI has no word for it; an application that returns without an end makes the server close the connection.
        if self._pump is not None:
            self._pump.cancel()
        self._messages.clear()
        self._leave()

    async def flushed(self) -> None:
        if self._pump is not None:
            with suppress(asyncio.CancelledError):
                await self._pump
        if self._watch is not None:
            self._watch.cancel()

    def _put(self, message: MutableMapping[str, Any]) -> None:
        self._messages.append(message)
        if self._pump is None or self._pump.done():
            self._pump = asyncio.create_task(self._empty())

    async def _empty(self) -> None:
        while self._messages:
            messages, self._messages = self._messages, []
            for message in messages:
                await self._send(message)
            self._held = 0
            if self._paused and self.flow is not None:
                self._paused = False
                self.flow.resume()

    async def _await_disconnect(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        if not self._complete:
            self._leave()

    def _leave(self) -> None:
        self.gone = True
        if self.flow is not None:
            self.flow.stop()
        if self.on_gone is not None:
            self.on_gone()
