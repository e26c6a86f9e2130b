"""OpenAI's chat and completions, and other APIs whose answers have choices.

A stream consists of events with choices, an event with the usage, and `[DONE]`. The transcript keeps what the client
has been sent, so that another engine can continue the answer.
"""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

import msgspec

from pd_proxy.decoding import UNDECODABLE, Undecodable, bare_json_decoder
from pd_proxy.dialects import sse
from pd_proxy.dialects import whole as whole_answers
from pd_proxy.dialects.aborts import ORDINARY, abort_in, abort_of, aborted, ends_well
from pd_proxy.dialects.choices import (
    OPENING_FRAME,
    Choice,
    Event,
    carries_token,
    count_ordinary,
    has_content,
    has_more,
    inner_ids,
    is_frame,
    is_ordinary,
    is_preempted,
)
from pd_proxy.dialects.dialect import TokenLog, TokenPath
from pd_proxy.dialects.edit import Edit, take_prompt_ids
from pd_proxy.dialects.engine_errors import engine_error_event
from pd_proxy.dialects.prompt_logprobs import PromptLogprobs
from pd_proxy.dialects.strip import names_handoff
from pd_proxy.dialects.token_pattern import NOT_FINISHED, TokenPattern, learn_pattern
from pd_proxy.dialects.usage import Usage, read_usage
from pd_proxy.dialects.whole import WholeAnswer, decode_whole
from pd_proxy.encoding import ABSENT
from pd_proxy.errors import BackendError, BackendGarbled, BackendPreempted

_LARGE = 2048  # bytes of several events
_FIRST_EVENTS = 3  # the opening one, one with the prompt's ids, one like those that follow
_PREEMPTED = b'"stop_reason":"recomputed"'


_decode_event = bare_json_decoder(Event)


class ChoicesDialect:
    """The dialect of an API whose answers have choices."""

    __slots__ = ()

    generated = "choices"
    preempted_whole = _PREEMPTED

    def reader(
        self,
        url: str,
        edit: Edit,
        transcript: TokenLog,
        *,
        drop_usage: bool,
        prompts: int = 0,
        logprobs: PromptLogprobs | None = None,
    ) -> ChoicesReader:
        return ChoicesReader(url, edit, transcript, drop_usage, edit.hide_ids)

    def whole(self, url: str, answer: bytes) -> WholeAnswer:
        return whole_answers.read_checked(self, url, answer)

    def abort_reason(self, answer: bytes) -> object:
        return None if ends_well(answer) else whole_answers.abort_reason(self, answer)

    # Answers in one piece, for `whole.py`

    def decode_whole(self, answer: bytes) -> WholeAnswer:
        return decode_whole(answer)

    def abort_reason_of(self, answer: WholeAnswer) -> object:
        return abort_in(answer.choices)

    def error_payload(self, answer: bytes, parsed: WholeAnswer) -> bytes:
        return answer


CHAT = ChoicesDialect()


