"""The server's end of the client's socket: what is common to all its requests, and what it reads of their answers.

Connections are bounded in number, and so is the time for which a client that does not read may hold memory. Each
request gets a `direct.DirectResponse` in its scope. An application may have an attribute `direct`: the paths whose
applications need neither its router nor more of a scope than method, path and headers. Rests, with `inbound` and
`direct`, on names of uvicorn's `httptools_impl` module; `tests/http/test_uvicorn_names.py` holds them.
"""

from __future__ import annotations

import asyncio
import fcntl
import socket
import struct
import termios
from collections.abc import Mapping
from typing import Any, ClassVar, cast

from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from pd_proxy.errors import TooManyConnections
from pd_proxy.http.body_memory import SHORT
from pd_proxy.http.client_connections import VISIT
from pd_proxy.http.direct import DirectResponse
from pd_proxy.http.inbound import Inbound, answer_headers
from pd_proxy.http.response import EXTENSION, Receive, Scope, Send

_ACKED = struct.Struct("@120xQ")  # tcpi_bytes_acked in Linux's struct tcp_info


class GatewayProtocol(Inbound):
    """One client connection.

    Class attributes are set once, in a subclass, before the server listens:
        write_seconds: seconds for which a client may read nothing while bytes for it are held.
    Attributes:
        streaming: the client whose answer is under way.
    """

    __slots__ = ("_counted", "_crowded", "_direct", "_held_back", "_idle", "_newest", "_write_deadline", "streaming")

    write_seconds: ClassVar[float] = 120.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pipeline = _Queue()  # type: ignore[assignment]
        self._direct: Mapping[bytes, Any] = getattr(self.app, "direct", _NO_ROUTES)
        self.streaming: DirectResponse | None = None
        self._newest: DirectResponse | None = None  # of the request that comes, or came last
        self._idle = self.shared.idle(self.timeout_keep_alive)
        self._crowded = False  # one connection too many
        self._counted = False  # it is one of `shared.open`
        self._held_back = False  # the next request waits for the client to read
        self._write_deadline: asyncio.TimerHandle | None = None

    # A connection's beginning and end

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow._is_writable_event = writable = _Event()
        writable.set()
        shared = self.shared
        if shared.per_address is not None and self.client is not None:
            shared.addresses[self.client[0]] += 1
            self._crowded = shared.addresses[self.client[0]] > shared.per_address
        if shared.open < shared.limit or shared.make_room():
            self._counted = True
            shared.open += 1
        elif shared.open < shared.limit + shared.spare:
            self._counted = self._crowded = True
            shared.open += 1
        else:
            self._crowded = True
            self._headers_wait.forget(self)
            self._headers_wait = shared.headers(VISIT)
            self._expect_headers()
            self._time_headers()
            shared.visit(self)
        if self._crowded:
            self.app = self._serve_crowded

    def connection_lost(self, exc: Exception | None) -> None:
        self._uncount()
        if self.shared.per_address is not None and self.client is not None:
            self.shared.addresses[self.client[0]] -= 1
            if not self.shared.addresses[self.client[0]]:
                del self.shared.addresses[self.client[0]]
        self._idle.forget(self)
        if self._write_deadline is not None:
            self._write_deadline.cancel()
        self.pipeline.clear()
        super().connection_lost(exc)
        clients, self.clients, self.streaming = self.clients, set(), None
        for client in clients:
            client.left()

    def _uncount(self) -> None:
        if self._counted:
            self._counted = False
            self.shared.open -= 1
        else:
            self.shared.visitors.pop(self, None)

    def make_room(self) -> bool:
        """Close a connection on which nothing is asked, in favour of another; whether that was so."""
        if self.clients or self.transport.is_closing() or not self._counted or self._has_unread():
            return False
        self._uncount()
        self.transport.close()
        return True

    def leave_now(self) -> None:
        """Make room for another visitor."""
        self.deaf = True
        self.transport.abort()

    def _has_unread(self) -> bool:
        """Whether something is in its socket that was not read yet."""
        descriptor = self.transport.get_extra_info("socket").fileno()
        return any(fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4)))

    async def _serve_crowded(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The application of a connection beyond the limit."""
        if self.shared.is_spared(scope["path"]):
            await self.config.loaded_app(scope, receive, send)
            return
        if self._counted:
            self.shared.refused += 1  # visitors are counted when they come
        error = TooManyConnections(f"this gateway serves {self.shared.limit} connections at a time", retry_after=1)
        client: DirectResponse = scope["extensions"][EXTENSION]
        client.respond(error.status, [*answer_headers(), (b"retry-after", b"1")], error.body())

    @property
    def unsent(self) -> int:
        """Bytes that the client has not taken yet."""
        return self.transport.get_write_buffer_size()

    def leave(self) -> None:
        """The answer in progress is this connection's last. (What `shared.leaving` does for the next one.)"""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.keep_alive = False

    def close_if_idle(self) -> None:
        """Close a connection that waits for another request, unless one is already in its socket."""
        idle = self.cycle is not None and self.cycle.response_complete and not self.awaited
        if not idle or self.transport.is_closing():
            return
        if not self._has_unread():
            self.transport.close()

    # Requests and answers

    def begin_request(self) -> None:
        app = None if self._crowded else self._direct.get(self.url)
        if app is None:
            super().begin_request()
        else:
            self._begin_direct(app)
        cycle = self.cycle
        if self._crowded or self.shared.leaving:
            cycle.keep_alive = False
        client = self._newest = DirectResponse(self, cycle, app is not None)
        self.clients.add(client)
        cycle.scope["extensions"] = {EXTENSION: client}  # type: ignore[dict-item]

    def on_body(self, body: bytes) -> None:
        # As uvicorn's, in one.
        cycle, client, count = self.cycle, self._newest, len(body)
        self._framing -= count
        if cycle.response_complete:
            return
        if client is not None and (client.refusal is not None or not self.shared.bodies.take(client, count)):
            return
        cycle.body += body
        if len(cycle.body) > HIGH_WATER_LIMIT:
            self.flow.pause_reading()
        cycle.message_event.set()

    def on_message_complete(self) -> None:
        if self._newest is not None and self._newest.held > SHORT:
            self.shared.bodies.whole(self._newest)
        super().on_message_complete()

    def refuse(self, client: DirectResponse) -> None:
        """The body of a request is not taken, and its application does not ask for that."""
        assert client.refusal is not None
        if client._cycle is self.cycle:
            self._refuse(client.refusal)

    def _begin_direct(self, app: Any) -> None:
        """As uvicorn's `on_headers_complete`, for an application that asks no more of its scope than this."""
        parser, version = self.parser, self.version
        before = self.cycle
        # Its arguments by their places: names would be put into a dictionary and taken out again.
        self.cycle = cycle = RequestResponseCycle(
            {  # type: ignore[typeddict-item]
                "type": "http",
                "http_version": version,
                "method": parser.get_method().decode("latin-1"),
                "path": self.url.decode("latin-1"),
                "headers": self.headers,
                "client": self.client,
            },
            self.transport,
            self.flow,
            self.logger,
            self.access_logger,
            False,
            self.server_state.default_headers,
            _Event(),
            self.expect_100_continue,
            version != "1.0" and parser.should_keep_alive(),
            self.on_response_complete,
        )
        if before is None or before.response_complete:
            self._start_asgi_task(cycle, app)
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((cycle, app))

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        if self.flow.write_paused:
            # It has not read the answers that it asked for before: another would add to what is held for it.
            self._held_back = True
            self.pipeline.append((cycle, app))
            self.flow.pause_reading()
        else:
            super()._start_asgi_task(cycle, app)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_writes()
        if self.streaming is not None and self.streaming.flow is not None:
            self.streaming.flow.pause()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.streaming is not None and self.streaming.flow is not None:
            self.streaming.flow.resume()
        elif self._held_back and not self.transport.is_closing():
            self._held_back = False
            self._start_asgi_task(*self.pipeline.pop())

    def on_response_complete(self) -> None:
        if self.clients:
            # Answers that went through plain `send` end here too; the next request has a client of its own.
            for client in [client for client in self.clients if client._cycle.response_complete]:
                self.clients.discard(client)
                client.release()
        if self.transport.get_write_buffer_size():
            self._watch_writes()
        if self.cycle.response_complete:
            if self.cycle.more_body:
                self.linger()  # the rest of the body is nobody's, and may never end
            else:
                self._forget_request()
        if self._lingering is None:
            self._await_request()

    def _await_request(self) -> None:
        """As uvicorn's `on_response_complete`: the next request's turn, or a while in which it must come."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        elif self._refusal is not None:
            self._answer_refused(self._refusal)
        elif not self.awaited:  # else the limit on headers runs already
            self._idle.watch(self, self.loop)

    def overdue(self, seconds: float) -> None:
        if self.awaited:
            super().overdue(seconds)
        else:
            self.timeout_keep_alive_handler()

    def _unset_keepalive_if_required(self) -> None:
        self._idle.forget(self)

    def _forget_request(self) -> None:
        """Nothing of an answered request is kept; connections that wait for another are many, and most of a server."""
        self.cycle = _ANSWERED
        self._newest = None
        self.scope = self.headers = None  # type: ignore[assignment]
        self.url = b""

    def _watch_writes(self) -> None:
        """From now on the client must read, until all that is held for it has gone."""
        if self._write_deadline is None:
            self._write_deadline = self.loop.call_later(self.write_seconds, self._check_writes, self._taken())

    def _check_writes(self, taken: int) -> None:
        self._write_deadline = None
        if not self.transport.get_write_buffer_size():
            return
        now_taken = self._taken()
        if now_taken > taken:
            self._write_deadline = self.loop.call_later(self.write_seconds, self._check_writes, now_taken)
        else:
            self.transport.abort()  # not close(), which would wait for it

    def _taken(self) -> int:
        """A number that grows when the client reads."""
        sock = self.transport.get_extra_info("socket")
        if hasattr(socket, "TCP_INFO") and sock.family != socket.AF_UNIX:
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _ACKED.size)
            if len(info) == _ACKED.size:
                return int(_ACKED.unpack(info)[0])
        return -self.transport.get_write_buffer_size()


_NO_ROUTES: Mapping[bytes, Any] = {}


class _Answered:
    """What uvicorn asks of the last request of a connection: nothing is left of it to be done."""

    response_complete = True
    keep_alive = True
    more_body = False

    class message_event:
        @staticmethod
        def set() -> None: ...


_ANSWERED = cast(RequestResponseCycle, _Answered)


class _Event(asyncio.Event):
    """One without a deque, of which each connection and each request has one."""

    def __init__(self) -> None:
        self._waiters: list[asyncio.Future[Any]] = []  # type: ignore[assignment]
        self._value = False


class _Queue(list[Any]):
    """A `deque` as far as uvicorn uses it; one of these weighs 56 bytes and not 624."""

    def appendleft(self, item: Any) -> None:
        self.insert(0, item)
