"""A client's request body: read once, at its top level only, and rid of what no client may say to an engine.

Members stay the raw bytes they came as (`msgspec.Raw`), so that a 400 kB prompt is neither decoded nor encoded again,
and fields the gateway does not know pass through untouched. The body is always written anew from its members, never
spliced: of two members with one name only the last exists from here on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import islice
from typing import Any, Literal

import msgspec

from pd_proxy.decoding import UNDECODABLE, Undecodable, WrongShape, bare_json_decoder, decode_json, json_decoder
from pd_proxy.errors import InvalidRequest
from pd_proxy.requests import json_scan as scan
from pd_proxy.requests import sglang_generate
from pd_proxy.requests.endpoints import LAYOUTS, Endpoint, Members
from pd_proxy.requests.lenient import as_bool, as_int
from pd_proxy.requests.media import has_media

FORBIDDEN = frozenset(
    {
        # vLLM, its connectors, and vllm-ascend
        "kv_transfer_params",
        "ec_transfer_params",
        "batch_kv_transfer_params",
        "kv_cache_report_mode",
        "hidden_states_path",
        "request_id",
        # SGLang
        "bootstrap_host",
        "bootstrap_port",
        "bootstrap_room",
        "bootstrap_pair_key",
        "rid",
        "routed_dp_rank",
        "data_parallel_rank",
        "disagg_prefill_dp_rank",
        "decode_tp_size",
        # TensorRT-LLM
        "disaggregated_params",
    }
)
"""Members by which engines find each other's memory. A client that could set them could make an engine connect
wherever it likes, read another user's KV cache, or die (wire protocols, section F)."""

NESTED = ("vllm_xargs", "extra_args", "sampling_params")
"""Members that an engine merges into its own arguments; the same names are taken out inside them."""

_STRIPPED = FORBIDDEN.union(NESTED)

_KB, _MB = 1024, 1024 * 1024
_MOST_BYTES = {
    # A word, a number or a few flags, which the gateway reads.
    **dict.fromkeys(("model", "previous_response_id", "stream", "stream_options", "store", "background"), 8 * _KB),
    **dict.fromkeys(("n", "max_tokens", "max_completion_tokens", "max_output_tokens", "min_tokens"), 8 * _KB),
    **dict.fromkeys(("return_token_ids", "truncation"), 8 * _KB),
    # OpenAI takes 16 pairs of 64 and 512 characters, and 4 stop strings; engines take more of them.
    **dict.fromkeys(("metadata", "stop", "stop_sequences", "tool_choice", "return_logprob"), 256 * _KB),
    # There may be a whole vocabulary in them: 256,000 tokens of 7 bytes, or of 14 with a number for each.
    **dict.fromkeys(("stop_token_ids", "allowed_token_ids", "bad_words", *NESTED), 4 * _MB),
    **dict.fromkeys(("logit_bias", "tools", "response_format", "structured_outputs"), 8 * _MB),
}
"""Bytes of the members that are small by nature. All others are bounded by `limits.request_body` alone."""

_LONG = 64 * _KB  # bytes of a body from which the sizes of its members are looked at
_MOST_STRIPPED = 64 * _KB  # bytes of one of the `NESTED` members that is read to be rid of a name
_MOST_TOOLS = 4096  # tools that are looked at
_MOST_MEDIA = 1024  # media in a prompt that are counted
_BOM = b"\xef\xbb\xbf"

_encode = msgspec.json.Encoder().encode


