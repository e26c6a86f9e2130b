"""The endpoints by which engines generate, and how the body of each is laid out.

Connectors speak of one request for one token in the words of OpenAI's chat (`max_tokens`, `ignore_eos`, `min_tokens`);
what these are called elsewhere is said here, so that no connector knows of endpoints and no endpoint of connectors.
Field names as in vLLM 0.32.
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
    """One endpoint.

    Attributes:
        path: where engines serve it, and the gateway too.
        reads: members whose values the gateway must know, in the order in which a wrong one is told.
        prompt: members that make up the prompt, the main one first.
        answer: the member of a whole answer without which it is none.
        resumable: a broken stream may be continued, and prefill's token may be the client's first.
        asks_usage: `stream_options.include_usage` brings usage; without it the stream has its own.
        id_member: the member that names the request, for engines that do not read X-Request-Id here; or empty.
        id_prefix: what such a name begins with.
        ranked: a leg can be told the data-parallel rank that it is for.
        of_one_make: only the engines of one make have it, whose connector says so; they do not know of models.
        own_words: turns the members of a leg of one token from chat's words into this endpoint's; None where these are
            the same.
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
    of_one_make: bool = False
    own_words: Callable[[Members], Members] | None = None


def _messages_leg(leg: Members) -> Members:
    """Anthropic's. It has no `ignore_eos` and no `min_tokens`, and engines ignore both."""
    drops = ("stop_sequences", "ignore_eos", "min_tokens", "metadata")
    return {name: value for name, value in leg.items() if name not in drops}


def _responses_leg(leg: Members) -> Members:
    """OpenAI's responses. Nothing of it is stored, so that the client's answer alone has its name."""
    drops = ("max_tokens", "min_tokens", "include", "metadata", "max_tool_calls", "enable_response_messages")
    members = {name: value for name, value in leg.items() if name not in drops}
    members["max_output_tokens"] = _ONE
    members["store"] = members["background"] = FALSE
    return members


def _generate_leg(leg: Members) -> Members:
    """vLLM's tokens in, tokens out: all that is about sampling is in `sampling_params`."""
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
"""What the prefill leg of `/inference/v1/generate` does without, as `connector.py` says for the others."""


def _object(raw: msgspec.Raw | None) -> dict[str, msgspec.Raw]:
    """The members of an object; none of what is no object."""
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
        own_words=_messages_leg,
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
        own_words=_responses_leg,
    ),
    "generate": Layout(
        path="/inference/v1/generate",
        reads=("stream", "stream_options", "model", "return_token_ids"),
        prompt=("token_ids",),
        own_words=_generate_leg,
    ),
    "sglang_generate": Layout(
        path="/generate",
        reads=("stream", "model"),
        prompt=("text", "input_ids", "input_embeds"),
        answer="meta_info",
        asks_usage=False,
        id_member="rid",
        of_one_make=True,
    ),
}

COMMON = frozenset(endpoint for endpoint, layout in LAYOUTS.items() if not layout.of_one_make)
"""The endpoints that more than one make of engine has."""
