"""The number of cached prompt tokens in the usage of an answer whose prompt another engine has computed.

Prefill knows this number. Decode counts the tokens that were handed over as cached, unless its version gets prefill's
number with the hand-off, and counts no tokens as written to a cache. So a client's answer has both numbers of prefill.
A number that prefill has not reported is unknown, and decode's is left out.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import msgspec

from pd_proxy.decoding import Undecodable, decode_members, json_decoder
from pd_proxy.dialects.usage import Usage
from pd_proxy.encoding import encode_json

_decode_usage = json_decoder(dict[str, Any])

_WRITTEN = ("created_cache_tokens", "cache_write_tokens")
"""The names of the count of tokens that were computed and written to the cache: vLLM's for chat, and for responses."""
_DETAILS = {"prompt_tokens": "prompt_tokens_details", "input_tokens": "input_tokens_details"}


class CacheCounts(msgspec.Struct, frozen=True):
    """Prefill's counts for one prompt, in tokens; None where it has not reported one.

    Attributes:
        cached: found in its cache.
        written: computed and written to its cache.
        private: the cached count is known from the hand-off alone. Engines that do not report it to clients
            (`--enable-prompt-tokens-details` is off) report it to each other all the same, so an answer without such a
            count gets none.
    """

    cached: int | None = None
    written: int | None = None
    private: bool = False

    @classmethod
    def of(cls, usage: Usage | None, handed_over: int | None = None) -> CacheCounts:
        """The counts in an answer of prefill's.

        Arguments:
            handed_over: the cached count in its hand-off.
        """
        if usage is None:
            return cls(handed_over, private=handed_over is not None)
        details = usage.prompt_tokens_details
        cached = None if details is None else details.cached_tokens
        return cls(
            handed_over if cached is None else cached,
            usage.written_tokens,
            cached is None and handed_over is not None,
        )

    def agree(self, usage: Usage) -> bool:
        """Whether a usage has exactly these counts."""
        details = usage.prompt_tokens_details
        cached = None if details is None else details.cached_tokens
        return (cached == self.cached or (self.private and cached is None)) and usage.written_tokens == self.written

    def into(self, payload: bytes, inside: str = "") -> bytes:
        """An answer, or the payload of an event, with these counts in its usage; the same bytes where nothing changes.

        Arguments:
            inside: the member that holds the answer, where it is not the payload itself.
        """
        try:
            outer = decode_members(payload)
            members = decode_members(outer[inside]) if inside else outer
            usage = _decode_usage(members["usage"])
        except (Undecodable, KeyError):
            return payload
        changed = self._changed(usage)
        if changed == usage:
            return payload
        members["usage"] = msgspec.Raw(encode_json(changed))
        if inside:
            outer[inside] = msgspec.Raw(encode_json(members))
        return encode_json(outer)

    def _changed(self, usage: dict[str, Any]) -> dict[str, Any]:
        total = next((name for name in _DETAILS if _is_count(usage.get(name))), None)
        if total is None:
            return usage
        details = _DETAILS[total]
        if total == "input_tokens" and details not in usage:
            return self._beside(usage)
        given = usage.get(details)
        given = given if isinstance(given, dict) else {}
        cached = None if self.cached is None else min(self.cached, usage[total])
        if self.private and given.get("cached_tokens") is None:
            cached = None
        details_shown = dict(given)
        if cached is not None:
            details_shown["cached_tokens"] = cached
        elif total == "input_tokens":
            details_shown["cached_tokens"] = 0  # a member of every response of OpenAI's
        else:
            details_shown.pop("cached_tokens", None)
        turns = details_shown.get("cached_tokens_per_turn")
        if isinstance(turns, list) and len(turns) == 1:
            details_shown["cached_tokens_per_turn"] = [cached or 0]
        for name in _WRITTEN:
            if details_shown.get(name) is not None:
                details_shown[name] = None if self.written is None else min(self.written, usage[total] - (cached or 0))
        if self.written is not None and not any(name in details_shown for name in _WRITTEN) and given:
            details_shown[_WRITTEN[total == "input_tokens"]] = min(self.written, usage[total] - (cached or 0))
        return usage if details_shown == given else {**usage, details: details_shown or None}

    def _beside(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The same for Anthropic's messages: cached tokens and tokens written to a cache are not in `input_tokens`."""
        read, written = usage.get("cache_read_input_tokens"), usage.get("cache_creation_input_tokens")
        total = usage["input_tokens"] + sum(count for count in (read, written) if _is_count(count))
        changed = dict(usage)
        rest = total
        for name, count in (("cache_read_input_tokens", self.cached), ("cache_creation_input_tokens", self.written)):
            if count is not None and not (self.private and changed.get(name) is None):
                changed[name] = min(count, rest)
                rest -= changed[name]
            elif changed.get(name) is not None:
                del changed[name]
        changed["input_tokens"] = rest
        return changed


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
