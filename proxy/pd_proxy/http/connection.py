"""One connection to an engine: HTTP/1.1 over an asyncio transport, parsed by httptools.

A connection serves one exchange at a time and goes along the table of `connection_state.py`. No read costs a task or a
future. Every failure of the socket or of the parser reaches the exchange's receiver as one `BackendError`.

A step that has just compared the state assigns the next one without a lookup in the table: the lookups would cost a
request 0.5 % of its instructions. `tests/http/test_connection_state.py` checks each assignment against the table.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import Protocol, cast

import httptools

from pd_proxy.errors import BackendCut, BackendError, BackendGarbled
from pd_proxy.http.connection_state import TRANSITIONS, ConnectionState
from pd_proxy.http.deadlines import Deadlines
from pd_proxy.http.receiver import Receiver

HEAD_LIMIT = 64 * 1024
"""Bytes of an answer's status line and headers at most, and of framing between two pieces of its body."""
_IDLE, _UNSENT, _HEAD, _BODY, _WHOLE, _LAST, _OVER = ConnectionState

log = logging.getLogger("pd_proxy.relay")


class Owner(Protocol):
    """The owner of a connection, such as its `Origin`.

    Attributes:
        url: of the engine, for messages.
        rests: the time for which a connection rests (`Connection.rest`).
    """

    url: str
    rests: Deadlines

    def give(self, connection: Connection) -> None:
        """Take the connection back: its exchange has ended, and another may begin."""


