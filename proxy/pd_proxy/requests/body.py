"""A client's request body: read once, only at its top level, and without the members that clients may not send to
engines.

Members stay raw bytes (`msgspec.Raw`). So a prompt of 400 kB is neither decoded nor encoded again, and members that the
gateway does not know pass unchanged. The body is always written anew from its members, so of two members with one name
only the last is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from pd_proxy.decoding import UNDECODABLE, bare_json_decoder
from pd_proxy.encoding import encode_json
from pd_proxy.errors import InvalidRequest
from pd_proxy.requests import sglang_generate
from pd_proxy.requests.endpoints import LAYOUTS, Endpoint, Members
from pd_proxy.requests.lenient import as_bool, as_int
from pd_proxy.requests.media import has_media
from pd_proxy.requests.members import read_members
from pd_proxy.requests.unsplittable import (
    read_sampling,
    sampling_members,
    why_message_unsplittable,
    why_response_unsplittable,
    why_unsplittable,
)

_MAX_MEDIA = 1024  # media of a prompt that are counted


class Body(msgspec.Struct, frozen=True):
    """A request as the gateway reads it. `members` is what the engine gets.

    Attributes:
        stream: the client asked for a stream of events.
        wants_usage: the client gets the engine's usage event: it asked for it (`stream_options.include_usage`), or this
            endpoint's streams always have one.
        wants_token_ids: the client asked for `return_token_ids`.
        max_tokens: the bound of the answer's tokens; None where the engine's default holds.
        prompt_tokens: the prompt's tokens, estimated from its size, for placement.
        unsplittable: why prefill and decode cannot share the request, so that one backend serves it; or empty.
        follows: the id of the stored response that it continues, or empty. Only the backend that stores it can serve
            it.
        stored: the engine may keep the answer, which clients can then get by its id.
        prompts: the number of prompts in a batch, each of which gets an answer; 0 where there is no batch.
        prompt_logprobs: the answer has log probabilities of the prompt, which only prefill can compute.
        media: its prompt has more than text. Engines then ignore token ids of the prompt.
    """

    endpoint: Endpoint
    members: Members
    model: str | None
    stream: bool
    wants_usage: bool
    wants_token_ids: bool
    max_tokens: int | None
    prompt_tokens: int
    unsplittable: str
    follows: str = ""
    stored: bool = False
    prompts: int = 0
    prompt_logprobs: bool = False
    media: bool = False


def read_body(raw: bytes | bytearray, endpoint: Endpoint) -> Body:
    """Read a request body.

    Raises:
        InvalidRequest: the body is not a JSON object, or a member that the gateway reads has the wrong type. All else
            is left to the engine.
    """
    members = read_members(raw)
    layout = LAYOUTS[endpoint]
    read = {name: _read(members, name) for name in layout.reads if name in members}
    if endpoint == "sglang_generate":  # it has no member names in common with the others
        return _read_sglang(members, read)
    max_tokens, unsplittable = _READERS[endpoint](members, read)
    media = has_media(members)
    return Body(
        endpoint=endpoint,
        members=members,
        model=read.get("model"),
        stream=bool(read.get("stream")),
        wants_usage=bool(read.get("stream_options")) or not layout.asks_usage,
        wants_token_ids=bool(read.get("return_token_ids")),
        max_tokens=max_tokens,
        prompt_tokens=_estimate_tokens(members, endpoint, layout.prompt, media),
        unsplittable=unsplittable,
        follows=read.get("previous_response_id") or "",
        stored=endpoint == "responses" and read.get("store") is not False,
        media=media,
    )


def _read_chat(members: Members, read: Mapping[str, Any]) -> tuple[int | None, str]:
    """The bound of the answer's tokens; and why the request cannot be split, or empty. The next functions return the
    same for the other endpoints."""
    max_tokens = read.get("max_completion_tokens") or read.get("max_tokens")
    return max_tokens, why_unsplittable(members, "chat", read.get("n"))


def _read_completion(members: Members, read: Mapping[str, Any]) -> tuple[int | None, str]:
    max_tokens = read.get("max_tokens")
    default = 16  # the engine's
    return default if max_tokens is None else max_tokens, why_unsplittable(members, "completions", read.get("n"))


def _read_message(members: Members, read: Mapping[str, Any]) -> tuple[int | None, str]:
    return read.get("max_tokens"), why_message_unsplittable(members)


def _read_response(members: Members, read: Mapping[str, Any]) -> tuple[int | None, str]:
    return read.get("max_output_tokens"), why_response_unsplittable(members, read)


def _read_generate(members: Members, read: Mapping[str, Any]) -> tuple[int | None, str]:
    max_tokens, n = read_sampling(members)
    return max_tokens, why_unsplittable(sampling_members(members), "generate", n)


_READERS: dict[Endpoint, Callable[[Members, Mapping[str, Any]], tuple[int | None, str]]] = {
    "chat": _read_chat,
    "completions": _read_completion,
    "messages": _read_message,
    "responses": _read_response,
    "generate": _read_generate,
}


def _read_sglang(members: Members, read: Mapping[str, Any]) -> Body:
    """Read a body of SGLang's own endpoint."""
    asked = sglang_generate.read(members)
    return Body(
        endpoint="sglang_generate",
        members=members,
        model=read.get("model"),
        stream=bool(read.get("stream")),
        wants_usage=True,
        wants_token_ids=False,
        max_tokens=asked.max_tokens,
        prompt_tokens=asked.prompt_tokens,
        unsplittable=asked.unsplittable,
        prompts=asked.prompts,
        prompt_logprobs=asked.prompt_logprobs,
    )


