"""One connection to an engine: HTTP/1.1 over an asyncio transport, parsed by httptools.

A connection serves one exchange at a time. It costs no task and no future for each read. Whatever the socket or the
parser says reaches the exchange's receiver as a `BackendError`, once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import Protocol, cast

import httptools

from pd_proxy.errors import BackendCut, BackendError, BackendGarbled
from pd_proxy.http.deadlines import Deadlines
from pd_proxy.http.receiver import Receiver

HEAD_LIMIT = 64 * 1024

log = logging.getLogger("pd_proxy.relay")


class Owner(Protocol):
    """What a connection asks of the origin that it belongs to (`origin.py`)."""

    url: str
    rests: Deadlines

    def give(self, connection: Connection) -> None: ...


class Connection(asyncio.Protocol):
    """One connection to an engine, and the exchange that is on it.

    Attributes:
        between_chunks: the last read ended where a chunk of the chunked coding ends. A read that is one whole chunk
            need not come here then: the parser's state is the same before and after it.
        idle_since: when it was given back, as `time.monotonic`.
    """

    __slots__ = (
        "_answered",
        "_body",
        "_chunk_complete",
        "_complete",
        "_diverted",
        "_fresh",
        "_head_bytes",
        "_headers",
        "_in_head",
        "_origin",
        "_parser",
        "_paused",
        "_receiver",
        "_request",
        "_resting",
        "_reusable",
        "_sent",
        "_surplus",
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
        self._chunk_complete: list[bool] = []  # not empty: the last thing read of a chunk was its end
        # The parser calls these for each event of a stream: methods of lists cost a tenth of functions of ours.
        self.on_body = self._body.append
        self.on_chunk_header = self._chunk_complete.clear
        self.on_chunk_complete = partial(self._chunk_complete.append, True)
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._receiver: Receiver | None = None
        self._request: tuple[bytes | memoryview, ...] | None = None  # until it is sent
        self._sent: Callable[[], object] | None = None
        self._headers: dict[bytes, bytes] = {}
        self._in_head = True
        self._head_bytes = 0
        self._complete = False
        self._answered = 0  # of the pieces of `_body`, those that came before the answer was complete
        self._fresh = True
        self._reusable = False
        self._surplus = False
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
        """Start an exchange.

        Arguments:
            post: has `send` called soon; without it the request is sent at once.
            sent: called when it has been.
        """
        assert self._receiver is None, "a connection serves one exchange at a time"
        self._receiver = receiver
        self._headers = {}
        self._in_head = True
        self._head_bytes = 0
        self._complete = False
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
        request = self._request
        if request is None:
            return
        if self._transport is None or self._transport.is_closing():
            # The engine went away between the connection's birth and this write.
            self._lose(self._cut())
            return
        self._request = None
        if len(request) == 1:
            self._transport.write(request[0])
        else:
            self._transport.writelines(request)
        sent, self._sent = self._sent, None
        if sent is not None:
            sent()

    def abort(self) -> None:
        """End the exchange now; the engine sees its connection close and frees what the request held."""
        self._receiver = None
        self._request = None
        if self._transport is not None:
            self._transport.abort()

    def broken(self, receiver: Receiver | None, fault: Exception) -> None:
        """The last resort: the gateway's own code failed on an exchange. Its leg fails as if its engine had, so that
        nobody waits for an answer that will not come; the connection is not used again."""
        log.error("%s: the gateway failed on this engine's answer", self._origin.url, exc_info=fault)
        self.abort()
        if receiver is not None:
            why = f"{self._origin.url}: the gateway failed on its answer ({type(fault).__name__})"
            self._tell_lost(receiver, BackendGarbled(why))

    def divert(self, protocol: asyncio.Protocol) -> None:
        """Let another protocol have the reads of this exchange first; what is not for it, it passes on to here."""
        if self._transport is not None:
            self._diverted = True
            self._transport.set_protocol(protocol)

    def pause(self) -> None:
        """Stop reading, so that a slow client slows its engine and not our memory."""
        self._paused = True
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def rest(self, loop: asyncio.AbstractEventLoop) -> None:
        """Do not read for `_REST` seconds: so much comes that it is cheaper taken together."""
        if self._transport is not None and not self._resting and not self._transport.is_closing():
            self._resting = True
            self._transport.pause_reading()
            self._origin.rests.watch(self, loop)

    def overdue(self, seconds: float) -> None:
        """It has rested."""
        self._resting = False
        if not self._paused and self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def resume(self) -> None:
        self._paused = False
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        receiver = self._receiver
        if receiver is None:  # bytes that nobody asked for
            self.abort()
            return
        try:
            if self._in_head:
                if self._request is not None:  # nor these: it says why it closes a connection that was idle
                    self._fail(self._cut())
                    return
                self._head_bytes += len(data)
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
            if self._in_head and self._head_bytes > HEAD_LIMIT:
                self._fail(BackendGarbled(f"{self._origin.url} sent more than {HEAD_LIMIT} bytes of headers"))
                return
            # The next chunk's size may have begun without the parser saying so, hence the look at the last bytes.
            self.between_chunks = data.endswith(b"\r\n") if self._chunk_complete else False
            if self._complete:
                del self._body[self._answered :]  # of a second answer, where one was asked for
            if self._body:
                body = self._body
                data = body[0] if len(body) == 1 else b"".join(body)
                body.clear()
                receiver.data(data, self._complete)
            if self._complete and self._receiver is receiver:
                self._finish(receiver)
        except BackendGarbled as error:
            self._fail(error)
        except Exception as fault:
            self.broken(receiver, fault)

    def _unparsable(self, receiver: Receiver, error: httptools.HttpParserError) -> None:
        """What was read is not HTTP from some byte on. The receiver gets what came before that byte."""
        if self._complete:
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
        if not self._in_head and self._parser_ends_at_close():
            self._receiver = None
            try:
                receiver.end()
            except Exception as fault:
                self.broken(receiver, fault)
        elif exc is None or isinstance(exc, OSError):
            self._lose(self._cut())
        else:  # an exception of the protocol that has the reads, which is what the event loop ends a connection for
            self.broken(receiver, exc)

    # httptools callbacks

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if not 100 <= status <= 599:
            raise BackendGarbled(f"{self._origin.url} answered with status {status}")
        if status < 200:  # 100 Continue and early hints: the answer is still to come
            self._headers = {}
            return
        if self._complete:
            return
        self._in_head = False
        if self._receiver is not None:
            self._receiver.head(status, self._headers)

    def on_message_begin(self) -> None:
        # A second answer where one was asked for: the first is good, the connection is not.
        self._surplus = self._complete

    def on_message_complete(self) -> None:
        self._chunk_complete.clear()
        if not self._in_head and not self._complete:
            self._complete = True
            self._answered = len(self._body)
            # Only now: the parser forgets what the answer's framing was as soon as this returns.
            self._reusable = self._parser.should_keep_alive()

    # Endings

    def _parser_ends_at_close(self) -> bool:
        """Whether the answer had neither a length nor chunks, so that the close is its end."""
        return b"content-length" not in self._headers and b"transfer-encoding" not in self._headers

    def _finish(self, receiver: Receiver) -> None:
        self._receiver = None
        self._fresh = False
        transport = self._transport
        if self._reusable and not self._surplus and transport is not None and not transport.is_closing():
            if self._diverted:
                self._diverted = False
                transport.set_protocol(self)
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

    def _tell_lost(self, receiver: Receiver, error: BackendError) -> None:
        try:
            receiver.lost(error)
        except Exception:
            log.exception("%s: a leg could not be ended", self._origin.url)

    def _fail(self, error: BackendError) -> None:
        receiver = self._receiver
        self.abort()
        if receiver is not None:
            self._tell_lost(receiver, error)

    def _cut(self) -> BackendCut:
        """The engine has closed the connection. One that it had kept, and closes before the first byte of an answer, it
        most likely closes for idleness."""
        unread, blame = self._request is not None, self._fresh or not self._in_head
        return BackendCut(f"{self._origin.url} closed the connection", unread=unread, blame=blame)

    def _lose(self, error: BackendError) -> None:
        self._request = None
        receiver, self._receiver = self._receiver, None
        if receiver is not None:
            self._tell_lost(receiver, error)
