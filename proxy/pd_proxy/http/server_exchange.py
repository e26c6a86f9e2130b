"""One request of a client and the answer to it, on the server's side of the connection.

An application is offered two ways to the same exchange. ASGI's `receive` and `send` serve what is asked for rarely. The
hot routes find the `ServerExchange` itself in their scope (`response.EXTENSION`): they take the body without a copy and
write to the connection's transport, without an ASGI message or a task for each token.
"""

from __future__ import annotations

import asyncio
import http
import logging
import re
from collections.abc import Callable, MutableMapping
from typing import Any, ClassVar, Protocol

import msgspec

from pd_proxy.errors import GatewayError
from pd_proxy.http.client_connections import Connections
from pd_proxy.http.response import FlowControl, Headers, Scope

log = logging.getLogger("pd_proxy.http")

App = Callable[..., Any]


class ServerConnection(Protocol):
    """What an exchange asks of its connection (`server.GatewayProtocol`).

    Attributes:
        writable: the client reads what is sent to it, or little is held for it.
        default_headers: the header lines that each answer has.
    """

    shared: ClassVar[Connections]
    transport: asyncio.Transport
    writable: bool

    @property
    def default_headers(self) -> bytes: ...

    def resume_reading(self) -> None: ...

    async def drained(self) -> None: ...

    def refuse(self, exchange: ServerExchange) -> None:
        """The body of a request is not taken, and its application does not look at `refusal` itself."""

    def answered(self, exchange: ServerExchange) -> None:
        """An answer is complete."""

    def give_up(self) -> None:
        """The answer under way will not be complete: close the connection."""


def _status_line(status: int) -> bytes:
    try:
        phrase = http.HTTPStatus(status).phrase
    except ValueError:
        phrase = ""
    return f"HTTP/1.1 {status} {phrase}\r\n".encode("ascii")


STATUS_LINES = {status: _status_line(status) for status in range(100, 600)}

_CLOSE = b"connection: close\r\n"
_JSON = (b"content-type", b"application/json")
_BODILESS = frozenset({204, 304})  # statuses whose answers have no body, RFC 9110, section 6.4.1
_INVALID_NAME = re.compile(rb'[\x00-\x1f\x7f()<>@,;:\[\]={} \t\\"]').search
_INVALID_VALUE = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]").search