class Body(msgspec.Struct, frozen=True):
    """What the gateway reads of a request; `members` is what the engine gets.

    Attributes:
        stream: the client wants events.
        wants_usage: the client gets the engine's usage event: it asked (`stream_options.include_usage`), or this
            endpoint's streams have one in any case.
        wants_token_ids: the client asked for `return_token_ids`.
        max_tokens: the completion's bound, or None where the engine's default holds.
        prompt_tokens: an estimate from the size of the prompt, for placement.
        alone: why prefill and decode cannot share this request, or empty. Such a request goes to one backend whole.
        follows: id of the stored response that it goes on from, or empty; only the backend that has that can serve it.
        stored: the engine may keep the answer, to be asked for by its id.
        prompts: how many a batch has, each of which is answered by itself; 0 where there is no batch.
        prompt_logprobs: the answer has log probabilities of the prompt that only prefill can say.
        media: its prompt is more than text: engines ignore a prompt's ids then.
    """

    endpoint: Endpoint
    members: Members
    model: str | None
    stream: bool
    wants_usage: bool
    wants_token_ids: bool
    max_tokens: int | None
    prompt_tokens: int
    alone: str
    follows: str = ""
    stored: bool = False
    prompts: int = 0
    prompt_logprobs: bool = False
    media: bool = False


def read_body(raw: bytes | bytearray, endpoint: Endpoint) -> Body:
    """Read a request body.

    Raises:
        InvalidRequest: not JSON, not an object, or a field that the gateway must understand has the wrong type.
            All else is left for the engine to judge.
    """
    members = read_members(raw)
    layout = LAYOUTS[endpoint]
    read = {name: _read(members, name) for name in layout.reads if name in members}
    max_tokens = read.get("max_tokens")
    if endpoint == "chat":
        max_tokens = read.get("max_completion_tokens") or max_tokens
        alone = _why_alone(members, endpoint, read.get("n"))
    elif endpoint == "completions":
        max_tokens = 16 if max_tokens is None else max_tokens  # the engine's default
        alone = _why_alone(members, endpoint, read.get("n"))
    elif endpoint == "generate":
        max_tokens, n = _read_sampling(members)
        alone = _why_alone(_sampling_members(members), endpoint, n)
    elif endpoint == "responses":
        max_tokens = read.get("max_output_tokens")
        alone = _why_response_alone(members, read)
    elif endpoint == "sglang_generate":
        return _read_sglang(members, read)
    else:
        alone = _why_message_alone(members)
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
        alone=alone,
        follows=read.get("previous_response_id") or "",
        stored=endpoint == "responses" and read.get("store") is not False,
        media=media,
    )


def _read_sglang(members: Members, read: Mapping[str, Any]) -> Body:
    """The same of SGLang's own endpoint, which shares no words with the others."""
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
        alone=asked.alone,
        prompts=asked.prompts,
        prompt_logprobs=asked.prompt_logprobs,
    )


def renamed(body: Body, model: str) -> Body:
    """A body that asks for another model."""
    return msgspec.structs.replace(body, model=model, members={**body.members, "model": msgspec.Raw(_encode(model))})


def read_members(raw: bytes | bytearray) -> Members:
    """The members of a JSON request, rid of what no client may say to an engine.

    Raises:
        InvalidRequest: not JSON, or not an object.
    """
    if raw.startswith(_BOM):  # no JSON text may begin with one, but Windows' editors write it and engines take it
        raw = raw[len(_BOM) :]
    try:
        members = scan.members(raw)
    except scan.TooMany:
        raise InvalidRequest(f"the request body has more than {scan.MOST_MEMBERS} members") from None
    except WrongShape:
        raise InvalidRequest("the request body must be a JSON object") from None
    except Undecodable as error:
        if not raw or raw.isspace():
            raise InvalidRequest("the request body is empty; it must be a JSON object") from None
        raise InvalidRequest(f"the request body is not valid JSON: {error}") from None
    if len(raw) > _LONG:
        check_sizes(members)
    if not _STRIPPED.isdisjoint(members):
        for name in FORBIDDEN.intersection(members):
            del members[name]
        for name in NESTED:
            if name in members:
                members[name] = msgspec.Raw(strip_nested(name, members[name]))
    return members


def check_sizes(members: Members) -> None:
    """Refuse what is too long for what it is.

    Raises:
        InvalidRequest
    """
    for name, value in members.items():
        most = _MOST_BYTES.get(name)
        if most is not None and len(memoryview(value)) > most:
            raise InvalidRequest(f"`{name}` is longer than {most} bytes", param=name)