class ChoicesReader(msgspec.Struct, eq=False):
    """Reads one stream of choices.

    Arguments:
        url: the backend, for messages.
        edit: the changes to this leg's events.
        transcript: keeps what the client has been sent.
        drop_usage: take out the closing usage event.
    Attributes: those of `AnswerReader`. `pending` has events without text.
    """

    sequence: ClassVar[int] = -1
    end_name: ClassVar[str] = "[DONE]"
    awaited: ClassVar[asyncio.Future[None] | None] = None

    _url: str
    _edit: Edit
    _transcript: TokenLog
    _drop_usage: bool
    _hide_ids: bool
    _live: bool = False
    """The client is sent what is read."""
    _prompt: bytes = b""
    """Ids of the prompt."""
    _opening: bytes | None = None
    """The first event with a choice, as the client sees it."""
    _opened: bool = False
    """The transcript has that."""
    _early_ids: list[bytes] = []
    """Of tokens that came before there was something to read."""
    _early_size: int = 0
    """Bytes of them."""
    pending: bytes = b""
    """Events without text, as the client sees them; sent with the next event that has text."""
    _last_event: bytes = b""
    _names_handoff: bool = False
    """The block that is read may name the hand-off."""
    done: bool = False
    failure: BackendError | None = None
    has_content: bool = False
    usage: Usage | None = None

    @property
    def kept(self) -> int:
        return len(self._prompt) + self._early_size

    @property
    def fast_path(self) -> bool:
        # Where the client wants the ids itself, events are parsed, so that the transcript gets the ids too.
        return self._hide_ids or not self._transcript.continuable

    def pattern(self, sample: bytes) -> TokenPattern | None:
        return learn_pattern(sample, self._edit, with_ids=self._hide_ids)

    def go_live(self) -> None:
        self._live = True
        if not self._opened and self._opening is not None:
            self._open(self._opening)

    def rewind(self) -> None:
        if self._opened:
            self._transcript.rewind()

    def ending(self) -> bytes:
        if self.usage is None and not self._drop_usage and self._transcript.continuable:
            return self._transcript.closing(usage=True)  # the engine left out the usage that the client wants
        return self._last_event

    def check(self, block: bytes) -> None:
        """Nothing to do: such events never wait."""

    def read(self, block: bytes, last: bool, fast_path: TokenPath) -> tuple[bytes, int]:
        if not self._live:
            if len(block) <= _LARGE:
                return self._inspect(block, last, fast_path)
            return self._read_first(block, last, fast_path)
        if not self._transcript.continuable and self._edit.idle and (count := count_ordinary(block)):
            if count == 1:
                fast_path.learn(block)
            return block, count
        if len(block) <= _LARGE and block.find(NOT_FINISHED) < 0:
            return self._inspect(block, last, fast_path)
        return self._read_rest(block, last, fast_path, b"", 0)

    def _read_first(self, block: bytes, last: bool, fast_path: TokenPath) -> tuple[bytes, int]:
        """Read the beginning of an answer with many events in one read: the first ones are parsed as samples."""
        rest = block.split(b"\n\n", _FIRST_EVENTS)[-1]
        shown, count = self._inspect(block[: len(block) - len(rest)], False, fast_path)
        if self.failure is not None:
            return shown, count
        return self._read_rest(rest, last, fast_path, shown, count)

    def _read_rest(self, rest: bytes, last: bool, fast_path: TokenPath, shown: bytes, count: int) -> tuple[bytes, int]:
        """Read events without parsing the ordinary ones at their front. `shown` and `count` are the result so far."""
        if (self._live or count) and (self._hide_ids or not self._transcript.continuable):
            more, taken, rest = fast_path.take(rest)
            if taken:
                shown += self.pending + more
                self.pending = b""
                count += taken
        if rest:
            more, taken = self._inspect(rest, last, fast_path)
            shown += more
            count += taken
        return shown, count

    def _inspect(self, block: bytes, last: bool, fast_path: TokenPath) -> tuple[bytes, int]:
        """Parse events one by one, up to one that stands for an error; `failure` is set then."""
        shown: list[bytes] = []
        count = 0
        learns = None if last else fast_path
        self._names_handoff = names_handoff(
            block
        )  # searched for once in the whole block, since hardly any event has it
        for event, payload in sse.read(block):
            if payload == b"[DONE]":
                self.done = True
                self._last_event = event
                continue
            if not payload:
                shown.append(event)  # a comment that keeps the connection alive
                continue
            if self._opening is None and self._hide_ids and not self._prompt:
                one_line = event[:6] == b"data: " and len(event) == len(payload) + 8  # with the two line ends
                event, self._prompt = take_prompt_ids(event)
                if self._prompt:
                    payload = event[6:-2] if one_line else sse.payload(event)
            try:
                parsed = _decode_event(payload)
            except UNDECODABLE as error:
                self.failure = BackendGarbled(f"{self._url} sent an event that is no answer: {error}")
                break
            if parsed.error is not None:
                self.failure = engine_error_event(self._url, payload)
                break
            try:
                if parsed.choices:
                    if parsed.choices[0].stop_reason is not None and is_preempted(parsed):
                        raise BackendPreempted(f"{self._url} gave the request up for want of memory")
                    if parsed.usage is not ABSENT:
                        event, payload = self._note_usage(event, payload, parsed.usage)
                    count += self._read_choices(event, payload, parsed, shown, learns)
                else:
                    shown.append(self._read_closing(event, payload, parsed.usage))
            except Undecodable as error:
                self.failure = BackendGarbled(f"{self._url} sent an event that cannot be edited: {error}")
                break
            except BackendError as error:
                self.failure = error
                break
        return b"".join(shown), count

    def _read_closing(self, event: bytes, payload: bytes, raw_usage: msgspec.Raw) -> bytes:
        """An event without choices as the client sees it; mostly the one with the usage."""
        if raw_usage is not ABSENT and (usage := read_usage(raw_usage)):
            self.usage = usage
            if self._drop_usage:
                return b""
        return self._edit.closing(event, payload, self.usage)

    def _read_choices(
        self, event: bytes, payload: bytes, parsed: Event, shown: list[bytes], learns: TokenPath | None
    ) -> int:
        """Read an event with choices, and append what the client sees of it. Returns 1 for a token event, else 0.

        Raises:
            BackendError: the engine aborts the request with it.
            Undecodable: something must be changed in it, and it is not JSON.
        """
        choices = parsed.choices or []  # there are some
        choice, several = choices[0], len(choices) > 1
        delta, finished = choice.delta, choice.finish_reason is not None
        content = choice.text if delta is None else delta.get("content")
        visible = True if content else delta is not None and has_more(delta)
        if several or (finished and choice.finish_reason not in ORDINARY):
            self._check_aborted(choices)
        ids = b"" if choice.token_ids is ABSENT else bytes(choice.token_ids)
        hidden = not visible and not finished and delta is not None and self._is_hidden(delta, payload)
        as_shown = b"" if hidden else self._edit.event(event, payload, ids, self._names_handoff)
        if self._opening is None:
            self._opening = as_shown
            if not self._prompt:
                self._prompt = inner_ids(bytes(parsed.prompt_token_ids) or bytes(choice.prompt_token_ids))
        # The opening role chunk does not show that decode has begun; any choice beyond it does.
        token = visible or finished or delta is None or "role" not in delta or (several and carries_token(choices))
        if not self.has_content and token:
            self.has_content = visible or self._live or has_content(choices)
        if not token or not self.has_content:
            if ids:
                self._keep_early(ids)
            shown.append(as_shown)
            return int(token)
        transcript = self._transcript
        if not self._opened:
            self._open(self._opening)
        if finished or several:
            transcript.close([each.index for each in choices if each.finish_reason is not None])
        if visible and not content:
            transcript.mark_inexact("tool_calls" if delta is not None and delta.get("tool_calls") else "reasoning")
        if transcript.continuable:
            transcript.note(ids[1:-1] if ids[:1] == b"[" else b"", content or visible)
            if not visible and not finished and (delta is None or "role" not in delta):
                self.pending += as_shown  # if the stream is resumed before the next text, this token is generated again
                return 1
        if self.pending:
            as_shown, self.pending = self.pending + as_shown, b""
        shown.append(as_shown)
        if visible and learns is not None and is_ordinary(choices):
            learns.learn(event)
        return 1

    def _note_usage(self, event: bytes, payload: bytes, raw_usage: msgspec.Raw) -> tuple[bytes, bytes]:
        """Keep the usage of an event with choices. Returns the event and its payload with prefill's counts in them."""
        if usage := read_usage(raw_usage):
            self.usage = usage
            if usage.prompt_tokens_details is not None:
                return self._edit.recounted(event, payload)
        return event, payload

    def _check_aborted(self, choices: list[Choice]) -> None:
        """Raise an error if the engine aborts the request with these choices. Text in the same event belongs to tokens
        after the last one whose text was sent, and is generated again.

        Raises:
            BackendError
        """
        if (reason := abort_of(choices)) is not None:
            raise aborted(self._url, reason)

    def _keep_early(self, ids: bytes) -> None:
        """Keep the ids of tokens that arrived before the first content."""
        self._early_ids.append(ids)
        self._early_size += len(ids)

    def _open(self, opening: bytes) -> None:
        """Begin the transcript: the client is about to get the first event, and the events before the first content."""
        self._opened = True
        self._transcript.mark()
        if not self._transcript.first:
            self._transcript.open(opening, self._prompt)
        for ids in self._early_ids:
            self._transcript.note(inner_ids(ids), False)

    def _is_hidden(self, delta: dict[str, Any], payload: bytes) -> bool:
        """Whether an event without text must not be sent: it has nothing that the client asked for, and it would not
        exist if the gateway had not asked for token ids (a parser holds its token back), or it opens an answer that has
        already begun."""
        if not delta:
            return self._hide_ids and is_frame(payload)
        opens_again = self._edit.identity is not None and not self._edit.opens and "role" in delta
        return opens_again and is_frame(payload, frame=OPENING_FRAME)
