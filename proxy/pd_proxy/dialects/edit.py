"""Turns the events of an engine, if they have choices, into the client's.

Token ids that the gateway asked for and the client did not are taken out, and so are the members of the hand-off. If
several legs make one answer, the events of the later legs get the identity and the counts of the first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from pd_proxy.decoding import Members, Undecodable, decode_members, json_decoder
from pd_proxy.dialects.cache_counts import CacheCounts
from pd_proxy.dialects.sse import write_event
from pd_proxy.dialects.strip import names_handoff, strip_handoff
from pd_proxy.dialects.usage import Usage
from pd_proxy.encoding import NULL, encode_json

_decode_choices = json_decoder(list[Members] | None)
_decode_usage = json_decoder(dict[str, Any] | None)

# Within a JSON string every quote has a backslash before it, so these match members only.
_IDS_MARK = b'token_ids"'
_IDS = b',"token_ids":'
_PROMPT_IDS = b',"prompt_token_ids":['


class Edit(msgspec.Struct, frozen=True):
    """The changes to the events of one leg.

    Attributes:
        hide_ids: take out the token ids.
        identity: members that every event of the answer has in place of its own, if any.
        earlier_tokens: completion tokens of the answer before this leg, which this leg took for a part of its prompt.
        opens: the answer begins with this leg; `identity` only hides that of the engine.
        counts: returns prefill's counts of the prompt, for an event with a usage; None where no other engine computed
            the prompt.
    """

    hide_ids: bool = False
    identity: dict[str, msgspec.Raw] | None = None
    earlier_tokens: int = 0
    opens: bool = False
    counts: Callable[[], CacheCounts | None] | None = None

    @property
    def idle(self) -> bool:
        """Whether ordinary events are not changed."""
        return not self.hide_ids and self.identity is None

    def event(self, event: bytes, payload: bytes, ids: bytes = b"", odd: bool | None = None) -> bytes:
        """An event as the client sees it.

        Arguments:
            event: as it came.
            payload: its data.
            ids: the value of its `token_ids`, as it stands there, where known.
            odd: whether it may name the hand-off, where known.
        Raises:
            Undecodable: something must be changed, and it is not JSON.
        """
        # `find`, here and wherever each event passes: `in` tries to take the needle for a number first, and the
        # exception that this raises costs more than the search.
        if odd is None:
            odd = names_handoff(event)
        if self.identity is None and not odd:
            if not self.hide_ids:
                return event
            shown = event.replace(_IDS + ids, b"", 1) if ids else event
            if shown.find(_IDS_MARK) < 0:
                return shown
        return write_event(self._changed(strip_handoff(payload) if odd else payload))

    def _changed(self, payload: bytes) -> bytes:
        """The payload of an event without a hand-off, decoded and encoded again with every change."""
        members = decode_members(payload)
        choices = _decode_choices(members.get("choices", NULL))
        usage = _decode_usage(members.get("usage", NULL)) if self.earlier_tokens else None
        if self.hide_ids:
            members.pop("prompt_token_ids", None)
        for choice in choices or ():
            self._hide_ids(choice)
        if choices:
            members["choices"] = msgspec.Raw(encode_json(choices))
        for name, value in (self.identity or {}).items():
            if name in members:
                members[name] = value
        if usage:
            members["usage"] = msgspec.Raw(encode_json(self.merge(usage)))
        return encode_json(members)

    def _hide_ids(self, choice: Members) -> None:
        """Take the ids out of a choice that the client must not see."""
        if self.hide_ids:
            choice.pop("token_ids", None)
            choice.pop("prompt_token_ids", None)
        elif self.earlier_tokens and "prompt_token_ids" in choice:
            # They were sent with the first event of the first leg. Without tokens before this leg the prompt is the
            # client's own, and the event with it may not have been sent.
            choice["prompt_token_ids"] = NULL

    def closing(self, event: bytes, payload: bytes, usage: Usage | None = None) -> bytes:
        """An event without choices as the client sees it: that with the usage of the whole answer."""
        if self.counts is None or (usage is not None and (counts := self.counts()) is not None and counts.agree(usage)):
            return self.event(event, payload)
        return self.event(*self.recounted(event, payload))

    def recounted(self, event: bytes, payload: bytes) -> tuple[bytes, bytes]:
        """An event and its payload, with prefill's counts in its usage."""
        if self.counts is None or (counts := self.counts()) is None:
            return event, payload
        changed = counts.into(payload)
        return (event, payload) if changed is payload else (write_event(changed), changed)

    def head(self, event: bytes, length: int) -> bytes:
        """The first bytes of an ordinary event as the client sees them, if the bytes behind them are not changed; else
        nothing.

        Arguments:
            event: the whole event, as the engine sent it.
            length: how many bytes may be changed: up to where its text begins.
        """
        if self.identity is None:
            return event[:length]
        try:
            members = decode_members(event[6:-2])
        except Undecodable:
            return b""
        if bytes(members.get("usage", NULL)) != b"null" or write_event(encode_json(members)) != event:
            return b""
        shown = write_event(encode_json({name: self.identity.get(name, value) for name, value in members.items()}))
        return shown[: length - len(event)] if shown.endswith(event[length:]) else b""

    def merge(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The usage of the whole answer: what this leg took for prompt was completion.

        Arguments:
            usage: of this leg.
        """
        merged = dict(usage)
        prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
        if isinstance(prompt, int) and isinstance(completion, int):
            merged["prompt_tokens"] = prompt - self.earlier_tokens
            merged["completion_tokens"] = completion + self.earlier_tokens
            details = usage.get("prompt_tokens_details")
            if isinstance(details, dict) and isinstance(details.get("cached_tokens"), int):
                cached = min(details["cached_tokens"], prompt - self.earlier_tokens)
                merged["prompt_tokens_details"] = {**details, "cached_tokens": cached}
        return merged


def take_prompt_ids(event: bytes) -> tuple[bytes, bytes]:
    """An event without the ids of the prompt, and these ids: `1,2,3`, or nothing where it has none.

    They are taken out before the event is parsed: to parse those of a long prompt costs more than the rest of a
    request.
    """
    start = event.find(_PROMPT_IDS)
    first = start + len(_PROMPT_IDS)
    end = event.find(b"]", first)
    if start < 0 or end < 0:
        return event, b""
    return event[:start] + event[end + 1 :], event[first:end]