def read_model(members: Members) -> str | None:
    """The model that is asked for, or None where none is named.

    Raises:
        InvalidRequest: it is no string.
    """
    return _read(members, "model") if "model" in members else None


_WORDS = tuple(map(str.encode, sorted(FORBIDDEN)))
_LETTER_ESCAPED = re.compile(rb"\\u00(?:5f|6[1-9a-f]|7[0-9a])", re.IGNORECASE)
"""An escaped letter or underscore, of which the forbidden names are made. No encoder escapes these."""


def strip_nested(name: str, raw: bytes | bytearray | msgspec.Raw) -> bytes | msgspec.Raw:
    """The value of one of the `NESTED` members without the forbidden names in it, at any depth.

    Raises:
        InvalidRequest: it is not JSON; or there is such a name in it, and it is too long to be rid of that.
    """
    text = bytes(raw)
    if len(text) > _MOST_STRIPPED and not any(word in text for word in _WORDS) and not _LETTER_ESCAPED.search(text):
        return raw if isinstance(raw, msgspec.Raw) else text
    if len(text) > _MOST_STRIPPED:
        raise InvalidRequest(
            f"`{name}` has names in it that no client may use, and is longer than {_MOST_STRIPPED} bytes", param=name
        )
    try:
        value = decode_json(text)
        if isinstance(value, dict | list):
            return _encode(_stripped(value))
    except Undecodable as error:
        raise InvalidRequest(f"`{name}` is not valid JSON: {error}", param=name) from None
    except RecursionError:
        raise InvalidRequest(f"`{name}` is nested too deeply", param=name) from None
    return raw if isinstance(raw, msgspec.Raw) else text


def _stripped(value: Any) -> Any:
    """A nested value without the forbidden names."""
    if isinstance(value, dict):
        return {
            key: _stripped(item) if isinstance(item, dict | list) else item
            for key, item in value.items()
            if key not in FORBIDDEN
        }
    return [_stripped(item) if isinstance(item, dict | list) else item for item in value]


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
    """A member's value, of the type that it must have, or None for null. What an engine would take for such a value is
    written as one from here on.

    Raises:
        InvalidRequest: it is none.
    """
    kind = _KINDS[name]
    try:
        value = _DECODERS[kind](members[name])
    except UNDECODABLE:
        value = _LENIENT[kind](bytes(members[name])) if kind in _LENIENT else None
        if value is None:
            raise InvalidRequest(f"`{name}` must be {_NAMES[kind]}", param=name) from None
        members[name] = msgspec.Raw(_encode(value))
    return _read_flags(members, value) if name == "stream_options" else value


def _read_flags(members: Members, options: dict[str, Any] | None) -> bool:
    """Whether `stream_options` ask for usage.

    Raises:
        InvalidRequest: a flag among them is none.
    """
    if options is None:
        return False
    for name in _FLAGS:
        given = options.get(name)
        if given is None or isinstance(given, bool):
            continue
        options[name] = as_bool(_encode(given))
        if options[name] is None:
            raise InvalidRequest(f"`stream_options.{name}` must be a boolean", param="stream_options")
        members["stream_options"] = msgspec.Raw(_encode(options))
    return bool(options.get("include_usage"))


_FLAGS = ("include_usage", "continuous_usage_stats")


class _Sampling(msgspec.Struct):
    max_tokens: int | None = None
    n: int | None = None


_decode_sampling = json_decoder(_Sampling)


def _read_sampling(members: Members) -> tuple[int | None, int | None]:
    """`max_tokens` and `n` of `sampling_params`, which is where `/inference/v1/generate` has them."""
    if "sampling_params" not in members:
        return None, None
    try:
        sampling = _decode_sampling(members["sampling_params"])
    except Undecodable:
        raise InvalidRequest(
            "`sampling_params` must be an object, its `max_tokens` and `n` integers", param="sampling_params"
        ) from None
    return sampling.max_tokens, sampling.n


