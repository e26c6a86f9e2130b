"""How the answers of SGLang's `/generate` speak: whole ones, and the events of its streams.

Events have no names. Each says again what was said before (unless the server streams increments, which is the same to
us), and what is told of the request is in `meta_info`: counts of tokens, and at the end of each prompt's answer why it
ended. Behind the last of them comes `[DONE]`. An engine that gives up says so as a reason to end, `abort`, with the
status that the answer would have had, or without one where it is being stopped; what it refuses comes as an `error`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from pd_proxy.decoding import Undecodable, WrongShape, json_decoder
from pd_proxy.dialects.aborts import is_abort
from pd_proxy.dialects.answers import Usage, WholeAnswer, count_usage, strip_handoff
from pd_proxy.dialects.cache_counts import CacheCounts
from pd_proxy.dialects.dialect import Dialect, NamedEvent
from pd_proxy.dialects.prompt_logprobs import PromptLogprobs
from pd_proxy.errors import BackendGarbled

_DONE = b"[DONE]"
_TOKEN = "token"
_ABORT = "abort"
_ABSENT = msgspec.Raw()


class _Meta(msgspec.Struct):
    finish_reason: dict[str, Any] | str | None = None
    prompt_tokens: Any = 0
    completion_tokens: Any = 0
    cached_tokens: Any = 0


class _Said(msgspec.Struct):
    """What is read of an answer or an event. `index` is the prompt's in a batch."""

    meta_info: _Meta | None = None
    error: msgspec.Raw = _ABSENT
    index: int = 0


_decode_event = json_decoder(_Said)
_decode_whole = json_decoder(_Said | list[_Said])
_decode_index = json_decoder(int)
_decode_members = json_decoder(dict[str, msgspec.Raw])
_decode_reason = json_decoder(dict[str, Any] | str)
_decode_error = json_decoder(dict[str, Any] | str)
_encode = msgspec.json.Encoder().encode


class SGLangEvents(Dialect, frozen=True):
    """One answer of SGLang's own.

    Attributes:
        prompts: how many a batch has; 0 for a single one.
        logprobs: of the prompts, to be put into each event; nothing goes out before they are here.
        said: what was told last of each prompt.
    """

    prompts: int = 0
    logprobs: PromptLogprobs | None = None
    said: dict[int, _Meta] = msgspec.field(default_factory=dict)

    def of(self, prompts: int, logprobs: PromptLogprobs | None) -> Dialect:
        return msgspec.structs.replace(self, prompts=prompts, logprobs=logprobs, said={})

    @property
    def edits(self) -> bool:
        return self.logprobs is not None

    @property
    def waits(self) -> bool:
        return self.logprobs is not None and not self.logprobs.here.done()

    def read(self, payload: bytes) -> NamedEvent:
        if payload == _DONE:
            ended = [meta.finish_reason is not None for meta in self.said.values()]
            if not all(ended) or len(ended) < max(1, self.prompts):
                raise BackendGarbled("[DONE] without a finish_reason")
            return NamedEvent(type="[DONE]")
        try:
            said = _decode_event(payload)
        except Undecodable as error:
            raise BackendGarbled(f"an event that is no answer: {error}") from None
        failure = _failure(said)
        if said.meta_info is None and not failure:
            raise BackendGarbled("an event that is no answer: it has no meta_info")
        if said.meta_info is not None:
            self.said[said.index] = said.meta_info
        if not failure and said.meta_info is not None and is_abort(reason := said.meta_info.finish_reason):
            return NamedEvent(type=_ABORT, delta=msgspec.Raw(_encode(reason)))
        return NamedEvent(type=_TOKEN, error=msgspec.Raw(failure) if failure else _ABSENT)

    def failure(self, event: NamedEvent, payload: bytes) -> bytes:
        error = bytes(memoryview(event.error))
        return b'{"error":%b}' % error if error else b""

    def aborted(self, event: NamedEvent) -> object:
        return _decode_reason(event.delta)

    def usage(self, event: NamedEvent) -> Usage | None:
        return None if event.type in (_TOKEN, _ABORT) else _total(self.said.values())

    def recounted(self, event: bytes, name: str, payload: bytes, counts: CacheCounts) -> bytes:
        return event  # `meta_info` is decode's own (docs/generating-routes.md)

    def stripped(self, name: str, payload: bytes) -> bytes:
        if payload == _DONE:
            return b"data: [DONE]\n\n"
        members = _decode_members(strip_handoff(payload))
        if self.logprobs is not None and not self.waits and "meta_info" in members:
            members = self.logprobs.into(members, _decode_index(members.get("index", b"0")))
        return b"data: %b\n\n" % _encode(members)

    def whole(self, answer: bytes) -> WholeAnswer:
        found = _decode_whole(answer)
        items = found if isinstance(found, list) else [found]
        if error := next(filter(None, map(_failure, items)), b""):
            return WholeAnswer(error=msgspec.Raw(error))
        metas = [item.meta_info for item in items if item.meta_info is not None]
        if not metas or len(metas) < len(items):
            raise WrongShape("it has no meta_info")
        ends = [{"finish_reason": meta.finish_reason} for meta in metas]
        return WholeAnswer(choices=msgspec.Raw(_encode(ends)), usage=msgspec.Raw(_encode(_total(metas))))


SGLANG_EVENTS = SGLangEvents(
    opening=frozenset(),
    tokens=_TOKEN,
    last=frozenset({"[DONE]"}),
    failed=frozenset({"error"}),
    inside=(),
    ends=frozenset({_ABORT}),
)


def _failure(said: _Said) -> bytes:
    """The `error` object that stands for what an answer says of its failure, or nothing. Its `code` is a status."""
    if bytes(memoryview(said.error)[:4]) not in (b"", b"null"):
        error = _decode_error(said.error)
        error = {"message": error} if isinstance(error, str) else error
        # The engine's handler says no more than the message of what it refuses; all else has a status.
        return _encode(error if isinstance(error.get("code"), int) else {**error, "code": 400})
    reason = None if said.meta_info is None else said.meta_info.finish_reason
    if not isinstance(reason, dict) or reason.get("type") != "abort" or not isinstance(reason.get("status_code"), int):
        return b""
    kind = reason.get("err_type") or "Abort"
    return _encode({"message": reason.get("message"), "type": kind, "param": None, "code": reason["status_code"]})


def _total(metas: Iterable[_Meta]) -> Usage | None:
    """The usage of all prompts together, in chat's words; None where one of them says what counts no tokens."""
    counts = [(meta.prompt_tokens, meta.completion_tokens, meta.cached_tokens) for meta in metas]
    if any(count_usage(*each) is None for each in counts):
        return None
    return count_usage(*map(sum, zip(*counts, strict=True))) if counts else Usage(0, 0)
