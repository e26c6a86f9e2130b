"""Streams whose events have types: those of Anthropic's messages, of OpenAI's responses and of SGLang's `/generate`.

`NamedEvents` describes the events of one API: which open an answer, which bring tokens and which end it. `NamedReader`
reads a stream by that description.
"""

from __future__ import annotations

import asyncio

import msgspec

from pd_proxy.decoding import Undecodable, is_null, json_decoder
from pd_proxy.dialects import sse
from pd_proxy.dialects import whole as whole_answers
from pd_proxy.dialects.aborts import abort_in, aborted
from pd_proxy.dialects.cache_counts import CacheCounts
from pd_proxy.dialects.dialect import TokenLog, TokenPath
from pd_proxy.dialects.edit import Edit
from pd_proxy.dialects.engine_errors import engine_error_event
from pd_proxy.dialects.prompt_logprobs import PromptLogprobs
from pd_proxy.dialects.sse import write_event
from pd_proxy.dialects.strip import names_handoff, strip_handoff
from pd_proxy.dialects.token_pattern import TokenPattern
from pd_proxy.dialects.usage import Usage, read_usage
from pd_proxy.dialects.whole import WholeAnswer, decode_whole
from pd_proxy.encoding import ABSENT, encode_json
from pd_proxy.errors import BackendError, BackendGarbled, BackendPreempted


class NamedEvent(msgspec.Struct):
    """What is read of an event.

    Attributes:
        sequence_number: its place in the stream, where events are numbered; else -1.
    """

    type: str = ""
    sequence_number: int = -1
    usage: msgspec.Raw = ABSENT
    response: msgspec.Raw = ABSENT
    error: msgspec.Raw = ABSENT
    delta: msgspec.Raw = ABSENT


class _Answer(msgspec.Struct):
    usage: msgspec.Raw = ABSENT
    error: msgspec.Raw = ABSENT


_decode_event = json_decoder(NamedEvent)
_decode_answer = json_decoder(_Answer)


class NamedEvents(msgspec.Struct, frozen=True):
    """The dialect of one API with such events.

    Attributes:
        generated: the member of a whole answer that holds what was generated.
        opening: types of the events without content for the client: those before the first token, and those that close
            an item without content. An engine may send them and then fail.
        tokens: suffix of the types of events that bring tokens.
        last: types of the events that end an answer.
        failed: types of the events by which the engine reports that it cannot finish.
        inside: members of an event that hold the answer's own object, and with it its usage.
        preempted: bytes in an event by which an engine reports that it dropped the request to free memory; or empty.
        ends: types of the events that have the reason why the answer ended.
    """

    generated: str
    opening: frozenset[str]
    tokens: str
    last: frozenset[str]
    failed: frozenset[str]
    inside: tuple[str, ...]
    preempted: bytes = b""
    ends: frozenset[str] = frozenset()

    # The dialect

    def reader(
        self,
        url: str,
        edit: Edit,
        transcript: TokenLog,
        *,
        drop_usage: bool,
        prompts: int = 0,
        logprobs: PromptLogprobs | None = None,
    ) -> NamedReader:
        return NamedReader(self, url, edit, transcript)

    def whole(self, url: str, answer: bytes) -> WholeAnswer:
        return whole_answers.read_checked(self, url, answer)

    def abort_reason(self, answer: bytes) -> object:
        return whole_answers.abort_reason(self, answer)

    # Answers in one piece, for `whole.py`

    @property
    def preempted_whole(self) -> bytes:
        return self.preempted

    def decode_whole(self, answer: bytes) -> WholeAnswer:
        return decode_whole(answer)

    def abort_reason_of(self, answer: WholeAnswer) -> object:
        return abort_in(answer.choices)

    def error_payload(self, answer: bytes, parsed: WholeAnswer) -> bytes:
        return b'{"error":%b}' % bytes(parsed.error)

    # Events

    @property
    def rewrites(self) -> bool:
        """Whether every event must be written again by `rewritten`."""
        return False

    @property
    def awaited(self) -> asyncio.Future[None] | None:
        """Done when events can be read; None where they always can."""
        return None

    def read(self, payload: bytes) -> NamedEvent:
        """Decode an event.

        Raises:
            BackendGarbled: it is not an event of this API.
        """
        try:
            return _decode_event(payload)
        except Undecodable as error:
            raise BackendGarbled(f"an event that is no answer: {error}") from None

    def failure(self, event: NamedEvent, payload: bytes) -> bytes:
        """An object with the `error` that an event reports; empty where it reports none."""
        if event.type not in self.failed:
            return b"" if is_null(event.error) else payload
        if memoryview(event.error):
            return payload
        try:
            error = _decode_answer(event.response).error
        except Undecodable:
            error = ABSENT
        # The members of OpenAI's own `error` event stand beside its type.
        return encode_json({"error": error if memoryview(error) else msgspec.Raw(payload)})

    def abort_reason_in(self, event: NamedEvent) -> object:
        """The reason in an event of `ends` by which the engine aborted the request; None where it did not."""
        return None

    def is_empty(self, event: NamedEvent) -> bool:
        """Whether an event that counts as a token has no content for the client."""
        return False

    def usage(self, event: NamedEvent) -> Usage | None:
        """The usage in an event."""
        if not memoryview(event.response):
            return read_usage(event.usage)
        try:
            return read_usage(_decode_answer(event.response).usage)
        except Undecodable:
            return None

    def rewritten(self, name: str, payload: bytes) -> bytes:
        """An event as the client sees it, without what belongs to the hand-off."""
        return write_event(strip_handoff(payload), name.encode())

    def recounted(self, event: bytes, name: str, payload: bytes, counts: CacheCounts) -> bytes:
        """An event with a usage, with prefill's counts in it."""
        changed = counts.into(payload)
        for inside in self.inside:
            changed = counts.into(changed, inside)
        return event if changed == payload else write_event(changed, name.encode())