def _sampling_members(members: Members) -> Members:
    """The members of `sampling_params`."""
    if "sampling_params" not in members:
        return {}
    try:
        return scan.members(bytes(members["sampling_params"]))
    except scan.TooMany:
        raise InvalidRequest(
            f"`sampling_params` has more than {scan.MOST_MEMBERS} members", param="sampling_params"
        ) from None


_WHOLE = ("prompt_logprobs", "prompt_logprob_token_ids", "echo", "use_beam_search", "truncate_prompt_tokens")
_NO_PART = frozenset(_WHOLE)


def _why_alone(members: Members, endpoint: Endpoint, n: int | None) -> str:
    """Why a request cannot be split between a prefill and a decode backend, or an empty string.

    With several choices or prompts the engine reports one hand-off for all of them, so decode would answer most of
    them from the wrong KV cache; prompt logprobs and echo make decode compute the whole prompt itself; truncation
    depends on `max_tokens`, which differs between the legs.
    """
    if n is not None and n != 1:
        return "n"
    if not _NO_PART.isdisjoint(members):
        for name in _WHOLE:
            if name in members and bytes(members[name]) not in (b"null", b"false"):
                return name
    if endpoint == "completions" and _is_list_of_prompts(members.get("prompt")):
        return "prompt_list"  # the last, since to some connectors it is none (`Traits.splittable`)
    return ""


class _CertainTool(msgspec.Struct):
    type: Literal["tool"]


_decode_certain_tool = json_decoder(_CertainTool)


def _why_message_alone(members: Members) -> str:
    """The same for Anthropic's messages.

    Of a request for one certain call an engine takes whatever it writes for the call's arguments, and refuses it where
    they are no JSON, as prefill's one token is none. To ask prefill for something else is no way out: there are
    templates that write the choice into the prompt.
    """
    try:
        _decode_certain_tool(members.get("tool_choice", b"null"))
    except Undecodable:
        return ""
    return "tool_choice"


class _Tool(msgspec.Struct, gc=False):
    type: Literal["function", "custom", "namespace"] = "function"  # the kinds that a client calls by itself


_decode_tool = json_decoder(_Tool)


def _why_response_alone(members: Members, read: Mapping[str, Any]) -> str:
    """The same for OpenAI's responses.

    What one goes on from is in a single backend. One in the background outlives the answer, so that nobody would see
    its hand-off fail. Tools that the engine calls by itself make it generate several times, each time with the
    parameters of the one hand-off. Truncation depends on the bound, which differs between the legs.
    """
    for name in ("previous_response_id", "background"):
        if read.get(name):
            return name
    if bytes(members.get("truncation", b"")) == b'"auto"':
        return "truncation"
    tools = islice(scan.elements(bytes(members.get("tools", b"null"))), _MOST_TOOLS + 1)
    try:
        count = len([_decode_tool(tool) for tool in tools])
    except Undecodable:  # which may be no tool at all: the one engine says what is wrong with it
        return "builtin_tools"
    return "builtin_tools" if count > _MOST_TOOLS else ""


def _is_list_of_prompts(prompt: msgspec.Raw | None) -> bool:
    """Whether a completions prompt is a list of several prompts, as text or as token ids."""
    if prompt is None:
        return False
    start = bytes(memoryview(prompt)[:64]).lstrip()
    if not start.startswith(b"[") or start[1:].lstrip()[:1].isdigit():
        return False
    try:
        _decode_single(prompt)
    except WrongShape:
        return True
    return False


_decode_single = json_decoder(tuple[msgspec.Raw])


# Four bytes of English text make about a token; a base64 image of any size makes some hundreds to a thousand.
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
    while count < _MOST_MEDIA and (place := said.find(_MEDIUM, place)) >= 0:
        place += len(_MEDIUM)
        end = said.find(b'"', place)
        count, encoded, place = count + 1, encoded + end - place, end
    return (size - encoded) // _BYTES_PER_TOKEN + _TOKENS_PER_MEDIUM * count + 1
