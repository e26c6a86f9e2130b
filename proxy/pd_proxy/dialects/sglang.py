"""SGLang's `/generate`.

Its events have no types of their own. Each repeats the text before it (unless the server streams increments, which
makes no difference here), and `meta_info` has the counts of tokens and, at the end of each prompt's answer, why it
ended. The stream ends with `[DONE]`. An engine that aborts a request sends the `finish_reason` `abort`, with the status
that the answer would have had, or without a status if the engine is being stopped. A refusal is sent as an `error`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import msgspec

from pd_proxy.decoding import Undecodable, WrongShape, decode_members, is_null, json_decoder
from pd_proxy.dialects.aborts import is_abort
from pd_proxy.dialects.cache_counts import CacheCounts
from pd_proxy.dialects.dialect import TokenLog
from pd_proxy.dialects.edit import Edit
from pd_proxy.dialects.named import NamedEvent, NamedEvents, NamedReader
from pd_proxy.dialects.prompt_logprobs import PromptLogprobs
from pd_proxy.dialects.sse import DONE, write_event
from pd_proxy.dialects.strip import strip_handoff
from pd_proxy.dialects.usage import Usage, count_usage
from pd_proxy.dialects.whole import WholeAnswer
from pd_proxy.encoding import ABSENT, encode_json
from pd_proxy.errors import BackendGarbled

_DONE = b"[DONE]"
_TOKEN = "token"
_ABORT = "abort"


class _Meta(msgspec.Struct):
    finish_reason: dict[str, Any] | str | None = None
    prompt_tokens: Any = 0
    completion_tokens: Any = 0
    cached_tokens: Any = 0


class _Answer(msgspec.Struct):
    """What is read of an answer or an event. `index` is that of the prompt in a batch."""

    meta_info: _Meta | None = None
    error: msgspec.Raw = ABSENT
    index: int = 0


_decode_event = json_decoder(_Answer)
_decode_whole = json_decoder(_Answer | list[_Answer])
_decode_index = json_decoder(int)
_decode_reason = json_decoder(dict[str, Any] | str)


class SGLangEvents(NamedEvents, frozen=True):
    """The dialect of SGLang's own answers. The reader of a stream has one of its own, with the state of that stream.

    Attributes:
        prompts: the number of prompts in a batch; 0 for a single one.
        logprobs: of the prompts, to be put into each event; nothing is sent before they are known.
        last_meta: the last `meta_info` of each prompt, by index.
    """

    prompts: int = 0
    logprobs: PromptLogprobs | None = None
    last_meta: dict[int, _Meta] = msgspec.field(default_factory=dict)

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
        own = msgspec.structs.replace(self, prompts=prompts, logprobs=logprobs, last_meta={})
        return NamedReader(own, url, edit, transcript)

    @property
    def rewrites(self) -> bool:
        return self.logprobs is not None

    @property
    def awaited(self) -> asyncio.Future[None] | None:
        return None if self.logprobs is None else self.logprobs.here

    def read(self, payload: bytes) -> NamedEvent:
        if payload == _DONE:
            ended = [meta.finish_reason is not None for meta in self.last_meta.values()]
            if not all(ended) or len(ended) < max(1, self.prompts):
                raise BackendGarbled("[DONE] without a finish_reason")
            return NamedEvent(type="[DONE]")
        try:
            parsed = _decode_event(payload)
        except Undecodable as error:
            raise BackendGarbled(f"an event that is no answer: {error}") from None
        failure = _failure(parsed)
        if parsed.meta_info is None and not failure:
            raise BackendGarbled("an event that is no answer: it has no meta_info")
        if parsed.meta_info is not None:
            self.last_meta[parsed.index] = parsed.meta_info
        if not failure and parsed.meta_info is not None and is_abort(reason := parsed.meta_info.finish_reason):
            return NamedEvent(type=_ABORT, delta=msgspec.Raw(encode_json(reason)))
        return NamedEvent(type=_TOKEN, error=msgspec.Raw(failure) if failure else ABSENT)

    def failure(self, event: NamedEvent, payload: bytes) -> bytes:
        error = bytes(memoryview(event.error))
        return b'{"error":%b}' % error if error else b""

    def abort_reason_in(self, event: NamedEvent) -> object:
        return _decode_reason(event.delta)

    def usage(self, event: NamedEvent) -> Usage | None:
        return None if event.type in (_TOKEN, _ABORT) else _total(self.last_meta.values())

    def recounted(self, event: bytes, name: str, payload: bytes, counts: CacheCounts) -> bytes:
        return event  # `meta_info` is decode's own (docs/generating-routes.md)

    def rewritten(self, name: str, payload: bytes) -> bytes:
        if payload == _DONE:
            return DONE
        members = decode_members(strip_handoff(payload))
        if self.logprobs is not None and self.logprobs.here.done() and "meta_info" in members:
            members = self.logprobs.into(members, _decode_index(members.get("index", b"0")))
        return write_event(encode_json(members))

    def decode_whole(self, answer: bytes) -> WholeAnswer:
        found = _decode_whole(answer)
        items = found if isinstance(found, list) else [found]
        if error := next(filter(None, map(_failure, items)), b""):
            return WholeAnswer(error=msgspec.Raw(error))
        metas = [item.meta_info for item in items if item.meta_info is not None]
        if not metas or len(metas) < len(items):
            raise WrongShape("it has no meta_info")
        ends = [{"finish_reason": meta.finish_reason} for meta in metas]
        return WholeAnswer(choices=msgspec.Raw(encode_json(ends)), usage=msgspec.Raw(encode_json(_total(metas))))


SGLANG = SGLangEvents(
    generated="meta_info",
    opening=frozenset(),
    tokens=_TOKEN,
    last=frozenset({"[DONE]"}),
    failed=frozenset({"error"}),
    inside=(),
    ends=frozenset({_ABORT}),
)


def _failure(parsed: _Answer) -> bytes:
    """The failure that an answer reports, as an `error` object whose `code` is a status; empty where it reports
    none."""
    if not is_null(parsed.error):
        error = _decode_reason(parsed.error)
        error = {"message": error} if isinstance(error, str) else error
        # A refusal by the engine's handler has a message and no status; every other error has one.
        return encode_json(error if isinstance(error.get("code"), int) else {**error, "code": 400})
    reason = None if parsed.meta_info is None else parsed.meta_info.finish_reason
    if not isinstance(reason, dict) or reason.get("type") != "abort" or not isinstance(reason.get("status_code"), int):
        return b""
    kind = reason.get("err_type") or "Abort"
    return encode_json({"message": reason.get("message"), "type": kind, "param": None, "code": reason["status_code"]})


def _total(metas: Iterable[_Meta]) -> Usage | None:
    """The usage of all prompts together, in chat's words; None where a count is not a number of tokens."""
    counts = [(meta.prompt_tokens, meta.completion_tokens, meta.cached_tokens) for meta in metas]
    if any(count_usage(*each) is None for each in counts):
        return None
    return count_usage(*map(sum, zip(*counts, strict=True))) if counts else Usage(0, 0)
