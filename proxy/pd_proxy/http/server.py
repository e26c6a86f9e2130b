"""The server's end of a client's connection: which request is answered, and the bounds that all connections share.

`GatewayProtocol` is what uvicorn calls an `http` class: uvicorn makes one for each connection and calls `shutdown` when
the server ends. It does without uvicorn's own protocols. Of uvicorn's `Config` it honours the application,
`root_path` and `timeout_keep_alive`; there is no access log and no WebSocket here.

Connections are bounded in number, and so is the time for which a client that does not read may hold memory. Each
request gets a `ServerExchange` in its scope. An application may have an attribute `direct`: the paths whose
applications need neither its router nor more of a scope than method, path and headers.
"""

from __future__ import annotations

import asyncio
import fcntl
import termios
from collections.abc import Mapping
from contextlib import suppress
from random import getrandbits
from typing import Any, ClassVar

from uvicorn import Config
from uvicorn.server import ServerState

from pd_proxy.errors import GatewayError, TooManyConnections
from pd_proxy.http.body_memory import SHORT
from pd_proxy.http.client_connections import VISIT
from pd_proxy.http.inbound import Inbound, Reading
from pd_proxy.http.response import EXTENSION, Receive, Scope, Send
from pd_proxy.http.scope import whole_scope
from pd_proxy.http.server_exchange import STATUS_LINES, App, ServerExchange
from pd_proxy.http.write_limit import WriteLimit

# Seconds for which what a client still sends is read and thrown away after its request was refused. Closing at once
# would reset the connection, and the answer would be lost with it.
_LINGER = 2.0
_MOST_UNREAD = 64 * 1024  # bytes of a body that wait for the application before the connection is read no further
_NO_ROUTES: Mapping[bytes, Any] = {}
_HEAD, _BODY, _BETWEEN, _NOTHING = Reading