def renamed(body: Body, model: str) -> Body:
    """The same body with another model."""
    return msgspec.structs.replace(
        body, model=model, members={**body.members, "model": msgspec.Raw(encode_json(model))}
    )


def read_model(members: Members) -> str | None:
    """The model that a request names, or None.

    Raises:
        InvalidRequest: it is not a string.
    """
    return _read(members, "model") if "model" in members else None


_NAMES = {bool: "a boolean", int: "an integer", str: "a string", dict: "an object"}
_DECODERS = {kind: bare_json_decoder(kind | None) for kind in _NAMES}
_KINDS = {
    "stream": bool,
    "stream_options": dict,
    "min_tokens": int,
    "n": int,
    "max_tokens": int,
    "max_completion_tokens": int,
    "model": str,
    "return_token_ids": bool,
    "max_output_tokens": int,
    "previous_response_id": str,
    "store": bool,
    "background": bool,
}
"""The types of the members that the gateway reads (`Layout.reads`)."""


_LENIENT = {bool: as_bool, int: as_int}


def _read(members: Members, name: str) -> Any:
    """A member's value, which has the type in `_KINDS`, or None for null. A value of another type that engines convert
    is converted here too, and replaced in `members`.

    Raises:
        InvalidRequest: the value has another type.
    """
    kind = _KINDS[name]
    try:
        value = _DECODERS[kind](members[name])
    except UNDECODABLE:
        value = _LENIENT[kind](bytes(members[name])) if kind in _LENIENT else None
        if value is None:
            raise InvalidRequest(f"`{name}` must be {_NAMES[kind]}", param=name) from None
        members[name] = msgspec.Raw(encode_json(value))
    return _read_flags(members, value) if name == "stream_options" else value


def _read_flags(members: Members, options: dict[str, Any] | None) -> bool:
    """Whether `stream_options` ask for usage.

    Raises:
        InvalidRequest: a flag in them is not a boolean.
    """
    if options is None:
        return False
    for name in _FLAGS:
        given = options.get(name)
        if given is None or isinstance(given, bool):
            continue
        options[name] = as_bool(encode_json(given))
        if options[name] is None:
            raise InvalidRequest(f"`stream_options.{name}` must be a boolean", param="stream_options")
        members["stream_options"] = msgspec.Raw(encode_json(options))
    return bool(options.get("include_usage"))


_FLAGS = ("include_usage", "continuous_usage_stats")


# Four bytes of English text are about a token. A base64 image of any size is some hundred to a thousand tokens.
_BYTES_PER_TOKEN = 4
_TOKENS_PER_MEDIUM = 1000
_MEDIUM = b";base64,"


def _estimate_tokens(members: Members, endpoint: Endpoint, parts: tuple[str, ...], media: bool) -> int:
    raw = members.get(parts[0])
    size = 0 if raw is None else len(memoryview(raw))
    for name in parts[1:]:
        if part := members.get(name):
            size += len(memoryview(part))
    if endpoint == "generate":
        return 1 if raw is None else bytes(raw).count(b",") + 1
    if raw is None or size < 16384:
        return size // _BYTES_PER_TOKEN + 1
    if endpoint == "completions" and memoryview(raw)[0] == ord("["):
        return bytes(raw).count(b",") + 1
    if not media:
        return size // _BYTES_PER_TOKEN + 1
    said = bytes(raw)
    count = encoded = place = 0
    while count < _MAX_MEDIA and (place := said.find(_MEDIUM, place)) >= 0:
        place += len(_MEDIUM)
        end = said.find(b'"', place)
        count, encoded, place = count + 1, encoded + end - place, end
    return (size - encoded) // _BYTES_PER_TOKEN + _TOKENS_PER_MEDIUM * count + 1
