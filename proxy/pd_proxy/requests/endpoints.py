"""The endpoints that generate, and the layout of the request body of each.

Connectors write a leg of one token with the member names of OpenAI's chat (`max_tokens`, `ignore_eos`, `min_tokens`).
This module translates them for the other endpoints, so connectors and endpoints are independent of each other. Member
names are those of vLLM 0.32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec

from pd_proxy.decoding import Undecodable, json_decoder
from pd_proxy.encoding import FALSE, encode_json

Members = dict[str, msgspec.Raw]
Endpoint = Literal["chat", "completions", "messages", "responses", "generate", "sglang_generate"]

_decode_object = json_decoder(dict[str, msgspec.Raw])
_ONE = msgspec.Raw(b"1")


class Layout(msgspec.Struct, frozen=True):
    """The layout of one endpoint.

    Attributes:
        path: the path at which engines and the gateway serve it.
        reads: the members whose values the gateway reads, in the order in which errors are reported.
        prompt: the members that make up the prompt, the main one first.
        answer: the member that every complete answer has.
        resumable: whether a broken stream may be resumed, and prefill's token may be the client's first.
        asks_usage: whether streams have usage only with `stream_options.include_usage`; otherwise they always have it.
        id_member: the member that names the request, for engines that do not read X-Request-Id here; or empty.
        id_prefix: the beginning of such a name.
        ranked: whether a leg can carry the data-parallel rank that it is for.
        of_one_family: whether only one engine family has it, as its connector says. Its requests need not name a model.
        translate_leg: translates the members of a leg of one token from chat's names into those of this endpoint; None
            where the names are the same.
    """

    path: str
    reads: tuple[str, ...]
    prompt: tuple[str, ...]
    answer: str = "choices"
    resumable: bool = False
    asks_usage: bool = True
    id_member: str = ""
    id_prefix: str = ""
    ranked: bool = True
    of_one_family: bool = False
    translate_leg: Callable[[Members], Members] | None = None


def _messages_leg(leg: Members) -> Members:
    """Translate for Anthropic's messages, which have neither `ignore_eos` nor `min_tokens`."""
    drops = ("stop_sequences", "ignore_eos", "min_tokens", "metadata")
    return {name: value for name, value in leg.items() if name not in drops}


def _responses_leg(leg: Members) -> Members:
    """Translate for OpenAI's responses. The leg's answer is not stored, so that only the client's answer has its id."""
    drops = ("max_tokens", "min_tokens", "include", "metadata", "max_tool_calls", "enable_response_messages")
    members = {name: value for name, value in leg.items() if name not in drops}
    members["max_output_tokens"] = _ONE
    members["store"] = members["background"] = FALSE
    return members


def _generate_leg(leg: Members) -> Members:
    """Translate for vLLM's `/inference/v1/generate`, whose members for sampling are in `sampling_params`."""
    members = dict(leg)
    given = _object(members.get("sampling_params"))
    sampling = {name: value for name, value in given.items() if name not in _SAMPLING_DROPPED}
    for name in ("max_tokens", "min_tokens", "ignore_eos"):
        if (value := members.pop(name, None)) is not None:
            sampling[name] = value
    members["sampling_params"] = msgspec.Raw(encode_json(sampling))
    members.pop("output_mode", None)
    return members


_SAMPLING_DROPPED = frozenset(
    {
        *("n", "min_tokens", "stop", "stop_token_ids", "repetition_detection"),
        *("logprobs", "logprob_token_ids", "flat_logprobs", "structured_outputs"),
    }
)
"""The sampling members that the prefill leg of `/inference/v1/generate` does not need (`_DROPPED` in
`connector.py`)."""


def _object(raw: msgspec.Raw | None) -> dict[str, msgspec.Raw]:
    """The members of an object; empty where the value is not an object."""
    try:
        return _decode_object(raw) if raw is not None else {}
    except Undecodable:
        return {}


_COMMON = ("stream", "stream_options", "n", "max_tokens", "min_tokens")

LAYOUTS: dict[Endpoint, Layout] = {
    "chat": Layout(
        path="/v1/chat/completions",
        reads=(*_COMMON, "max_completion_tokens", "model", "return_token_ids"),
        prompt=("messages", "tools"),
        resumable=True,
    ),
    "completions": Layout(
        path="/v1/completions",
        reads=(*_COMMON, "model", "return_token_ids"),
        prompt=("prompt", "tools"),
        resumable=True,
    ),
    "messages": Layout(
        path="/v1/messages",
        reads=("stream", "max_tokens", "model"),
        prompt=("messages", "tools", "system"),
        answer="content",
        asks_usage=False,
        translate_leg=_messages_leg,
    ),
    "responses": Layout(
        path="/v1/responses",
        reads=("stream", "max_output_tokens", "model", "previous_response_id", "store", "background"),
        prompt=("input", "tools", "instructions"),
        answer="output",
        asks_usage=False,
        id_member="request_id",
        id_prefix="resp_",
        ranked=False,
        translate_leg=_responses_leg,
    ),
    "generate": Layout(
        path="/inference/v1/generate",
        reads=("stream", "stream_options", "model", "return_token_ids"),
        prompt=("token_ids",),
        translate_leg=_generate_leg,
    ),
    "sglang_generate": Layout(
        path="/generate",
        reads=("stream", "model"),
        prompt=("text", "input_ids", "input_embeds"),
        answer="meta_info",
        asks_usage=False,
        id_member="rid",
        of_one_family=True,
    ),
}

COMMON = frozenset(endpoint for endpoint, layout in LAYOUTS.items() if not layout.of_one_family)
"""The endpoints that more than one engine family has."""