class Connection(asyncio.Protocol):
    """One connection to an engine, and the exchange on it.

    Attributes:
        between_chunks: the last read ended where a chunk of the chunked coding ends. The next read need not come here
            if it is one whole chunk: the parser's state is the same before and after it.
        idle_since: when the connection was given back to its owner, as `time.monotonic`.
    """

    __slots__ = (
        "_answered",
        "_body",
        "_chunk_complete",
        "_diverted",
        "_fresh",
        "_headers",
        "_origin",
        "_overhead",
        "_parser",
        "_paused",
        "_receiver",
        "_request",
        "_resting",
        "_sent",
        "_state",
        "_transport",
        "between_chunks",
        "idle_since",
        "on_body",
        "on_chunk_complete",
        "on_chunk_header",
    )

    def __init__(self, origin: Owner) -> None:
        self._origin = origin
        self._body: list[bytes] = []
        self._chunk_complete: list[bool] = []  # not empty if the last thing that was read of a chunk is its end
        # The parser calls these for each event of a stream. Methods of lists cost a tenth of Python functions.
        self.on_body = self._body.append
        self.on_chunk_header = self._chunk_complete.clear
        self.on_chunk_complete = partial(self._chunk_complete.append, True)
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._receiver: Receiver | None = None
        self._state = _IDLE
        self._request: tuple[bytes | memoryview, ...] = ()  # while it is unsent
        self._sent: Callable[[], object] | None = None
        self._headers: dict[bytes, bytes] = {}
        self._overhead = 0  # bytes read since the last that were a whole head, or of a body
        self._answered = 0  # of the pieces of `_body`, those that belong to the answer and not to a second one
        self._fresh = True  # no answer has come whole on this connection
        self._diverted = False
        self._paused = False
        self._resting = False
        self.between_chunks = False
        self.idle_since = 0.0

    # What the origin and the receivers use.

    def begin(
        self,
        receiver: Receiver,
        head: bytes,
        body: tuple[bytes | memoryview, ...],
        post: Callable[[Connection], object] | None = None,
        sent: Callable[[], object] | None = None,
    ) -> None:
        """Begin an exchange.

        Arguments:
            body: in pieces.
            post: a function that lets `send` be called soon; without it the request is sent at once.
            sent: called when the request has been sent.
        """
        self._state = TRANSITIONS[self._state][_UNSENT]
        self._receiver = receiver
        self._headers = {}
        self._overhead = 0
        self._sent = sent
        if len(body) == 1 and len(body[0]) < 4096:  # a copy is cheaper than a second buffer in the system call
            self._request = (head + body[0],)
        else:
            self._request = (head, *body)
        if post is None:
            self.send()
        else:
            post(self)

    def send(self) -> None:
        """Send the exchange's request, unless the exchange is over."""
        if self._state is not _UNSENT:
            return
        if self._transport is None or self._transport.is_closing():
            # The engine closed the connection after it was made or taken, and before this write.
            self._lose(self._cut())
            return
        self._state = _HEAD
        request, self._request = self._request, ()
        if len(request) == 1:
            self._transport.write(request[0])
        else:
            self._transport.writelines(request)
        sent, self._sent = self._sent, None
        if sent is not None:
            sent()

    def abort(self) -> None:
        """End the exchange now, and call its receiver no more. The engine sees the connection close, and frees what the
        request held."""
        self._state = _OVER  # which may follow every state
        self._receiver = None
        self._request = ()
        if self._transport is not None:
            self._transport.abort()

    def broken(self, receiver: Receiver | None, fault: Exception) -> None:
        """End an exchange on which the gateway's own code has failed: the last resort. Its leg fails as if its engine
        had failed, so that nothing waits for an answer that will not come. The connection is not used again."""
        log.error("%s: the gateway failed on this engine's answer", self._origin.url, exc_info=fault)
        self.abort()
        if receiver is not None:
            why = f"{self._origin.url}: the gateway failed on its answer ({type(fault).__name__})"
            self._report_lost(receiver, BackendGarbled(why))

    def divert(self, protocol: asyncio.Protocol) -> None:
        """Let another protocol have the reads of this exchange. It passes on to this connection what it does not
        handle."""
        if self._transport is not None:
            self._diverted = True
            self._transport.set_protocol(protocol)

    @property
    def is_open(self) -> bool:
        """Whether the socket is open, as far as the gateway has seen."""
        return self._transport is not None and not self._transport.is_closing()

    def pause(self) -> None:
        """Stop reading, so that a slow client slows its engine and does not fill the gateway's memory."""
        self._paused = True
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def rest(self, loop: asyncio.AbstractEventLoop) -> None:
        """Stop reading for the time of `rests`: so much comes that it costs less when it is read together."""
        if self._transport is not None and not self._resting and not self._transport.is_closing():
            self._resting = True
            self._transport.pause_reading()
            self._origin.rests.watch(self, loop)

    def overdue(self, seconds: float) -> None:
        """Read again after a rest."""
        self._resting = False
        if not self._paused and self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def resume(self) -> None:
        """Read again after `pause`."""
        self._paused = False
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        receiver = self._receiver
        if receiver is None:  # no request was sent: these bytes say why the engine closes the connection
            if self._transport is not None:
                self._transport.abort()
            return
        try:
            if self._state is _UNSENT:  # as above
                self._fail(self._cut())
                return
            self._overhead += len(data)
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserUpgrade:
                self._fail(BackendGarbled(f"{self._origin.url} wanted to switch protocols"))
                return
            except httptools.HttpParserCallbackError as error:
                raise error.__context__ or error from None
            except httptools.HttpParserError as error:
                self._unparsable(receiver, error)
                return
            state = self._state
            if state is _OVER:  # the receiver has aborted the exchange in `head`
                return
            complete = state is _WHOLE or state is _LAST
            # The size line of the next chunk may have begun, which the parser does not tell: the last bytes show it.
            self.between_chunks = data[-2:] == b"\r\n" if self._chunk_complete else False
            body = self._body
            if complete and len(body) > self._answered:
                del body[self._answered :]  # of a second answer, where one was asked for
            if body:
                data = body[0] if len(body) == 1 else b"".join(body)
                body.clear()
                self._overhead = 0
                receiver.data(data, complete)
            elif self._overhead > HEAD_LIMIT and not complete:
                what = "headers" if state is _HEAD else "framing without a body"
                self._fail(BackendGarbled(f"{self._origin.url} sent more than {HEAD_LIMIT} bytes of {what}"))
                return
            if complete and self._receiver is receiver:
                self._finish(receiver)
        except BackendGarbled as error:
            self._fail(error)
        except Exception as fault:
            self.broken(receiver, fault)

    def _unparsable(self, receiver: Receiver, error: httptools.HttpParserError) -> None:
        """Fail the exchange: what was read is not HTTP from some byte on. The receiver gets what came before that
        byte."""
        if self._state is _OVER:
            return
        if self._state is not _BODY:
            del self._body[self._answered :]
        if good := b"".join(self._body):
            self._body.clear()
            receiver.data(good, False)
        if self._receiver is receiver:
            self._fail(BackendGarbled(f"{self._origin.url} did not speak HTTP: {error}"))

    def eof_received(self) -> None:
        return None

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        receiver = self._receiver
        if receiver is None:
            return
        if self._state is _BODY and self._ends_with_connection():
            self._state = _OVER
            self._receiver = None
            try:
                receiver.end()
            except Exception as fault:
                self.broken(receiver, fault)
        elif exc is None or isinstance(exc, OSError):
            self._lose(self._cut())
        else:  # raised by the protocol that has the reads; the event loop ends the connection for it
            self.broken(receiver, exc)

    # httptools callbacks

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._state is _HEAD:  # else a trailer
            self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if not 100 <= status <= 599:
            raise BackendGarbled(f"{self._origin.url} answered with status {status}")
        if status < 200:  # 100 Continue and early hints: the answer is still to come
            self._headers = {}
            return
        if self._state is _HEAD:
            self._state = _BODY
            self._overhead = 0
            if self._receiver is not None:
                self._receiver.head(status, self._headers)

    def on_message_begin(self) -> None:
        if self._state is _WHOLE:  # a second answer where one was asked for: the first is good, the connection is not
            self._state = _LAST

    def on_message_complete(self) -> None:
        self._chunk_complete.clear()
        if self._state is _BODY:
            # Only now: the parser forgets what the answer's framing was as soon as this returns.
            self._state = _WHOLE if self._parser.should_keep_alive() else _LAST
            self._answered = len(self._body)

    # Endings

    def _ends_with_connection(self) -> bool:
        """Whether the answer has neither a length nor chunks, so that the end of the connection is its end."""
        return b"content-length" not in self._headers and b"transfer-encoding" not in self._headers

    def _finish(self, receiver: Receiver) -> None:
        self._receiver = None
        self._fresh = False
        transport = self._transport
        if self._state is _WHOLE and transport is not None and not transport.is_closing():
            self._state = _IDLE
            if self._diverted:
                self._diverted = False
                transport.set_protocol(self)
            if self._paused or self._resting:
                transport.resume_reading()
                self._paused = False
                if self._resting:
                    self._resting = False
                    self._origin.rests.forget(self)
            self._origin.give(self)
        else:
            self.abort()
        try:
            receiver.end()
        except Exception as fault:
            self.broken(receiver, fault)

    def _report_lost(self, receiver: Receiver, error: BackendError) -> None:
        try:
            receiver.lost(error)
        except Exception:
            log.exception("%s: a leg could not be ended", self._origin.url)

    def _fail(self, error: BackendError) -> None:
        receiver = self._receiver
        self.abort()
        if receiver is not None:
            self._report_lost(receiver, error)

    def _cut(self) -> BackendCut:
        """The error for an engine that has closed the connection. One that had kept the connection, and closes it
        before the head of an answer is whole, is not to blame: most likely the connection was idle for too long."""
        unread, blame = self._state is _UNSENT, self._fresh or self._state is _BODY
        return BackendCut(f"{self._origin.url} closed the connection", unread=unread, blame=blame)

    def _lose(self, error: BackendError) -> None:
        """End the exchange of a connection that has ended."""
        self._state = TRANSITIONS[self._state][_OVER]
        self._request = ()
        receiver, self._receiver = self._receiver, None
        if receiver is not None:
            self._report_lost(receiver, error)
