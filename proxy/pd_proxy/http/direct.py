"""One answer, written directly to the transport of the client's connection.

It takes the place of uvicorn's `RequestResponseCycle.send`, without an ASGI message, a task or a copy per token, and
leaves the cycle as `send` would, so that keep-alive, pipelining and graceful shutdown stay uvicorn's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from uvicorn.protocols.http import flow_control as uvicorn_flow
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

from pd_proxy.errors import GatewayError
from pd_proxy.http.client_connections import Connections
from pd_proxy.http.response import FlowControl, Headers


class ClientConnection(Protocol):
    """What an answer asks of the connection that it goes out on (`server.GatewayProtocol`)."""

    transport: asyncio.Transport
    streaming: DirectResponse | None
    clients: set[DirectResponse]
    deaf: bool

    @property
    def shared(self) -> Connections: ...

    @property
    def flow(self) -> uvicorn_flow.FlowControl: ...

    def refuse(self, client: DirectResponse) -> None: ...

    def linger(self) -> None: ...


_CLOSE = b"connection: close\r\n"


class DirectResponse:
    """A `ClientResponse` that writes to the connection's transport.

    Attributes:
        held: bytes of the request's body that count as held (`body_memory.py`).
        refusal: why its body is not taken.
        asks: the request's application looks at `refusal` by itself.
    """

    __slots__ = (
        "_chunked",
        "_cycle",
        "_flow",
        "_head",
        "_protocol",
        "_transport",
        "asks",
        "gone",
        "held",
        "on_gone",
        "refusal",
        "started",
    )

    def __init__(self, protocol: ClientConnection, cycle: RequestResponseCycle, asks: bool = False) -> None:
        self._protocol = protocol
        self._cycle = cycle
        self._transport = protocol.transport
        self._chunked = True
        self._head = b""  # written with the first bytes of the body: one system call less
        self.started = False
        self.gone = False
        self.held = 0
        self.refusal: GatewayError | None = None
        self.asks = asks
        self._flow: FlowControl | None = None
        self.on_gone: Callable[[], object] | None = None

    @property
    def flow(self) -> FlowControl | None:
        """What is paused while the client does not keep up; one that comes while its socket is full is paused at
        once."""
        return self._flow

    @flow.setter
    def flow(self, flow: FlowControl | None) -> None:
        self._flow = flow
        if flow is not None and self._protocol.streaming is self and self._protocol.flow.write_paused:
            flow.pause()

    @property
    def body(self) -> bytearray | None:
        """The request's body when it is already there, whole; else None, and ASGI's `receive` has it.

        Raises:
            GatewayError: `refusal`.
        """
        cycle = self._cycle
        if self.refusal is not None:
            raise self.refusal
        if cycle.more_body or cycle.disconnected:
            return None
        body, cycle.body = cycle.body, bytearray()
        cycle.message_event.clear()
        return body

    def put_back(self, body: bytes | bytearray) -> None:
        """Have `body` be this again, for another reader."""
        self._cycle.body = body if isinstance(body, bytearray) else bytearray(body)

    async def gather(self, limit: int) -> bytearray | None:
        """The request's body once it is whole, or longer than `limit` bytes; None when its client has left. A long body
        is not copied on its way, as with each message of ASGI's `receive`.

        Raises:
            GatewayError: `refusal`.
        """
        cycle = self._cycle
        if cycle.waiting_for_100_continue and not self._transport.is_closing():
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            cycle.waiting_for_100_continue = False
        while cycle.more_body and len(cycle.body) <= limit and not cycle.disconnected:
            cycle.flow.resume_reading()
            await cycle.message_event.wait()
            cycle.message_event.clear()
            if self.refusal is not None:
                raise self.refusal
        if cycle.disconnected:
            return None
        body, cycle.body = cycle.body, bytearray()
        return body

    def add_headers(self, headers: Headers) -> None:
        """Put these into the answer too, also where it goes through ASGI's `send`."""
        cycle = self._cycle
        cycle.default_headers = [*cycle.default_headers, *headers]

    def refuse(self, error: GatewayError) -> None:
        """The request's body is not taken. What has come of it is given up."""
        self.refusal = error
        self._cycle.body = bytearray()
        if self.asks:
            self._cycle.message_event.set()
        else:
            self._protocol.refuse(self)

    def hold(self, count: int) -> None:
        """So many bytes of the request's body are held beside those that came.

        Raises:
            GatewayError: `refusal`.
        """
        if not self._protocol.shared.bodies.take(self, count):
            assert self.refusal is not None
            raise self.refusal

    def let_go(self, count: int) -> None:
        """So many bytes of the request's body are held no longer."""
        self._protocol.shared.bodies.let_go(self, min(count, self.held))

    def release(self) -> None:
        """Nothing of the request's body is held any more."""
        if self.held:
            self._protocol.shared.bodies.release(self)

    def respond(self, status: int, headers: Headers, body: bytes) -> None:
        if self.gone:
            return
        head = self._answer_head(status, headers, b"content-length: %d\r\n\r\n" % len(body))
        if self._cycle.scope["method"] == "HEAD":
            body = b""
        if len(body) < 4096:
            self._transport.write(head + body)
        else:
            self._transport.writelines((head, body))
        self._complete()

    def start(self, status: int, headers: Headers) -> None:
        if self.gone:
            return
        self._chunked = self._cycle.scope["http_version"] == "1.1"
        last = b"transfer-encoding: chunked\r\n\r\n" if self._chunked else b"\r\n"
        self._head = self._answer_head(status, headers, last)
        self._protocol.streaming = self

    def write(self, data: bytes) -> None:
        if self.gone:
            return
        self._transport.write(self._head + (b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data))
        self._head = b""

    def chunks(self) -> Callable[[bytes], object] | None:
        return self._transport.write if self._chunked and not self._head and not self.gone else None

    def end(self, data: bytes = b"") -> None:
        if self.gone:
            return
        if self._chunked:
            data = b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data) if data else b"0\r\n\r\n"
        if self._head or data:
            self._transport.write(self._head + data)
        self._complete()

    def left(self) -> None:
        """The client has closed its connection."""
        self.gone = True
        self.release()
        if self._flow is not None:
            self._flow.stop()
        self._cycle.disconnected = True
        self._cycle.message_event.set()
        if self.on_gone is not None:
            self.on_gone()

    def cut(self) -> None:
        self._cycle.keep_alive = False
        self._transport.abort()  # not close(), which would wait for a client that reads nothing

    async def flushed(self) -> None:
        """Nothing is held here; the transport sends what it has by itself."""

    def _answer_head(self, status: int, headers: Headers, last: bytes) -> bytes:
        cycle, first = self._cycle, STATUS_LINE[status]
        self.started = cycle.response_started = True
        cycle.waiting_for_100_continue = False
        lines = [name + b": " + value + b"\r\n" for name, value in (*cycle.default_headers, *headers)]
        # Nobody will read the rest of a body that is answered early, so it ends the connection.
        if _CLOSE in lines:
            cycle.keep_alive = False
        elif not cycle.keep_alive or cycle.more_body or cycle.scope["http_version"] != "1.1":
            cycle.keep_alive = False
            lines.append(_CLOSE)
        lines.append(last)
        return first + b"".join(lines)

    def _complete(self) -> None:
        cycle = self._cycle
        protocol = self._protocol
        protocol.streaming = None
        protocol.clients.discard(self)
        if self.held:
            protocol.shared.bodies.release(self)
        cycle.response_complete = True
        cycle.message_event.set()
        if not cycle.keep_alive:
            if cycle.more_body or protocol.deaf:
                protocol.linger()
            else:
                self._transport.close()
        cycle.on_response()