class GatewayProtocol(Inbound):
    """One client connection.

    Class attributes are set once, in a subclass, before the server listens:
        write_seconds: seconds for which a client may read nothing while bytes for it are held.
    Attributes:
        active: the request that is being answered.
        client: the client's address and port, where it has one.
        writable: the client reads what is sent to it, or little is held for it.
    """

    __slots__ = (
        "_app",
        "_config",
        "_direct",
        "_drained",
        "_idle",
        "_is_counted",
        "_is_crowded",
        "_is_held_back",
        "_is_paused",
        "_lingering",
        "_newest",
        "_state",
        "_write_limit",
        "active",
        "client",
        "server_state",
        "writable",
    )

    write_seconds: ClassVar[float] = 120.0

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(_loop or asyncio.get_running_loop())
        self._config = config
        self._app: App = config.loaded_app
        self._state = app_state
        self._direct: Mapping[bytes, Any] = getattr(self._app, "direct", _NO_ROUTES)
        self.server_state = server_state
        self.client: tuple[str, int] | None = None
        self.active: ServerExchange | None = None
        self._newest: ServerExchange | None = None  # of the request that comes, or came last; until it is answered
        self._idle = self.shared.idle(config.timeout_keep_alive)
        self._is_crowded = False  # one connection too many
        self._is_counted = False  # it is one of `shared.open`
        self._is_held_back = False  # the next request waits for the client to read
        self._is_paused = False  # nothing is read from the client
        self._lingering: asyncio.TimerHandle | None = None
        self.writable = True
        self._drained: asyncio.Event | None = None
        self._write_limit: WriteLimit | None = None

    # A connection's beginning and end

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport
        self.server_state.connections.add(self)  # type: ignore[arg-type]
        peer = transport.get_extra_info("peername")
        self.client = (str(peer[0]), int(peer[1])) if isinstance(peer, tuple) else None
        self.time_head()
        shared = self.shared
        if shared.per_address is not None and self.client is not None:
            shared.addresses[self.client[0]] += 1
            self._is_crowded = shared.addresses[self.client[0]] > shared.per_address
        if shared.open < shared.limit or shared.make_room():
            self._is_counted = True
            shared.open += 1
        elif shared.open < shared.limit + shared.spare:
            self._is_counted = self._is_crowded = True
            shared.open += 1
        else:
            self._is_crowded = True
            self.headers_deadlines.forget(self)
            self.headers_deadlines = shared.headers(VISIT)
            self.time_head()
            shared.visit(self)
        if self._is_crowded:
            self._app = self._serve_crowded

    def connection_lost(self, exc: Exception | None) -> None:
        self.server_state.connections.discard(self)
        self._uncount()
        if self.shared.per_address is not None and self.client is not None:
            self.shared.addresses[self.client[0]] -= 1
            if not self.shared.addresses[self.client[0]]:
                del self.shared.addresses[self.client[0]]
        self.headers_deadlines.forget(self)
        self._idle.forget(self)
        for limit in (self._lingering, self._write_limit):
            if limit is not None:
                limit.cancel()
        self.parser = None  # type: ignore[assignment]
        self.writable = True
        if self._drained is not None:
            self._drained.set()
        unanswered = [*([] if self.active is None else [self.active]), *(exchange for exchange, _, _ in self.waiting)]
        self.active = self._newest = None
        self.waiting.clear()
        for exchange in unanswered:
            exchange.left()

    def shutdown(self) -> None:
        """uvicorn's server ends: close once nothing is under way."""
        if self.is_answering:
            self.leave()
        else:
            self.transport.close()

    def leave(self) -> None:
        """The answer in progress is this connection's last. (What `shared.leaving` does for the next one.)"""
        if self._newest is not None and not self._newest.complete:
            self._newest.keep_alive = False

    def end_after_waiting(self) -> None:
        self.leave()

    def close_if_idle(self) -> None:
        """Close a connection that waits for another request, unless one is already in its socket."""
        if self.reading is not _BETWEEN or self.is_answering or self.transport.is_closing():
            return
        if not self._has_unread():
            self.transport.close()

    def _uncount(self) -> None:
        if self._is_counted:
            self._is_counted = False
            self.shared.open -= 1
        else:
            self.shared.visitors.pop(self, None)

    def make_room(self) -> bool:
        """Close a connection on which nothing is asked, in favour of another; whether that was so."""
        if self.is_answering or self.transport.is_closing() or not self._is_counted or self._has_unread():
            return False
        self._uncount()
        self.transport.close()
        return True

    def leave_now(self) -> None:
        """Make room for another visitor."""
        self.stop_reading()
        self.transport.abort()

    def _has_unread(self) -> bool:
        """Whether something is in its socket that was not read yet."""
        descriptor = self.transport.get_extra_info("socket").fileno()
        return any(fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4)))

    async def _serve_crowded(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The application of a connection beyond the limit."""
        if self.shared.is_spared(scope["path"]):
            await self._config.loaded_app(scope, receive, send)
            return
        if self._is_counted:
            self.shared.refused += 1  # visitors are counted when they come
        error = TooManyConnections(f"this gateway serves {self.shared.limit} connections at a time", retry_after=1)
        exchange: ServerExchange = scope["extensions"][EXTENSION]
        exchange.respond(error.status, [*_answer_headers(), (b"retry-after", b"1")], error.body())

    # Requests

    @property
    def is_answering(self) -> bool:
        """Whether a request is not answered in full yet."""
        return self.active is not None or bool(self.waiting)

    def data_comes(self) -> bool:
        self._idle.forget(self)
        return self.active is None and not self.waiting  # as `is_answering`, for each read without a call

    def request_begun(self) -> None:
        parser, url, version = self.parser, self.url, self.version
        app = None if self._is_crowded else self._direct.get(url)
        method = parser.get_method().decode("latin-1")
        exchange = ServerExchange(
            self,
            self.transport,
            method == "HEAD",
            version,
            not (self._is_crowded or self.shared.leaving) and version != "1.0" and parser.should_keep_alive(),
            self.expects_continue,
            app is not None,
        )
        scope: Scope = {
            "type": "http",
            "http_version": version,
            "method": method,
            "path": url.decode("latin-1"),
            "headers": self.headers,
            "client": self.client,
            "extensions": {EXTENSION: exchange},
        }
        if app is None:
            app, scope = self._app, whole_scope(scope, url, self._config, self._state, self.transport)
        self._newest = exchange
        if self.active is None and not self.waiting:
            self._start(exchange, app, scope)
        else:
            self.pause_reading()
            self.waiting.append((exchange, app, scope))

    def on_body(self, body: bytes) -> None:
        exchange, count = self._newest, len(body)
        self._overhead -= count
        if exchange is None or exchange.complete or exchange.refusal is not None:
            return
        if not self.shared.bodies.take(exchange, count):
            return
        exchange.received += body
        if len(exchange.received) > _MOST_UNREAD:
            self.pause_reading()
        exchange.unread = True
        exchange.wake()

    def request_whole(self) -> None:
        exchange = self._newest
        if exchange is None:
            return
        if exchange.held > SHORT:
            self.shared.bodies.whole(exchange)
            if not self.waiting:  # else a client that leaves while it waits for the answer would not be noticed
                self.resume_reading()
        if not exchange.complete:
            exchange.whole = exchange.unread = True
            exchange.wake()

    def refuse(self, exchange: ServerExchange) -> None:
        assert exchange.refusal is not None
        if exchange is self._newest:
            self.refuse_request(exchange.refusal)

    def _start(self, exchange: ServerExchange, app: App, scope: Scope) -> None:
        if not self.writable:
            # It has not read the answers that it asked for before: another would add to what is held for it.
            self._is_held_back = True
            self.waiting.insert(0, (exchange, app, scope))
            self.pause_reading()
            return
        self.active = exchange
        tasks = self.server_state.tasks
        tasks.add(self.loop.create_task(exchange.run(app, scope, tasks)))

    # Answers

    def answered(self, exchange: ServerExchange) -> None:
        self.active = None
        self.server_state.total_requests += 1
        transport = self.transport
        if transport.get_write_buffer_size():
            self._watch_writes()
        if not exchange.whole:
            self.linger()  # nothing reads the rest of the body, which may never end
        elif not exchange.keep_alive:
            if self.reading is _NOTHING:
                self.linger()
            else:
                transport.close()
        if exchange is self._newest and exchange.whole:
            self._forget_request()
        if self._lingering is not None or transport.is_closing():
            return
        self.resume_reading()
        if self.waiting:
            self._start(*self.waiting.pop(0))
        elif self._refusal is not None:
            self._answer_refused(self._refusal)
        elif self.reading is not _HEAD:  # else the limit on headers runs already
            self._idle.watch(self, self.loop)

    def give_up(self) -> None:
        self.transport.close()
        if self.transport.get_write_buffer_size():
            self._watch_writes()

    def _forget_request(self) -> None:
        """Keep nothing of an answered request: most connections of a server are idle."""
        self._newest = None
        if self.reading is _BETWEEN:
            self.headers = None  # type: ignore[assignment]
            self.url = b""

    @property
    def default_headers(self) -> bytes:
        """uvicorn makes a new list of them each second, with the date."""
        global _default_headers
        listed, lines = _default_headers
        if listed is not self.server_state.default_headers:
            listed = self.server_state.default_headers
            lines = b"".join(b"%b: %b\r\n" % header for header in listed)
            _default_headers = listed, lines
        return lines

    def refuse_request(self, error: GatewayError, *, at_leisure: bool = True) -> None:
        if self.transport.is_closing() or self.reading is _NOTHING:
            return
        newest = self._newest
        if self.reading is _BODY and newest is not None and not newest.complete:  # its body will never be whole
            if self.waiting and self.waiting[-1][0] is newest:
                self.waiting.pop()
                newest.release()
            elif newest is self.active and not newest.started:
                self.active = None
                newest.left()
            elif newest is self.active:
                newest.refusal = error
                newest.wake()
        if not self.is_answering:
            self._answer_refused(error)
            return
        self._refusal = error
        self.stop_reading()
        self.pause_reading()
        if not at_leisure:
            self.loop.call_later(_LINGER, self.transport.close)

    def _answer_refused(self, error: GatewayError) -> None:
        body = error.body()
        lines = [b"%b: %b\r\n" % header for header in (*_answer_headers(), (b"connection", b"close"))]
        head = STATUS_LINES[error.status] + b"".join(lines)
        self.transport.write(b"%bcontent-length: %d\r\n\r\n%b" % (head, len(body), body))
        self.linger()

    def linger(self) -> None:
        """Close once the client has heard the answer: it has closed its side, or had its time."""
        if self._lingering is None and not self.transport.is_closing():
            self._lingering = self.loop.call_later(_LINGER, self.transport.abort)
            self.stop_reading()
            self.resume_reading()
            if self.transport.can_write_eof():
                with suppress(OSError):  # the client has gone, unseen while nothing was read from it
                    self.transport.write_eof()

    # Time limits and back-pressure

    def overdue(self, seconds: float) -> None:
        if self.reading is _HEAD:
            super().overdue(seconds)
        elif not self.transport.is_closing():
            self.transport.close()  # it has been idle for long enough

    def pause_reading(self) -> None:
        if not self._is_paused:
            self._is_paused = True
            self.transport.pause_reading()

    def resume_reading(self) -> None:
        if self._is_paused:
            self._is_paused = False
            self.transport.resume_reading()

    async def drained(self) -> None:
        """Wait until the client has read enough."""
        while not self.writable:
            if self._drained is None:
                self._drained = asyncio.Event()
            self._drained.clear()
            await self._drained.wait()

    @property
    def unsent(self) -> int:
        """Bytes that the client has not taken yet."""
        return self.transport.get_write_buffer_size()

    def pause_writing(self) -> None:
        self.writable = False
        self._watch_writes()
        if self.active is not None and self.active.started and self.active.flow is not None:
            self.active.flow.pause()

    def resume_writing(self) -> None:
        self.writable = True
        if self._drained is not None:
            self._drained.set()
        if self.active is not None:
            if self.active.started and self.active.flow is not None:
                self.active.flow.resume()
        elif self._is_held_back and self.waiting and not self.transport.is_closing():
            self._is_held_back = False
            self.resume_reading()
            self._start(*self.waiting.pop(0))

    def _watch_writes(self) -> None:
        if self._write_limit is None or self._write_limit.over:
            self._write_limit = WriteLimit(self.transport, self.loop, self.write_seconds)


_default_headers: tuple[object, bytes] = (None, b"")


def _answer_headers() -> list[tuple[bytes, bytes]]:
    return [(b"content-type", b"application/json"), (b"x-request-id", b"%032x" % getrandbits(128))]