class ServerExchange(msgspec.Struct, eq=False):
    """A `ClientResponse` that writes to the connection's transport, and the body of its request.

    A struct, since these are made in C: one for each request.

    Arguments, in this order:
        connection, transport: where the answer goes.
        head_only: the request's method is HEAD.
        version: of HTTP, of the request.
        keep_alive: the client allows another request on the connection.
        expects_continue: the client waits for `100 Continue` before it sends the body.
        looks_at_refusal: the application looks at `refusal` itself.
    Attributes:
        received: bytes of the body that have come and were not taken.
        whole: all of the body has come.
        unread: something has come that `receive` has not returned.
        started: the head of the answer was made.
        complete: the answer was given to the transport in full.
        gone: the client has closed its connection.
        keep_alive: the connection stays open after the answer.
        held: bytes of the body that count as held (`body_memory.py`).
        refusal: why the body is not taken.
    """

    _connection: ServerConnection
    _transport: asyncio.Transport
    _head_only: bool
    _version: str
    keep_alive: bool
    _expects_continue: bool
    _looks_at_refusal: bool
    received: bytearray = msgspec.field(default_factory=bytearray)
    whole: bool = False
    unread: bool = False
    started: bool = False
    complete: bool = False
    gone: bool = False
    held: int = 0
    refusal: GatewayError | None = None
    on_gone: Callable[[], object] | None = None
    _flow: FlowControl | None = None
    _changed: asyncio.Event | None = None
    _extra_headers: Headers = ()
    _head: bytes = b""
    """Written with the first bytes of the body: one system call less."""
    _chunked: bool = True
    _body_left: int | None = None
    """Bytes that an answer of `send` still has to have; None: not known."""

    async def run(self, app: App, scope: Scope, tasks: set[asyncio.Task[None]]) -> None:
        """Have an application serve the request. A fault of the application ends the connection.

        Arguments:
            tasks: those of the server. The exchange removes its own: a callback of the event loop would cost more.
        """
        try:
            await app(scope, self.receive, self.send)
        except Exception:
            log.exception("the application failed on a request")
            self._fail()
        except BaseException:  # the server ends
            self._fail()
            raise
        else:
            if not self.complete and not self.gone:
                log.error("the application returned before its answer was complete")
                self._fail()
        finally:
            tasks.discard(asyncio.current_task())

    def _fail(self) -> None:
        if self.complete or self.gone:
            return  # the connection may be at another request, or end in its own time
        if self.started:
            self._connection.give_up()
            return
        error = GatewayError("the gateway failed on this request; its log says more")
        self.respond(error.status, [_JSON, (b"connection", b"close")], error.body())

    # The request's body

    def wake(self) -> None:
        """Something has changed that `receive` or `gather` may wait for."""
        if self._changed is not None:
            self._changed.set()

    async def _change(self) -> None:
        if self._changed is None:  # most requests arrive whole, and none waits for them
            self._changed = asyncio.Event()
        self._connection.resume_reading()
        await self._changed.wait()
        self._changed.clear()

    def _ask_for_body(self) -> None:
        if self._expects_continue and not self.gone and not self._transport.is_closing():
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self._expects_continue = False

    @property
    def body(self) -> bytearray | None:
        """The request's body when it is already there, whole; else None, and `gather` or ASGI's `receive` has it.

        Raises:
            GatewayError: `refusal`.
        """
        if self.refusal is not None:
            raise self.refusal
        if not self.whole or self.gone:
            return None
        body, self.received = self.received, bytearray()
        self.unread = False
        return body

    def put_back(self, body: bytes | bytearray) -> None:
        """Have `body` be this again, for another reader."""
        self.received = body if isinstance(body, bytearray) else bytearray(body)
        self.unread = True

    async def gather(self, limit: int) -> bytearray | None:
        """The request's body once it is whole, or longer than `limit` bytes; None when its client has left. A long body
        is not copied on its way, as with each message of ASGI's `receive`.

        Raises:
            GatewayError: `refusal`.
        """
        self._ask_for_body()
        while self.refusal is None and not self.whole and len(self.received) <= limit and not self.gone:
            await self._change()
        if self.refusal is not None:
            raise self.refusal
        if self.gone:
            return None
        body, self.received = self.received, bytearray()
        self.unread = False
        return body

    def refuse(self, error: GatewayError) -> None:
        """The request's body is not taken. What has come of it is given up."""
        self.refusal = error
        self.received = bytearray()
        if self._looks_at_refusal:
            self.unread = True
            self.wake()
        else:
            self._connection.refuse(self)

    def hold(self, count: int) -> None:
        """Count so many bytes of the request's body as held, beside those that came.

        Raises:
            GatewayError: `refusal`, or the client has closed its connection.
        """
        if self.gone:
            raise GatewayError("the client has closed its connection")  # nothing would release what it held from now
        if not self._connection.shared.bodies.take(self, count):
            assert self.refusal is not None
            raise self.refusal

    def let_go(self, count: int) -> None:
        """Count so many bytes of the request's body as held no longer."""
        self._connection.shared.bodies.let_go(self, min(count, self.held))

    def release(self) -> None:
        """Count nothing of the request's body as held any more."""
        if self.held:
            self._connection.shared.bodies.release(self)

    # The answer

    @property
    def flow(self) -> FlowControl | None:
        """What is paused while the client does not keep up. One that is set while the client's socket is full is paused
        at once."""
        return self._flow

    @flow.setter
    def flow(self, flow: FlowControl | None) -> None:
        self._flow = flow
        if flow is not None and self.started and not self._connection.writable:
            flow.pause()

    def add_headers(self, headers: Headers) -> None:
        """Put these into the answer too, whichever way it is sent."""
        self._extra_headers = (*self._extra_headers, *headers)

    def respond(self, status: int, headers: Headers, body: bytes) -> None:
        if self.gone:
            return
        head = self._make_head(status, headers, b"content-length: %d\r\n\r\n" % len(body))
        if self._head_only:
            body = b""
        if len(body) < 4096:
            self._transport.write(head + body)
        else:
            self._transport.writelines((head, body))
        self._complete()

    def start(self, status: int, headers: Headers) -> None:
        if self.gone:
            return
        self._chunked = self._version == "1.1"
        last = b"transfer-encoding: chunked\r\n\r\n" if self._chunked else b"\r\n"
        self._head = self._make_head(status, headers, last)

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
            self._head = b""
        self._complete()

    def left(self) -> None:
        """The client has closed its connection."""
        self.gone = True
        self.release()
        if self._flow is not None:
            self._flow.stop()
        self.wake()
        if self.on_gone is not None:
            self.on_gone()

    def cut(self) -> None:
        self.keep_alive = False
        self._transport.abort()  # not close(), which would wait for a client that reads nothing

    async def flushed(self) -> None:
        """Nothing is held here; the transport sends what it has by itself."""

    def _make_head(self, status: int, headers: Headers, last: bytes) -> bytes:
        status_line = STATUS_LINES[status]  # first, as an application's fault is answered for while nothing has started
        self.started = True
        self._expects_continue = False
        if self._extra_headers:
            headers = (*self._extra_headers, *headers)
        lines = [name + b": " + value + b"\r\n" for name, value in headers]
        if _CLOSE in lines:
            self.keep_alive = False
        elif not self.keep_alive or not self.whole or self._version != "1.1":
            # The rest of a body that is answered early is not read, so the connection cannot go on.
            self.keep_alive = False
            lines.append(_CLOSE)
        return status_line + self._connection.default_headers + b"".join(lines) + last

    def _complete(self) -> None:
        self.complete = True
        self.release()
        self.wake()
        self._connection.answered(self)

    # ASGI

    async def receive(self) -> MutableMapping[str, Any]:
        """ASGI's `receive`. A body that is refused ends as one whose client has left."""
        self._ask_for_body()
        while not (self.unread or self.gone or self.complete or self.refusal is not None):
            await self._change()
        if self.gone or self.complete or not self.unread:
            return {"type": "http.disconnect"}
        self._connection.resume_reading()
        body, self.received = bytes(self.received), bytearray()
        self.unread = False
        return {"type": "http.request", "body": body, "more_body": not self.whole}

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """ASGI's `send`.

        Raises:
            RuntimeError: the application broke ASGI's rules or those of HTTP.
        """
        if not self._connection.writable:
            await self._connection.drained()
        if self.gone:
            return
        expected = "http.response.body" if self.started else "http.response.start"
        if self.complete or message["type"] != expected:
            raise RuntimeError(f"{message['type']} was sent where {'nothing' if self.complete else expected} may come")
        if self.started:
            self._send_body(message.get("body", b""), more=message.get("more_body", False))
        else:
            self._send_head(message["status"], message.get("headers", ()))

    def _send_head(self, status: int, headers: Headers) -> None:
        kept: list[tuple[bytes, bytes]] = []
        length = None
        for name, value in headers:
            if _INVALID_NAME(name) or _INVALID_VALUE(value):
                raise RuntimeError("a header of the answer is not valid")
            name = name.lower()
            if name == b"content-length":
                length = int(value)
            elif name == b"connection" and b"close" in value.lower():
                self.keep_alive = False
                continue
            elif name == b"transfer-encoding":
                continue  # the framing is this class's own
            kept.append((name, value))
        bodiless = self._head_only or status in _BODILESS
        self._body_left = 0 if bodiless else length
        self._chunked = self._body_left is None and self._version == "1.1"
        if self._body_left is None and not self._chunked:
            self.keep_alive = False
        self._head = self._make_head(status, kept, b"transfer-encoding: chunked\r\n\r\n" if self._chunked else b"\r\n")

    def _send_body(self, body: bytes, *, more: bool) -> None:
        if self._head_only:
            body = b""
        if self._body_left is not None:
            self._body_left -= len(body)
            if self._body_left < 0 or (self._body_left and not more):
                raise RuntimeError("the answer's body is not as long as its content-length says")
        if not more:
            self.end(body)
        elif body:
            self.write(body)