class NamedReader:
    """Reads one stream of named events.

    Arguments:
        events: the description of its API's events.
        url: the backend, for messages.
        edit: only its `counts` apply to such events.
        transcript: its `finished` is set when the answer is whole.
    Attributes: those of `AnswerReader`.
    """

    __slots__ = (
        "_edit",
        "_events",
        "_last_event",
        "_live",
        "_transcript",
        "_url",
        "done",
        "failure",
        "has_content",
        "sequence",
        "usage",
    )

    kept = 0
    pending = b""
    fast_path = False
    end_name = "its last event"

    def __init__(self, events: NamedEvents, url: str, edit: Edit, transcript: TokenLog) -> None:
        self._events = events
        self._url = url
        self._edit = edit
        self._transcript = transcript
        self._live = False
        self._last_event = b""
        self.sequence = -1
        self.done = False
        self.failure: BackendError | None = None
        self.has_content = False
        self.usage: Usage | None = None

    @property
    def awaited(self) -> asyncio.Future[None] | None:
        return self._events.awaited

    def go_live(self) -> None:
        self._live = True

    def rewind(self) -> None:
        """Nothing to do: such events are not written down."""

    def ending(self) -> bytes:
        return self._last_event

    def pattern(self, sample: bytes) -> TokenPattern | None:
        return None

    def check(self, block: bytes) -> None:
        for _, payload in sse.read(block):
            try:
                failed = self._events.failure(self._events.read(payload), payload) if payload else b""
            except (BackendGarbled, Undecodable) as error:
                self.failure = BackendGarbled(f"{self._url} sent what cannot be read: {error}")
                return
            if failed:
                self.failure = engine_error_event(self._url, failed)
                return

    def read(self, block: bytes, last: bool, fast_path: TokenPath) -> tuple[bytes, int]:
        """Read events. The first one behind the opening events counts as a token even if it brings none, since an
        answer may be empty."""
        events = self._events
        counts = None if self._edit.counts is None else self._edit.counts()
        shown: list[bytes] = []
        count = 0
        for event, payload in sse.read(block):
            if self.done:
                self._last_event += event
                continue
            if not payload:
                shown.append(event)  # a comment that keeps the connection alive
                continue
            try:
                named = events.read(payload)
                if events.rewrites or names_handoff(event):
                    event = events.rewritten(named.type, payload)
                    payload = sse.payload(event)
            except (BackendGarbled, Undecodable) as error:
                self.failure = BackendGarbled(f"{self._url} sent what cannot be read: {error}")
                break
            self.failure = self._failure(named, payload)
            if self.failure is not None:
                break
            usage = events.usage(named)
            if usage is not None:
                self.usage = usage
            if counts is not None and (usage is not None or named.type in events.opening):
                event = events.recounted(event, named.type, payload, counts)
            if named.type in events.last:
                self.done = self._transcript.finished = True
                self._last_event = event
            else:
                shown.append(event)
            self.sequence = max(self.sequence, named.sequence_number)
            if named.type.endswith(events.tokens) or (
                not count and not self._live and named.type not in events.opening
            ):
                count += 1
                if not self.has_content:
                    self.has_content = not events.is_empty(named)
        return b"".join(shown), count

    def _failure(self, event: NamedEvent, payload: bytes) -> BackendError | None:
        """The error that an event stands for, if it stands for one."""
        events = self._events
        if failed := events.failure(event, payload):
            return engine_error_event(self._url, failed)
        if event.type in events.ends and (reason := events.abort_reason_in(event)) is not None:
            return aborted(self._url, reason)
        if events.preempted and payload.find(events.preempted) >= 0:
            return BackendPreempted(f"{self._url} gave the request up for want of memory")
        return None
