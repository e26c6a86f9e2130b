"""The part of an answer that the client has, kept so that another engine can continue exactly from there.

Token ids are kept as the engine wrote them, decimal digits between commas: nothing is parsed for a stream that never
fails, and the request that continues it needs them in that form again. Invariant: `truncate` returns the tokens up to
the last one whose text has been sent, and no others.

An engine holds text back while a character is incomplete, so a token may come without text. To continue behind such a
token would lose the text that was held back; tokens at the end that brought no text are therefore generated again
(`docs/resume.md` says what was tried).
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from pd_proxy.decoding import decode_members, json_decoder
from pd_proxy.dialects.sse import DONE, payload
from pd_proxy.encoding import encode_json

_decode_text = json_decoder(str)
_IDENTITY = ("id", "object", "created", "model", "system_fingerprint")
_IDS = b"0123456789, \t\r\n"
_BATCH = 32  # events whose ids are put away together
_END = 16  # tokens; a character is four at most


_Mark = tuple[bytes, bytes, bool, bool, bool, tuple[int, int, int]]
_BLANK: _Mark = (b"", b"", False, False, False, (0, 0, 0))


class Transcript:
    """One answer so far.

    Arguments:
        inexact: the reason why it cannot be continued exactly from the start, or empty.
        limit: bytes that prompt and answer may take; a longer answer is not kept, and cannot be continued.
        with_text: keep the text as well as the ids. Where a parser may hold back a part of a token's text, only a
            comparison of both shows it.
    Attributes:
        continuable: there is something to go on from, exactly or not.
        inexact: the first reason why the answer cannot be continued exactly, or empty.
        fresh: ids of the latest events, each of which came with text; `fold` moves them to the others.
        fresh_text: the text of these events, as it stands in their JSON; None when text is not kept.
        finished: the client has been given a `finish_reason`.
        unsure: the latest text came with several tokens at once, the last of which may be half a character.
        dropped: tokens will be generated again whose event has been sent, but not their text.
        first: the first event as the client saw it.
        choices: how many answers the stream has.
    """

    __slots__ = (
        "_ended",
        "_ids",
        "_inexact_then",
        "_limit",
        "_mark",
        "_prompt",
        "_sent",
        "_text",
        "choices",
        "continuable",
        "dropped",
        "finished",
        "first",
        "fresh",
        "fresh_text",
        "inexact",
        "unsure",
    )

    def __init__(self, inexact: str = "", *, limit: int = 1 << 20, with_text: bool = False, choices: int = 1) -> None:
        self._limit = limit
        self._text = bytearray()  # as in the engine's JSON, escapes and all
        self.fresh_text: list[bytes] | None = [] if with_text else None
        self._prompt = b""
        self.continuable = False
        self._ids = bytearray()  # ",5,17,3"
        self._sent = 0  # bytes of _ids up to the last token whose text was sent
        self.inexact = inexact
        self.fresh: list[bytes] = []
        self.finished = False
        self.unsure = False
        self.dropped = False
        self.first = b""
        self.choices = choices
        self._ended: set[object] = set()
        self._mark: _Mark | None = None  # nothing was written down before
        self._inexact_then = inexact

    def close(self, indexes: Iterable[object]) -> None:
        """Note that the client is sent a `finish_reason` for these choices."""
        if self.choices > 1:
            self._ended.update(indexes)
            if not self._ended:
                return
        self.finished = True

    @property
    def whole(self) -> bool:
        """The client has been given the `finish_reason` of every choice."""
        return self.finished and (self.choices == 1 or len(self._ended) >= self.choices)

    def mark(self) -> None:
        """Remember the state before a leg, for `rewind`."""
        self._inexact_then = self.inexact
        if self.first or self.continuable:
            self.fold()
            lengths = len(self._ids), self._sent, len(self._text)
            self._mark = (self.first, self._prompt, self.continuable, self.finished, self.unsure, lengths)

    def rewind(self) -> None:
        """Return to the state at `mark`: the client will not be given what has been written down since."""
        first, prompt, continuable, finished, unsure, (ids, sent, text) = self._mark or _BLANK
        self.fresh.clear()
        if self.fresh_text is not None:
            self.fresh_text.clear()
        if prompt and not self._prompt:
            return  # it became too long, and the earlier state is gone
        self.first, self._prompt, self.continuable, self.inexact = first, prompt, continuable, self._inexact_then
        self.finished, self.unsure, self._sent = finished, unsure, sent
        del self._ids[ids:], self._text[text:]
        self._ended.clear()

    def open(self, first: bytes, prompt: bytes) -> None:
        """Begin with the first event.

        Arguments:
            first: the event, as the client sees it.
            prompt: ids of the prompt, `1,2,3`; empty if the engine sent none.
        """
        self.first = first
        if not prompt:
            self.mark_inexact("no_token_ids")
        elif len(prompt) > self._limit:
            self.mark_inexact("too_long")
        else:
            self._prompt = prompt
            self.continuable = True

    def verify(self) -> None:
        """Check that the ids are numbers, before they become a part of a request.

        It is not done earlier: to look at the ids of a long prompt would cost every stream what only a broken one
        needs."""
        self.fold()
        if (self._prompt + self._ids).translate(None, _IDS):
            self.mark_inexact("no_token_ids")

    def mark_inexact(self, reason: str) -> None:
        """Note that the answer cannot be continued exactly. Only the first reason is kept."""
        if not self.inexact:
            self.inexact = reason
        if reason in ("no_token_ids", "too_long", "fault"):  # it cannot be continued inexactly either
            self._prompt = b""
            self.continuable = False
            self._ids.clear()
            self._text.clear()
            self._sent = 0

    def give_up(self) -> None:
        """Keep nothing: the gateway's own code failed on an event, and it is not known what of it the client has."""
        self.mark_inexact("fault")
        self.finished = False

    def note(self, ids: bytes, text: str | bool) -> None:
        """Write down an event that has been passed on.

        Arguments:
            ids: of its tokens, `5` or `5,6`.
            text: the event's text, or whether it has anything else for the client.
        """
        if text:
            if not ids:
                self.mark_inexact("no_token_ids")
                return
            self.fresh.append(ids)
            if self.fresh_text is not None and isinstance(text, str):
                self.fresh_text.append(encode_json(text)[1:-1])
            if len(self.fresh) > _BATCH:
                self.fold()
        elif ids:
            self.fold()
            self._ids += b"," + ids
            self._check_limit()

    def fold(self) -> None:
        """Move `fresh` to the ids and the text of earlier events."""
        if self.fresh:
            if self._prompt:
                self._ids += b"," + b",".join(self.fresh)
                self._text += b"".join(self.fresh_text or ())
                self._sent = len(self._ids)
                self.unsure = self.fresh[-1].find(b",") >= 0
                self._check_limit()
            self.fresh.clear()
            if self.fresh_text is not None:
                self.fresh_text.clear()

    @property
    def identity(self) -> dict[str, msgspec.Raw]:
        """The members that every event of the answer has, as JSON: `id`, `created`, `object`, `model` and the like."""
        members = decode_members(payload(self.first))
        return {name: members[name] for name in _IDENTITY if name in members}

    @property
    def text(self) -> str | None:
        """The text that the client has been sent; None when text is not kept."""
        self.fold()
        return None if self.fresh_text is None else _decode_text(b'"' + self._text + b'"')

    def answer(self) -> bytes:
        """Ids of the answer up to the last token whose text was sent."""
        self.fold()
        return bytes(self._ids[1 : self._sent])

    @property
    def said(self) -> int:
        """The number of tokens whose text the client has."""
        self.fold()
        return self._ids.count(b",", 0, self._sent)

    def truncate(self) -> bytes:
        """Drop the tokens behind the last one whose text was sent; returns the ids of prompt and answer up to it."""
        self.fold()
        del self._ids[self._sent :]
        return self._prompt + bytes(self._ids)

    def end(self) -> bytes:
        """Ids of the last tokens whose text was sent: enough to see whether the text ends with a whole character."""
        self.fold()
        return b",".join(bytes(self._ids[1 : self._sent]).split(b",")[-_END:])

    def drop_last(self) -> None:
        """Treat the last token whose text was sent as one whose text was not sent."""
        self.fold()
        self.dropped = True
        self._sent = max(0, self._ids.rfind(b",", 0, self._sent))

    @property
    def total(self) -> int:
        """The number of tokens of the answer, with those without text; after a `finish_reason`, the engine's count."""
        self.fold()
        return self._ids.count(b",")

    @property
    def prompt(self) -> bytes:
        """The ids of the prompt as its engine wrote them, `1,2,3`; empty where they are not known or not kept."""
        return self._prompt

    @property
    def prompt_tokens(self) -> int:
        return self._prompt.count(b",") + 1 if self._prompt else 0

    def closing(self, *, finish: str = "", usage: bool) -> bytes:
        """Returns the events that end an answer whose tokens were all sent.

        Arguments:
            finish: a `finish_reason` to send first, or empty.
            usage: whether the client wants the usage event.
        """
        said = self.total
        events = b""
        if finish:
            is_text = self.identity.get("object") == msgspec.Raw(b'"text_completion"')
            text: dict[str, object] = {"text": ""} if is_text else {"delta": {}}
            choice = {"index": 0, **text, "logprobs": None, "finish_reason": finish}
            events = self._event({"choices": [choice]})
        if usage:
            prompt = self.prompt_tokens
            counts = {"prompt_tokens": prompt, "total_tokens": prompt + said, "completion_tokens": said}
            events += self._event({"choices": [], "usage": counts})
        return events + DONE

    def _event(self, members: dict[str, object]) -> bytes:
        return b"data: %b\n\n" % encode_json({**self.identity, **members})

    def _check_limit(self) -> None:
        if len(self._prompt) + len(self._ids) + len(self._text) > self._limit:
            self.mark_inexact("too_long")
