"""The relay of a streamed answer: from the engine's socket straight to the client's.

Until the first event that carries a token everything is held, since the engine may still answer with an error under
status 200 (vLLM does when the KV cache cannot be loaded: a role chunk, then an error event); so until then the request
can be tried elsewhere. From that event on, each read from the engine is one write to the client. What is not an
ordinary token event (usage, errors, the end) is recognised by what it lacks, and only that is parsed.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import Callable
from time import monotonic
from typing import Any

import msgspec

from proxy.errors import BackendCut, BackendError, BackendFailed, BackendGarbled, BackendTimedOut
from proxy.relay import events
from proxy.relay.answers import Usage, engine_error, engine_error_event, read_usage, strip_handoff
from proxy.relay.client import Client
from proxy.relay.http1 import Connection
from proxy.telemetry.records import Distribution

_HELD_LIMIT = 1024 * 1024
_ERROR_BODY_LIMIT = 1024 * 1024


class _Choice(msgspec.Struct):
    delta: dict[str, Any] | None = None
    text: str | None = None
    finish_reason: Any = None


class _Event(msgspec.Struct):
    """What the relay reads of an event when it reads one at all."""

    choices: list[_Choice] | None = None
    usage: msgspec.Raw = msgspec.Raw()
    error: Any = None


_decode_event = msgspec.json.Decoder(_Event).decode


def carries_token(event: _Event) -> bool:
    """Whether an event shows that decode has begun to answer: any choice beyond the opening role chunk."""
    for choice in event.choices or ():
        if choice.finish_reason is not None or choice.delta is None:
            return True
        if "role" not in choice.delta or any(v for k, v in choice.delta.items() if k != "role"):
            return True
    return False


class StreamRelay:
    """A receiver that passes a stream of events on to a client.

    Arguments:
        url: the backend, for messages.
        client: where the events go.
        begin: called once, just before the first bytes go out; it starts the client's answer.
        gaps: where the gaps between tokens are noted, in seconds.
        drop_usage: take out the closing usage event, which the gateway asked for and the client did not.
        idle: seconds without a byte after which the stream counts as dead, or None.
    Attributes:
        first_token, last_token: `time.monotonic` of the reads that brought them; None and 0 before.
        events: token events passed on.
        usage: the last usage the engine reported.
        throttled: the client has been slow, so that the stream's pace says nothing about the engine.
    """

    __slots__ = (
        "_begin",
        "_chunks",
        "_client",
        "_connection",
        "_done",
        "_drop_usage",
        "_error_body",
        "_failure",
        "_future",
        "_gaps",
        "_heard",
        "_held",
        "_idle",
        "_last",
        "_live",
        "_paused_since",
        "_reader",
        "_send",
        "_status",
        "_timer",
        "_url",
        "events",
        "first_token",
        "headers",
        "last_token",
        "throttled",
        "usage",
    )

    def __init__(
        self,
        url: str,
        client: Client,
        begin: Callable[[], None],
        gaps: Distribution,
        *,
        drop_usage: bool,
        idle: float | None,
    ) -> None:
        self._url = url
        self._client = client
        self._begin = begin
        self._gaps = gaps
        self._idle = idle
        self._drop_usage = drop_usage
        self._connection: Connection | None = None
        self._future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._reader = events.EventReader()
        self._held: list[bytes] = []
        self._heard = 0.0
        self._last = b""
        self._error_body = b""
        self._status = 0
        self._live = False
        self._chunks: Callable[[bytes], object] | None = None
        self._send: Callable[[bytes], object] | None = None  # `_chunks`, unless part of an event waits for its rest
        self._done = False
        self._failure: BackendError | None = None
        self._paused_since: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.headers: dict[bytes, bytes] = {}
        self.first_token: float | None = None
        self.last_token = 0.0
        self.events = 0
        self.usage: Usage | None = None
        self.throttled = False

    # What the flow uses

    async def run(self, connection: Connection, first_token_timeout: float | None) -> None:
        """Relay until the engine's stream ends with `[DONE]`.

        Raises:
            BackendError: it ended in any other way. If `first_token` is None the client has seen nothing.
        """
        self._connection = connection
        self._client.flow = self
        if first_token_timeout is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(first_token_timeout, self._time_out, first_token_timeout)
        try:
            await self._future
        finally:
            self._client.flow = None
            self._chunks = self._send = None
            if self._timer is not None:
                self._timer.cancel()
            self._abort()

    def fail(self, error: BackendError) -> None:
        """End the stream from outside, as if the backend had failed with `error`."""
        self._abort()
        self.lost(error)

    @property
    def live(self) -> bool:
        """Whether the client has been given anything."""
        return self._live

    # Flow: called by the client's side

    def pause(self) -> None:
        self.throttled = True
        self._paused_since = monotonic()
        if self._connection is not None:
            self._connection.pause()

    def resume(self) -> None:
        self._paused_since = None
        self._heard = monotonic()  # time spent waiting for the client is not the engine's silence
        if self._connection is not None:
            self._connection.resume()

    def stop(self) -> None:
        self._chunks = self._send = None
        self._abort()

    # Receiver: called by the engine's side

    def head(self, status: int, headers: dict[bytes, bytes]) -> None:
        self._status = status
        self.headers = headers

    def chunk(self, chunk: bytes) -> bool:
        # The gateway's hottest lines. One event alone in its chunk (behind the size line, of at most six bytes, the
        # first line end begins the empty line at the chunk's end), which is a token's and nothing else, is counted and
        # passed on, framing and all. `_count` is the same in slow.
        if (
            self._send is None
            or chunk.find(b"\n", 6) != len(chunk) - 4
            or chunk[-4:] != b"\n\n\r\n"
            or b'"choices":[{' not in chunk
            or b'_transfer_params"' in chunk
        ):
            return False
        now = monotonic()
        gap = now - self.last_token
        self.last_token = now
        self.events += 1
        gaps = self._gaps
        gaps.counts[bisect_left(gaps.bounds, gap)] += 1
        gaps.sum += gap
        self._send(chunk)
        return True

    def data(self, data: bytes, last: bool) -> None:
        if not self._live:
            self._hold(data, last)
            return
        try:
            block = self._reader.feed(data)
        except BackendGarbled as error:
            self.fail(error)
            return
        if block:
            self._pass_on(block, last)
        self._send = self._chunks if not self._reader.rest else None

    def _count(self, count: int) -> None:
        """Token events have arrived together just now."""
        now = monotonic()
        gap = now - self.last_token
        self.last_token = self._heard = now
        self.events += count
        gaps = self._gaps
        gaps.counts[bisect_left(gaps.bounds, gap)] += 1
        gaps.sum += gap
        if count > 1:  # tokens that came together have no gap between them
            gaps.counts[0] += count - 1

    def _pass_on(self, block: bytes, last: bool) -> None:
        """Whole events go to the client; the last ones together with the end of its answer."""
        block, count = self._take(block)
        if count:
            self._count(count)
        else:
            self._heard = monotonic()
        self._write(block, last, count)

    def _write(self, block: bytes, last: bool, tokens: int) -> None:
        # `[DONE]` alone waits for the end of the engine's answer, which is on its way, so that both go out at once.
        block, self._last = self._last + block, b""
        if self._done and (last or not tokens):
            self._last = block
        elif block:
            self._client.write(block)
        if self._failure is not None:
            self.fail(self._failure)

    def _take(self, block: bytes) -> tuple[bytes, int]:
        """What of a block the client is given, and the number of its token events."""
        count = block.count(b"\n\n")
        ordinary = count and count == block.count(b'"choices":[{') and b"\r" not in block
        if ordinary and b'_transfer_params"' not in block:
            return block, count
        return self._inspect(events.split(block))

    def end(self) -> None:
        self._connection = None
        if self._done:
            if self._live:
                self._client.end(self._last)
                self._finish(None)
            else:  # a whole stream without a token is no answer
                self._finish(BackendFailed(f"{self._url} ended its stream without a token", status=502))
        elif self._status != 200:
            self._finish(engine_error(self._url, self._status, self.headers, self._error_body))
        else:
            self._finish(BackendCut(f"{self._url} ended its stream without [DONE]"))

    def lost(self, error: BackendError) -> None:
        self._connection = None
        if self._done and self._live:  # a connection that breaks after [DONE] broke nothing
            self._client.end(self._last)
            self._finish(None)
        else:
            self._finish(error)

    # Before the first token

    def _hold(self, data: bytes, last: bool) -> None:
        if self._status != 200:
            self._error_body = (self._error_body + data)[:_ERROR_BODY_LIMIT]
            return
        try:
            block = self._reader.feed(data)
        except BackendGarbled as error:
            self.fail(error)
            return
        found = events.split(block)
        for position, event in enumerate(found, 1):
            payload = events.payload(event)
            if payload == b"[DONE]":
                self._done = True
                return
            self._held.append(event)
            if not payload:
                continue
            try:
                parsed = _decode_event(payload)
            except msgspec.MsgspecError as error:
                self.fail(BackendGarbled(f"{self._url} sent an event that is no answer: {error}"))
                return
            if parsed.error is not None:
                self.fail(engine_error_event(self._url, payload))
                return
            if carries_token(parsed):
                self._go_live(found[position:], last)
                return
        if sum(map(len, self._held)) > _HELD_LIMIT:
            self.fail(BackendGarbled(f"{self._url} sent {_HELD_LIMIT} bytes without a token"))

    def _go_live(self, more: list[bytes], last: bool) -> None:
        """The first token is here: from now on the client sees what the engine sends.

        Arguments:
            more: events that came after the first token in the same read.
        """
        self._live = True
        self.first_token = self.last_token = self._heard = monotonic()
        self.events = 1
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._idle is not None:
            self._timer = asyncio.get_running_loop().call_later(self._idle, self._check_idle)
        opening = b"".join(self._held)
        self._held.clear()
        self._begin()
        if b'_transfer_params"' in opening:
            opening = b"".join(without_handoff(event) for event in events.split(opening))
        if more:
            rest, count = self._inspect(more)
            opening += rest
            self.events += count
            self._gaps.counts[0] += count  # tokens that came together have no gap between them
        self._write(opening, last, self.events)
        self._chunks = self._client.chunks()
        self._send = self._chunks if not self._reader.rest else None

    # Events that are not plain tokens

    def _inspect(self, found: list[bytes]) -> tuple[bytes, int]:
        """Read events one by one.

        Returns them without what the client must not see, and the number of token events among them.
        """
        kept: list[bytes] = []
        count = 0
        for event in found:
            payload = events.payload(event)
            if not payload:
                kept.append(event)  # a comment that keeps the connection alive
                continue
            if payload == b"[DONE]":
                self._done = True
                kept.append(event)
                continue
            try:
                parsed = _decode_event(payload)
            except msgspec.MsgspecError:
                kept.append(event)  # nothing we know; the client may
                continue
            if parsed.error is not None:
                # Told to the flow once the events before it are out; the flow says it to the client in its own words.
                self._failure = engine_error_event(self._url, payload)
                break
            if usage := read_usage(parsed.usage):
                self.usage = usage
                if not parsed.choices and self._drop_usage:
                    continue
            if parsed.choices and carries_token(parsed):
                count += 1
            kept.append(without_handoff(event))
        return b"".join(kept), count

    # Endings

    def _time_out(self, seconds: float) -> None:
        self.fail(BackendTimedOut(f"{self._url} sent no token within {seconds:g} s"))

    def _check_idle(self) -> None:
        """Fires at most once an idle period: a stream that moves costs one timer in that time, not one a token."""
        assert self._idle is not None
        since = self._paused_since or max(self._heard, self.last_token)
        left = since + self._idle - monotonic()
        if left > 0:
            self._timer = asyncio.get_running_loop().call_later(left, self._check_idle)
        elif self._paused_since is not None:
            self._client.cut()  # it reads nothing, and holds an engine's memory
        else:
            self.fail(BackendTimedOut(f"{self._url} sent nothing for {self._idle:g} s"))

    def _abort(self) -> None:
        if self._connection is not None:
            self._connection.abort()
            self._connection = None

    def _finish(self, error: BackendError | None) -> None:
        if self._future.done():
            return
        if error is None:
            self._future.set_result(None)
        else:
            self._future.set_exception(error)


def without_handoff(event: bytes) -> bytes:
    """An event without the hand-off's members, which name the engines' addresses."""
    if b'_transfer_params"' not in event:
        return event
    return b"data: %b\n\n" % strip_handoff(events.payload(event))
