"""How many tokens of a prompt were cached, in the usage of an answer whose prompt another engine computed.

Prefill knows it. Decode counts what it was handed as cached, unless its version is told prefill's number by the
hand-off, and counts nothing as written to a cache. So both numbers in a client's answer are prefill's. Where prefill
has not said one, nobody knows it, and decode's is left out.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import msgspec

from pd_proxy.decoding import Undecodable, decode_members, json_decoder
from pd_proxy.dialects.usage import Usage
from pd_proxy.encoding import encode_json

_decode_usage = json_decoder(dict[str, Any])

_WRITTEN = ("created_cache_tokens", "cache_write_tokens")
"""How engines call the tokens that were computed and written to the cache: vLLM for chat, and for responses."""
_DETAILS = {"prompt_tokens": "prompt_tokens_details", "input_tokens": "input_tokens_details"}


class CacheCounts(msgspec.Struct, frozen=True):
    """Prefill's counts for one prompt, in tokens; None where it has not said one.

    Attributes:
        cached: found in its cache.
        written: computed and written to its cache.
        private: only the hand-off has said what was cached. Engines that are not to tell clients
            (`--enable-prompt-tokens-details` is off) say it to each other all the same, so an answer that has no such
            count gets none.
    """

    cached: int | None = None
    written: int | None = None
    private: bool = False

    @classmethod
    def of(cls, usage: Usage | None, told: int | None = None) -> CacheCounts:
        """Those of an answer of prefill's.

        Arguments:
            told: what its hand-off says is cached.
        """
        if usage is None:
            return cls(told, private=told is not None)
        details = usage.prompt_tokens_details
        cached = None if details is None else details.cached_tokens
        return cls(told if cached is None else cached, usage.written_tokens, cached is None and told is not None)

    def agree(self, usage: Usage) -> bool:
        """Whether a usage says just these."""
        details = usage.prompt_tokens_details
        said = None if details is None else details.cached_tokens
        return (said == self.cached or (self.private and said is None)) and usage.written_tokens == self.written

    def into(self, payload: bytes, inside: str = "") -> bytes:
        """An answer, or a payload of one, with these counts in its usage; as it is where nothing of it changes.

        Arguments:
            inside: the member that holds the answer, where the payload is not the answer itself.
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
        told = dict(given)
        if cached is not None:
            told["cached_tokens"] = cached
        elif total == "input_tokens":
            told["cached_tokens"] = 0  # OpenAI's responses have it always
        else:
            told.pop("cached_tokens", None)
        turns = told.get("cached_tokens_per_turn")
        if isinstance(turns, list) and len(turns) == 1:
            told["cached_tokens_per_turn"] = [cached or 0]
        for name in _WRITTEN:
            if told.get(name) is not None:
                told[name] = None if self.written is None else min(self.written, usage[total] - (cached or 0))
        if self.written is not None and not any(name in told for name in _WRITTEN) and given:
            told[_WRITTEN[total == "input_tokens"]] = min(self.written, usage[total] - (cached or 0))
        return usage if told == given else {**usage, details: told or None}

    def _beside(self, usage: dict[str, Any]) -> dict[str, Any]:
        """Anthropic's words: what was cached, and what was written to a cache, is counted beside the rest."""
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
