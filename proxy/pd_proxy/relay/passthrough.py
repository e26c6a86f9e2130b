"""Passes an engine's answer on to the client as it is: events as they arrive, every other answer in one piece.

It serves the routes whose answers the gateway neither counts nor continues. It guarantees that a client gets whole
events, that an error under status 200 is reported as an error, that no part of a hand-off is sent, and that an answer
in one piece is sent only when it is whole, so that another engine can be tried until then.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable

import msgspec

from pd_proxy.decoding import Undecodable, WrongShape, is_null, json_decoder
from pd_proxy.dialects.aborts import abort_in, aborted
from pd_proxy.dialects.engine_errors import engine_error_event
from pd_proxy.dialects.sse import EventReader, read
from pd_proxy.dialects.strip import names_handoff, strip_event, strip_handoff
from pd_proxy.encoding import ABSENT
from pd_proxy.errors import BackendCut, BackendError, BackendGarbled, BackendTimedOut
from pd_proxy.http.connection import Connection
from pd_proxy.http.deadlines import Deadlines
from pd_proxy.http.response import ClientResponse

EVENTS = b"text/event-stream"
_JSON = b"application/json"
# The content types with which engines answer these routes, with subtitles and embeddings as bytes. HTML, for example,
# would come from another proxy.
_TYPES = frozenset({_JSON, EVENTS, b"text/plain", b"text/vtt", b"application/x-subrip", b"application/octet-stream"})
_PASSED = (b"content-type", b"metadata")  # the latter describes the embeddings in an octet-stream
_ERROR = b'{"error":'


_ENDS = re.compile(rb'"finish_reason"\s*:\s*(?!null|\s)')


class _Event(msgspec.Struct):
    """What is read of an event with a `finish_reason`."""

    choices: msgspec.Raw = ABSENT


class _Object(msgspec.Struct):
    """What is read of the top level of an answer. The rest is only checked to be JSON."""

    usage: msgspec.Raw = ABSENT
    error: msgspec.Raw = ABSENT
    choices: msgspec.Raw = ABSENT


_decode_event = json_decoder(_Event)
_decode_object = json_decoder(_Object)


class Passthrough:
    """The receiver of such an answer, and the flow control of its client.

    Arguments:
        url: the backend, for messages.
        begin: starts the client's stream; called before its first event.
        limit: bytes of an answer that does not come in events.
        first: the time limit from `sent` to the answer's first byte.
        idle: the time limit between two reads of events; for other answers, from the head to the end.
    Attributes:
        connection: the connection of the request, once it is being sent. The sender sets it.
        status, headers: of the answer.
        answered: done when the answer is whole or has failed.
    """

    def __init__(
        self,
        url: str,
        client: ClientResponse,
        begin: Callable[[], object],
        *,
        limit: int,
        first: Deadlines,
        idle: Deadlines,
    ) -> None:
        self._url = url
        self._client = client
        self._begin = begin
        self._limit = limit
        self._first = first
        self._idle = idle
        self._loop = asyncio.get_running_loop()
        self._watched: Deadlines | None = None
        self._reader: EventReader | None = None
        self._body = bytearray()
        self.answered: asyncio.Future[None] = self._loop.create_future()
        self.connection: Connection | None = None
        self.status = 0
        self.headers: dict[bytes, bytes] = {}

    def sent(self) -> None:
        """Start the time limit for the first byte: the request has been sent whole."""
        if not self.status and not self.answered.done():
            self._watch(self._first)

    @property
    def streamed(self) -> bool:
        """Whether the answer comes in events."""
        return self._reader is not None

    @property
    def body(self) -> bytes:
        """The answer's bytes, where it does not come in events."""
        return bytes(self._body)

    def whole(self) -> tuple[bytes, msgspec.Raw]:
        """An answer in one piece, as the client gets it, and its usage.

        Raises:
            BackendError: the answer is an error, or is not JSON though its type says so.
        """
        if self._type != _JSON:
            return self.body, ABSENT
        body = self.body
        try:
            shown = strip_handoff(body)
            parsed = _decode_object(body)
        except WrongShape:  # a list, say
            return shown, ABSENT
        except Undecodable as error:
            raise BackendGarbled(f"{self._url} answered 200 with what is not JSON: {error}") from None
        if not is_null(parsed.error):
            raise engine_error_event(self._url, body)
        if (reason := abort_in(parsed.choices)) is not None:
            raise aborted(self._url, reason)
        return shown, parsed.usage

    def passed_headers(self) -> list[tuple[bytes, bytes]]:
        """The engine's headers that the client gets too."""
        return [(name, self.headers[name]) for name in _PASSED if name in self.headers]

    def fail(self, error: BackendError) -> None:
        """End the exchange from outside, as if the backend had failed with `error`."""
        self.abort()
        self.lost(error)

    def abort(self) -> None:
        """Close the connection: the answer is no longer wanted."""
        self._watch(None)
        if self._client.flow is self:
            self._client.flow = None
        if self.connection is not None:
            self.connection.abort()
            self.connection = None

    def overdue(self, seconds: float) -> None:
        self._watched = None
        what = f"was silent for {seconds:g} s" if self.status else f"did not answer within {seconds:g} s"
        self.fail(BackendTimedOut(f"{self._url} {what}"))

    # Receiver: called by the connection

    def head(self, status: int, headers: dict[bytes, bytes]) -> None:
        self.status = status
        self.headers = headers
        self._watch(self._idle)
        if headers.get(b"content-encoding", b"identity").strip().lower() not in (b"identity", b""):
            # That header is not passed on, and the bytes cannot be searched for a hand-off.
            self.fail(BackendGarbled(f"{self._url} answered in an encoding that was not asked for"))
        elif status != 200:
            return
        elif self._type not in _TYPES:
            self.fail(BackendGarbled(f"{self._url} answered with {self._type[:64]!r}, which is no engine's answer"))
        elif self._type == EVENTS:
            self._reader = EventReader()

    def data(self, data: bytes, last: bool) -> None:
        if self.answered.done():
            return
        if self._reader is None:
            self._body += data
            if len(self._body) > self._limit:
                self.fail(BackendGarbled(f"{self._url} answered with more than {self._limit} bytes"))
            return
        self._watch(self._idle)
        try:
            block = self._reader.feed(data)
            if block:
                self._pass_on(block)
        except BackendError as error:
            self.fail(error)

    def end(self) -> None:
        self.connection = None
        self._watch(None)
        if self._reader is not None and (self._reader.partial.strip() or not self._client.started):
            self.lost(BackendCut(f"{self._url} ended its events in the middle"))
        elif not self.answered.done():
            self.answered.set_result(None)

    def lost(self, error: BackendError) -> None:
        self.connection = None
        self._watch(None)
        if not self.answered.done():
            self.answered.set_exception(error)

    # FlowControl: called by the client's side

    def pause(self) -> None:
        self._watch(None)  # the client causes the silence
        if self.connection is not None:
            self.connection.pause()

    def resume(self) -> None:
        if self.connection is not None:
            self.connection.resume()
            self._watch(self._idle)

    def stop(self) -> None:
        self.abort()

    def _pass_on(self, block: bytes) -> None:
        """Pass whole events on to the client."""
        if _ERROR in block or names_handoff(block) or _ENDS.search(block):
            events: list[bytes] = []
            for event, payload in read(block):
                failed = (
                    engine_error_event(self._url, payload) if payload.startswith(_ERROR) else self._aborted(payload)
                )
                if failed is not None:
                    if events:
                        self._write(b"".join(events))
                    raise failed
                try:
                    events.append(strip_event(event, payload))
                except Undecodable:
                    why = f"{self._url} sent an event with a hand-off in it that is not JSON"
                    raise BackendGarbled(why) from None
            block = b"".join(events)
        self._write(block)

    def _aborted(self, payload: bytes) -> BackendError | None:
        """The error that an event stands for if the engine gives the request up with it; else None."""
        if not _ENDS.search(payload):
            return None
        try:
            reason = abort_in(_decode_event(payload).choices)
        except Undecodable:
            return None
        return None if reason is None else aborted(self._url, reason)

    def _write(self, block: bytes) -> None:
        if not self._client.started:
            self._begin()
            self._client.flow = self
        self._client.write(block)

    @property
    def _type(self) -> bytes:
        return self.headers.get(b"content-type", b"").partition(b";")[0].strip().lower()

    def _watch(self, deadlines: Deadlines | None) -> None:
        if self._watched is not None:
            self._watched.forget(self)
        self._watched = deadlines
        if deadlines is not None:
            deadlines.watch(self, self._loop)
