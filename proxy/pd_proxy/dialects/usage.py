"""The usage that engines report: counts of tokens, in the words of each API."""

from __future__ import annotations

from typing import Annotated

import msgspec

from pd_proxy.decoding import UNDECODABLE, bare_json_decoder
from pd_proxy.encoding import encode_json

_MOST = 2**53 - 1  # the largest integer that a float, and so a client in JavaScript, has exactly
_Count = Annotated[int, msgspec.Meta(ge=0, le=_MOST)]


class CachedDetails(msgspec.Struct):
    cached_tokens: _Count | None = None
    created_cache_tokens: _Count | None = None
    cache_write_tokens: _Count | None = None


class Usage(msgspec.Struct):
    """The `usage` object of an answer, as far as the gateway reads it.

    Anthropic's messages and OpenAI's responses have `input_tokens` and `output_tokens`; in messages the former does not
    include the tokens that came from a cache."""

    prompt_tokens: _Count | None = None
    completion_tokens: _Count | None = None
    prompt_tokens_details: CachedDetails | None = None
    input_tokens: _Count | None = None
    output_tokens: _Count | None = None
    input_tokens_details: CachedDetails | None = None
    cache_read_input_tokens: _Count | None = None
    cache_creation_input_tokens: _Count | None = None

    @property
    def cached_tokens(self) -> int:
        return (self.prompt_tokens_details.cached_tokens or 0) if self.prompt_tokens_details else 0

    @property
    def written_tokens(self) -> int | None:
        """Tokens of the prompt that were computed and written to a cache; None where the engine has not said."""
        details = self.prompt_tokens_details
        if details is None or details.created_cache_tokens is None:
            said = None if details is None else details.cache_write_tokens
            return self.cache_creation_input_tokens if said is None else said
        return details.created_cache_tokens


_decode_usage = bare_json_decoder(Usage)


def read_usage(raw: msgspec.Raw | bytes) -> Usage | None:
    """The usage in chat's words; None where there is none, or it cannot be understood.

    A usage with a number that cannot be a count of tokens (an integer from 0 to 2^53) is not used at all: counters
    would fall, or overflow."""
    try:
        usage = _decode_usage(raw)
    except UNDECODABLE:
        return None
    if usage.prompt_tokens is None and usage.input_tokens is not None:
        read = usage.cache_read_input_tokens
        usage.prompt_tokens = usage.input_tokens + (read or 0) + (usage.cache_creation_input_tokens or 0)
        usage.completion_tokens = usage.output_tokens
        usage.prompt_tokens_details = usage.input_tokens_details if read is None else CachedDetails(read)
        if usage.prompt_tokens > _MOST:
            return None
    details, prompt = usage.prompt_tokens_details, usage.prompt_tokens
    if details is not None and prompt is not None and (details.cached_tokens or 0) > prompt:
        details.cached_tokens = prompt  # no more can be cached than the prompt has
    return usage


def count_usage(prompt: object, completion: object, cached: object) -> Usage | None:
    """The usage with these counts; None where one cannot be a count of tokens."""
    return read_usage(
        encode_json(
            {
                "prompt_tokens": prompt,
                "completion_tokens": completion,
                "prompt_tokens_details": {"cached_tokens": cached},
            }
        )
    )
