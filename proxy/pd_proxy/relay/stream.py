"""Relays a streamed answer from the engine's socket to the client's.

Events are held until the first one that has content for the client, since the engine may still report an error under
status 200 (vLLM does when the KV cache cannot be loaded: a role chunk, then an error event). Until then the request can
be tried elsewhere. Tokens without content are held too: a stop string or a parser holds their text back. From the first
content on, each read from the engine is one write to the client. Ordinary token events take the fast path
(`fast_path.py`); the reader of the answer's dialect reads all others one by one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from time import monotonic

from pd_proxy.dialects.dialect import AnswerReader
from pd_proxy.dialects.engine_errors import engine_error
from pd_proxy.dialects.sse import EventReader
from pd_proxy.dialects.usage import Usage
from pd_proxy.errors import BackendCut, BackendError, BackendFailed, BackendGarbled, BackendTimedOut
from pd_proxy.http.connection import Connection
from pd_proxy.http.deadlines import Deadlines
from pd_proxy.http.response import ClientResponse
from pd_proxy.relay.fast_path import FastPath
from pd_proxy.relay.idle import IdleWatch
from pd_proxy.relay.phase import TRANSITIONS, Phase
from pd_proxy.relay.transcript import Transcript
from pd_proxy.telemetry.records import Distribution

log = logging.getLogger("pd_proxy.relay")

_HELD_LIMIT = 64 * 1024 * 1024  # the ids of a prompt of a million tokens are 7 MB, and come before the first token
_ERROR_BODY_LIMIT = 1024 * 1024
_WAITING_LIMIT = 1024 * 1024  # bytes of events that wait; more are left in the engine
_MANY = 4  # tokens in one read
# Seconds for which tokens without content are held, so that an engine that hides minutes of reasoning does not look
# dead.
_LONGEST_HOLD = 5.0

# Members of an enum cost more to look up than names of a module.
_HOLDING, _LIVE, _CLOSING, _OVER = Phase.HOLDING, Phase.LIVE, Phase.CLOSING, Phase.OVER


class StreamRelay:
    """A receiver that passes a stream of events on to a client.

    Arguments:
        url: the backend, for messages.
        client: gets the events.
        reader: reads the events, in the answer's dialect.
        transcript: keeps what the client has been sent.
        gaps: takes the seconds between tokens.
        begin: called once, with this relay, just before the first bytes are sent. It starts the client's answer.
        on_first_token: called once, with this relay, when the engine's first token has arrived, with or without
        content. pace: called now and then with the seconds that the engine takes for a token.
        idle: the time without a byte after which the stream counts as dead.
        loop: the running event loop, where it is known.
    Attributes:
        first_token: `time.monotonic` of the read that brought the first content; None before.
        headers: of the engine's answer.
        throttled: the client has been slow, so the pace of the stream does not show the pace of the engine.
    """

    __slots__ = (
        "_awaited",
        "_begin",
        "_begun",
        "_client",
        "_connection",
        "_deadlines",
        "_ended",
        "_error_body",
        "_events",
        "_fast_path",
        "_future",
        "_gaps",
        "_held",
        "_held_size",
        "_idle",
        "_idle_watch",
        "_loop",
        "_on_first_token",
        "_pace",
        "_phase",
        "_reader",
        "_status",
        "_transcript",
        "_unsent",
        "_url",
        "_waiting",
        "first_token",
        "headers",
        "throttled",
    )

    def __init__(
        self,
        url: str,
        client: ClientResponse,
        reader: AnswerReader,
        transcript: Transcript,
        gaps: Distribution,
        begin: Callable[[StreamRelay], None],
        *,
        on_first_token: Callable[[StreamRelay], None] | None = None,
        pace: Callable[[float], object] | None = None,
        idle: Deadlines,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self._url = url
        self._client = client
        self._reader = reader
        self._transcript = transcript
        self._gaps = gaps
        self._begin = begin
        self._on_first_token = on_first_token
        self._pace = pace
        self._idle = idle
        self._loop = loop or asyncio.get_running_loop()
        self._future: asyncio.Future[None] = self._loop.create_future()
        self._phase = _HOLDING
        self._awaited = reader.awaited
        self._connection: Connection | None = None
        self._fast_path: FastPath | None = None
        self._idle_watch: IdleWatch | None = None
        self._deadlines: Deadlines | None = None  # the limit for the first token
        self._events: EventReader | None = None  # needed from the first read that ends within an event
        self._held: list[bytes] = []  # sent to the client together with the first content
        self._held_size = 0
        self._unsent = b""  # sent together with what follows, or with the end of the answer
        self._waiting: list[bytes] = []  # blocks of events that cannot be read yet
        self._ended = False  # the engine's answer ended while they waited
        self._begun: float | None = None  # when the engine's first token came
        self._status = 0
        self._error_body = bytearray()
        self.headers: dict[bytes, bytes] = {}
        self.first_token: float | None = None
        self.throttled = False

    # What the flow uses

    async def run(self, connection: Connection, first_token: Deadlines) -> None:
        """Relay until the stream ends with the last event of its dialect.

        Arguments:
            first_token: the time limit for the first token.
        Raises:
            BackendError: the stream ended in any other way. While `live` is false the client has been sent nothing.
        """
        self._connection = connection
        self._fast_path = FastPath(connection, self._gaps, self._transcript, self._reader, self._pace)
        self._idle_watch = IdleWatch(self, self._loop, self._idle)
        self._client.flow = self
        if not self._future.done():
            self._deadlines = first_token
            first_token.watch(self, self._loop)
            if self._awaited is not None and not self._awaited.done():
                self._awaited.add_done_callback(self._read_waiting)
        try:
            await self._future
        finally:
            self._client.flow = None
            if self._deadlines is not None:
                self._deadlines.forget(self)
            self._idle_watch.stop()
            self._abort()
            self._fast_path.fold_times()
            if self._phase is not _OVER:  # it was cancelled
                self._phase = TRANSITIONS[self._phase][_OVER]

    def fail(self, error: BackendError) -> None:
        """End the stream from outside, as if the backend had failed with `error`."""
        self._abort()
        self.lost(error)

    def suspect(self, error: BackendError) -> None:
        """The backend fails its health checks: fail with `error` if the stream is silent from now on."""
        if self._idle_watch is not None:
            self._idle_watch.suspect(error)

    @property
    def phase(self) -> Phase:
        return self._phase

    @property
    def live(self) -> bool:
        """Whether the client has been sent anything of this leg."""
        return self.first_token is not None

    @property
    def usage(self) -> Usage | None:
        """The last usage that the engine reported, of this leg alone."""
        return self._reader.usage

    @property
    def sequence(self) -> int:
        """The number of the last event, where events are numbered; else -1."""
        return self._reader.sequence

    def given(self) -> tuple[int, float]:
        """The number of token events, and `time.monotonic` of the read that brought the last one; 0 before any."""
        return self._fast_path.given() if self._fast_path is not None else (0, 0.0)

    # FlowControl: called by the client's side

    def pause(self) -> None:
        self.throttled = True
        if self._fast_path is not None:
            self._fast_path.forget_pace()
        if self._idle_watch is not None:
            self._idle_watch.pause()
        if self._connection is not None:
            self._connection.pause()

    def resume(self) -> None:
        if self._idle_watch is not None:
            self._idle_watch.resume()
        if self._connection is not None:
            self._connection.resume()

    def stop(self) -> None:
        self._abort()

    # Receiver: called by the engine's side

    def head(self, status: int, headers: dict[bytes, bytes]) -> None:
        self._status = status
        self.headers = headers

    def data(self, data: bytes, last: bool) -> None:
        if self._status != 200:
            self._error_body += data[: _ERROR_BODY_LIMIT - len(self._error_body)]
            return
        try:
            if self._events is None and data[-2:] == b"\n\n":
                block = data
            else:
                if self._events is None:
                    self._events = EventReader()
                block = self._events.feed(data)
            if block:
                self._pass_on(block, last)
            if self._phase is _LIVE:
                self._open_fast_path()
        except BackendGarbled as error:
            self.fail(error)
        except Exception:
            self._transcript.give_up()
            raise

    def end(self) -> None:
        self._connection = None
        if self._waiting:
            self._ended = True  # whether the answer is whole is known once they are read
        elif self._phase is _CLOSING:
            self._conclude(None)
        elif self._reader.done:  # a whole stream without a token is not an answer
            self._finish(BackendFailed(f"{self._url} ended its stream without a token", status=502))
        elif self._status != 200:
            self._finish(engine_error(self._url, self._status, self.headers, bytes(self._error_body)))
        else:
            self._finish(BackendCut(f"{self._url} ended its stream without {self._reader.end_name}"))

    def lost(self, error: BackendError) -> None:
        self._connection = None
        try:
            if self._phase is _CLOSING:  # nothing is lost by a connection that breaks after the last event
                self._conclude(error)
        finally:
            self._finish(error)  # no effect if it has concluded

    # From reads to events to writes

    def _pass_on(self, block: bytes, last: bool) -> None:
        """Send whole events to the client, the last ones together with the end of its answer. They are held until one
        of them has content."""
        now = monotonic()
        fast_path, idle, reader = self._fast_path, self._idle_watch, self._reader
        assert fast_path is not None and idle is not None
        idle.last_read = now
        if self._awaited is None or self._awaited.done():
            shown, count = reader.read(block, last, fast_path)
        else:
            self._keep_waiting(block)
            shown, count = b"", 0
        if count:
            fast_path.count(count, now)
        if self._phase is _HOLDING:
            if self._future.done():
                return  # the flow has ended the leg in this turn of the event loop, and tries another backend
            if count and self._begun is None:
                self._note_first_token(now, last)
            if reader.failure is not None:  # the client has been sent nothing, so the request can be tried elsewhere
                reader.rewind()
                self.fail(reader.failure)
                return
            if not reader.has_content and (self._begun is None or now - self._begun < _LONGEST_HOLD):
                self._hold(shown)
                return
            if self._held:
                shown, self._held = b"".join(self._held) + shown, []
            self._go_live(now)
        self._write(shown, last, count)
        if count >= _MANY and not self._transcript.finished and self._connection is not None:
            self._connection.rest(self._loop)

    def _keep_waiting(self, block: bytes) -> None:
        """Keep events until they can be read. A failure of the engine among them is noticed at once."""
        self._reader.check(block)
        if self._reader.failure is not None:
            return
        self._waiting.append(block)
        if sum(map(len, self._waiting)) > _WAITING_LIMIT and self._connection is not None:
            self._connection.pause()

    def _read_waiting(self, _: object = None) -> None:
        """Read the events that waited: `awaited` of the reader is done."""
        if not self._waiting or self._future.done():
            return
        connection = self._connection
        block, self._waiting = b"".join(self._waiting), []
        try:
            if connection is not None:
                connection.resume()
            self._pass_on(block, self._ended)
            if self._ended and not self._future.done():
                self.end()
        except Exception as fault:  # the event loop called this, and would not fail the stream
            log.error("%s: the gateway failed on this engine's answer", self._url, exc_info=fault)
            self._transcript.give_up()
            self.fail(BackendGarbled(f"{self._url}: the gateway failed on its answer ({type(fault).__name__})"))

    def _hold(self, shown: bytes) -> None:
        if shown:
            self._held.append(shown)
        self._held_size += len(shown)
        if self._held_size + self._reader.kept > _HELD_LIMIT:
            self.fail(BackendGarbled(f"{self._url} sent {_HELD_LIMIT} bytes without a token"))

    def _go_live(self, now: float) -> None:
        """Begin the client's answer: from now on the client gets what the engine sends."""
        self._phase = TRANSITIONS[self._phase][_LIVE]
        self.first_token = now
        self._reader.go_live()
        self._begin(self)

    def _note_first_token(self, now: float, last: bool) -> None:
        """The first token has arrived: its time limit ends, and the limit for silence begins."""
        self._begun = now
        if self._deadlines is not None:
            self._deadlines.forget(self)
            self._deadlines = None
        if self._on_first_token is not None:
            self._on_first_token(self)
        if not last and self._connection is not None and self._idle_watch is not None:
            self._idle_watch.start()

    def _write(self, block: bytes, last: bool, tokens: int) -> None:
        reader = self._reader
        # A last event without tokens waits for the end of the engine's answer, which follows at once, so that both are
        # one write.
        if self._unsent:
            block, self._unsent = self._unsent + block, b""
        if reader.done:
            if self._phase is _LIVE:
                self._phase = TRANSITIONS[self._phase][_CLOSING]
            if last or not tokens:
                self._unsent, block = block, b""
        if block:
            self._client.write(block)
        if reader.failure is not None:
            self.fail(reader.failure)

    def _open_fast_path(self) -> None:
        """Let the next read take the fast path, unless a chunk or an event has been read in part."""
        connection, fast_path, reader = self._connection, self._fast_path, self._reader
        if connection is None or fast_path is None or self._client.gone:
            return
        if not fast_path.armed:
            if not reader.fast_path:
                return
            write = self._client.chunks()
            if write is None:
                return
            fast_path.arm(write)
            connection.divert(fast_path)
        if reader.pending or (self._events is not None and self._events.partial) or not connection.between_chunks:
            fast_path.block()
        else:
            fast_path.allow()

    # Endings

    def _conclude(self, error: BackendError | None) -> None:
        """End after the engine's last event. The answer is whole if it has a `finish_reason`; otherwise it has failed,
        with `error` if there is one."""
        if self._transcript.finished:
            self._client.end(self._unsent + self._reader.ending())
            self._finish(None)
            return
        if self._unsent:
            self._client.write(self._unsent)
        self._finish(error or BackendCut(f"{self._url} said [DONE] without a finish_reason"))

    def _finish(self, error: BackendError | None) -> None:
        if self._phase is not _OVER:
            self._phase = TRANSITIONS[self._phase][_OVER]
        if self._future.done():
            return
        if error is None:
            self._future.set_result(None)
        else:
            self._future.set_exception(error)

    def _abort(self) -> None:
        if self._fast_path is not None:
            self._fast_path.block()
        if self._connection is not None:
            self._connection.abort()
            self._connection = None

    def overdue(self, seconds: float) -> None:
        """Called when the first token did not come in time."""
        self.fail(BackendTimedOut(f"{self._url} sent no token within {seconds:g} s"))

    # Watched: called by the idle watch

    def last_token(self) -> float:
        return self.given()[1]

    def usual_gap(self) -> float:
        count, last = self.given()
        return (last - self._begun) / (count - 1) if count > 1 and self._begun is not None else 0.0

    def engine_is_silent(self, seconds: float) -> None:
        self.fail(BackendTimedOut(f"{self._url} sent nothing for {seconds:g} s"))

    def client_is_silent(self) -> None:
        self._client.cut()  # as long as it reads nothing, it occupies memory of the engine
