"""A client's request body: read once, at its top level only, and rid of what no client may say to an engine.

Members stay the raw bytes they came as (`msgspec.Raw`), so that a 400 kB prompt is neither decoded nor encoded again,
and fields the gateway does not know pass through untouched. The body is always written anew from its members, never
spliced: of two members with one name only the last exists from here on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from proxy.decoding import UNDECODABLE, Undecodable, WrongShape, bare_json_decoder, decode_json, json_decoder
from proxy.errors import InvalidRequest
from proxy.handoff import sglang_generate
from proxy.handoff.endpoints import LAYOUTS, Endpoint, Members
from proxy.handoff.parts import has_media

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

_decode_members = json_decoder(Members)
_decode_list = json_decoder(list[msgspec.Raw])
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
    options = read.get("stream_options") or {}
    max_tokens = read.get("max_tokens")
    if endpoint == "chat":
        max_tokens = read.get("max_completion_tokens") or max_tokens
        alone = _why_alone(members, endpoint, read.get("n"))
    elif endpoint == "completions":
        max_tokens = 16 if max_tokens is None else max_tokens  # the engine's default
        alone = _why_alone(members, endpoint, read.get("n"))
    elif endpoint == "generate":
        max_tokens, n = _read_sampling(members)
        alone = _why_alone(_decode_members(members.get("sampling_params", b"{}")), endpoint, n)
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
        wants_usage=bool(options.get("include_usage")) or not layout.asks_usage,
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
    try:
        members = _decode_members(raw)
        for name in FORBIDDEN.intersection(members):
            del members[name]
        for name in NESTED:
            if name in members:
                members[name] = msgspec.Raw(strip_nested(name, members[name]))
    except WrongShape:
        raise InvalidRequest("the request body must be a JSON object") from None
    except Undecodable as error:
        raise InvalidRequest(f"the request body is not valid JSON: {error}") from None
    return members


def read_model(members: Members) -> str | None:
    """The model that is asked for, or None where none is named.

    Raises:
        InvalidRequest: it is no string.
    """
    return _read(members, "model") if "model" in members else None


def strip_nested(name: str, raw: bytes | bytearray | msgspec.Raw) -> bytes | msgspec.Raw:
    """The value of one of the `NESTED` members without the forbidden names in it.

    Raises:
        InvalidRequest: it is not JSON.
    """
    try:
        value = decode_json(raw)
        if isinstance(value, dict):
            return _encode(_stripped(value))
        if isinstance(value, list):  # one for each prompt
            return _encode([_stripped(item) if isinstance(item, dict) else item for item in value])
    except Undecodable as error:
        raise InvalidRequest(f"`{name}` is not valid JSON: {error}", param=name) from None
    except RecursionError:
        raise InvalidRequest(f"`{name}` is nested too deeply", param=name) from None
    return raw if isinstance(raw, msgspec.Raw) else bytes(raw)


def _stripped(value: Mapping[str, Any]) -> dict[str, Any]:
    """A nested object without the forbidden names, at any depth."""
    return {
        key: _stripped(item) if isinstance(item, dict) else item for key, item in value.items() if key not in FORBIDDEN
    }


_NAMES = {bool: "a boolean", int: "an integer", str: "a string", dict: "an object"}
_DECODERS = {kind: bare_json_decoder(kind | None) for kind in _NAMES}
_KINDS = {
    "stream": bool,
    "stream_options": dict,
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


def _read(members: Members, name: str) -> Any:
    """A member's value, of the type that it must have, or None for null."""
    kind = _KINDS[name]
    try:
        return _DECODERS[kind](members[name])
    except UNDECODABLE:
        raise InvalidRequest(f"`{name}` must be {_NAMES[kind]}", param=name) from None


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


_WHOLE = ("prompt_logprobs", "prompt_logprob_token_ids", "echo", "use_beam_search", "truncate_prompt_tokens")


def _why_alone(members: Members, endpoint: Endpoint, n: int | None) -> str:
    """Why a request cannot be split between a prefill and a decode backend, or an empty string.

    With several choices or prompts the engine reports one hand-off for all of them, so decode would answer most of
    them from the wrong KV cache; prompt logprobs and echo make decode compute the whole prompt itself; truncation
    depends on `max_tokens`, which differs between the legs.
    """
    if n is not None and n != 1:
        return "n"
    for name in _WHOLE:
        if name in members and bytes(members[name]) not in (b"null", b"false"):
            return name
    if endpoint == "completions" and _is_list_of_prompts(members.get("prompt")):
        return "prompt_list"  # the last, since to some connectors it is none (`Connector.splits`)
    return ""


class _Tool(msgspec.Struct):
    type: str = "function"


_decode_tool = json_decoder(_Tool | None)


def _why_message_alone(members: Members) -> str:
    """The same for Anthropic's messages.

    Of a request for one certain call an engine takes whatever it writes for the call's arguments, and refuses it where
    they are no JSON, as prefill's one token is none. To ask prefill for something else is no way out: there are
    templates that write the choice into the prompt.
    """
    try:
        choice = _decode_tool(members.get("tool_choice", b"null"))
    except Undecodable:
        return ""  # the engine says what is wrong with it
    return "tool_choice" if choice is not None and choice.type == "tool" else ""


_decode_tools = json_decoder(list[_Tool] | None)
_CLIENT_TOOLS = frozenset({"function", "custom", "namespace"})


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
    try:
        tools = _decode_tools(members.get("tools", b"null")) or ()
    except Undecodable:
        return ""  # the engine says what is wrong with them
    return "" if all(tool.type in _CLIENT_TOOLS for tool in tools) else "builtin_tools"


def _is_list_of_prompts(prompt: msgspec.Raw | None) -> bool:
    """Whether a completions prompt is a list of several prompts, as text or as token ids."""
    if prompt is None:
        return False
    start = bytes(memoryview(prompt)[:64]).lstrip()
    if not start.startswith(b"[") or start[1:].lstrip()[:1].isdigit():
        return False
    return len(_decode_list(prompt)) != 1


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
    inline = bytes(raw).split(_MEDIUM)[1:]
    encoded = sum(part.find(b'"') for part in inline)
    return (size - encoded) // _BYTES_PER_TOKEN + _TOKENS_PER_MEDIUM * len(inline) + 1
