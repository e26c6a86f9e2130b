"""Turns a body and its headers into what the engine has to do; refuses what vLLM 0.32's API server refuses, in its
words.

Invariant: a `GenerationRequest` that exists can be run; nothing after this module reads the body again.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pd_proxy_simulator.config import SimulatorConfig
from pd_proxy_simulator.errors import RequestError, bad_request, invalid_field
from pd_proxy_simulator.fields import ChatFields, CommonFields, CompletionFields, Object, StreamOptions, decode_fields
from pd_proxy_simulator.formats import tool_structure, wanted_structure, wanted_tool
from pd_proxy_simulator.prompts import completion_prompts, render_chat, reused_prompt
from pd_proxy_simulator.sequences import Sampling
from pd_proxy_simulator.structured import Structure
from pd_proxy_simulator.tokens import mix

_MAX_LOGPROBS = 20
_DEFAULT_COMPLETION_TOKENS = 16


Kind = Literal["chat", "completion", "messages", "responses", "generate", "sglang_generate"]


@dataclass(slots=True)
class GenerationRequest:
    """One request, decoded."""

    kind: Kind
    external_id: str
    model: str
    prompts: list[list[int]]
    n: int
    sampling: list[Sampling]  # one for each choice
    stream: bool
    include_usage: bool
    continuous_usage: bool
    return_token_ids: bool
    tokens_as_ids: bool
    logprobs: int | None
    prompt_logprobs: int | None
    echo: bool
    only_echo: bool  # completions with max_tokens 0
    cache_key: int
    cache_salt: str
    tool: str | None
    tool_required: bool
    body: Object = field(default_factory=dict)  # as it came; responses repeat their request's parameters


def decode_chat(body: Any, headers: Mapping[str, str], config: SimulatorConfig) -> GenerationRequest:
    """Decode a chat request. Raises RequestError."""
    fields: ChatFields = decode_fields(body, ChatFields)
    if fields.messages is None:
        raise invalid_field("messages", "missing", "Field required", body)
    top = fields.top_logprobs
    if top is not None and top > 0 and not fields.logprobs:
        raise bad_request("when using `top_logprobs`, `logprobs` must be set to true.", "top_logprobs")
    if top is not None and top < 0:
        raise bad_request("`top_logprobs` must be a positive value.", "top_logprobs")
    if fields.continue_final_message and fields.add_generation_prompt:
        message = "Cannot set both `continue_final_message` and `add_generation_prompt` to True."
        raise bad_request(message, "continue_final_message")
    check(fields, config)
    tool, required = wanted_tool(fields)
    logprobs = (top or 0) if fields.logprobs else None
    prompt = reused_prompt(fields)
    if prompt is None:
        prompt = render_chat(
            fields.messages,
            fields.tools,
            add_generation_prompt=fields.add_generation_prompt is not False,
            continue_final_message=bool(fields.continue_final_message),
        )
    limit = fields.max_completion_tokens if fields.max_completion_tokens is not None else fields.max_tokens
    structure = wanted_structure(fields)
    if tool is not None:
        structure = tool_structure(fields, tool, listed=required)
    external_id = "chatcmpl-" + base_id(fields, headers)
    return generation("chat", external_id, fields, config, [prompt], limit, logprobs, structure, tool, required)


def decode_batch(body: Any, headers: Mapping[str, str], config: SimulatorConfig) -> GenerationRequest:
    """Decode several chats in one request: one choice for each. Raises RequestError."""
    chats = body.get("messages")
    if not isinstance(chats, list) or not chats or not all(isinstance(chat, list) and chat for chat in chats):
        raise invalid_field("messages", "list_type", "Input should be a valid list", chats)
    if body.get("stream") or body.get("tools") or body.get("n") not in (None, 1):
        raise bad_request("streaming, tools and n are not for batches", None)
    decoded = [decode_chat({**body, "messages": chat}, headers, config) for chat in chats]
    return replace(decoded[0], prompts=[one.prompts[0] for one in decoded])


def decode_completion(body: Any, headers: Mapping[str, str], config: SimulatorConfig) -> GenerationRequest:
    """Decode a completion request. Raises RequestError."""
    fields: CompletionFields = decode_fields(body, CompletionFields)
    check(fields, config)
    if fields.suffix:
        raise bad_request("suffix is not currently supported", "suffix")
    prompts = completion_prompts(fields.prompt)
    limit = _DEFAULT_COMPLETION_TOKENS if fields.max_tokens is None else fields.max_tokens
    external_id = "cmpl-" + base_id(fields, headers)
    structure = wanted_structure(fields)
    return generation(
        "completion", external_id, fields, config, prompts, limit, fields.logprobs, structure, None, False
    )


def base_id(fields: CommonFields, headers: Mapping[str, str]) -> str:
    """The request's name in its answer, without the endpoint's own prefix."""
    return headers.get("x-request-id") or fields.request_id or uuid.uuid4().hex


def check(fields: CommonFields, config: SimulatorConfig) -> None:
    """Refuse what no endpoint accepts. Raises RequestError."""
    if fields.model is not None and fields.model != config.model:
        raise RequestError(404, "NotFoundError", f"The model `{fields.model}` does not exist.", "model")
    if fields.stream_options is not None and not fields.stream:
        raise bad_request("Stream options can only be defined when `stream=True`.", "stream_options")
    if fields.prompt_logprobs is not None and fields.prompt_logprobs > 0 and fields.stream:
        raise bad_request("`prompt_logprobs` are not available when `stream=True`.", "prompt_logprobs")
    if fields.temperature is not None and fields.temperature < 0:
        raise bad_request(f"temperature must be non-negative, got {fields.temperature}.", "temperature")
    if fields.top_p is not None and not 0 < fields.top_p <= 1:
        raise bad_request(f"top_p must be in (0, 1], got {fields.top_p}.", "top_p")
    for name in ("presence_penalty", "frequency_penalty"):
        value = getattr(fields, name)
        if value is not None and not -2 <= value <= 2:
            raise bad_request(f"{name} must be in [-2, 2], got {value}.", name)
    n = 1 if fields.n is None else fields.n
    if n < 1:
        raise bad_request(f"n must be at least 1, got {n}.", "n")
    if n > 1 and fields.temperature is not None and fields.temperature < 1e-5:
        raise bad_request(f"n must be 1 when using greedy sampling, got {n}.", "n")
    salt = fields.cache_salt
    if salt is not None and (not 0 < len(salt) <= 128 or any(sign in salt for sign in "@/\\\0")):
        raise bad_request("Parameter 'cache_salt' must be a non-empty string of at most 128 characters.", "cache_salt")
    if fields.stop is not None and "" in ([fields.stop] if isinstance(fields.stop, str) else fields.stop):
        raise bad_request("stop cannot contain an empty string.", "stop")
    if fields.priority:
        raise bad_request("Got priority but Priority scheduling is not enabled.", "priority")


def generation(
    kind: Kind,
    external_id: str,
    fields: CommonFields,
    config: SimulatorConfig,
    prompts: list[list[int]],
    limit: int | None,
    logprobs: int | None,
    structure: Structure | None,
    tool: str | None,
    tool_required: bool,
) -> GenerationRequest:
    """Returns what the engine has to do. Raises RequestError."""
    echo = kind == "completion" and bool(fields.echo)
    only_echo = echo and limit == 0
    if only_echo:
        limit = 1
    most = _most_tokens(fields, config, max(map(len, prompts)), limit)
    for name, value in (("logprobs", logprobs), ("prompt_logprobs", fields.prompt_logprobs)):
        if value is not None and value > _MAX_LOGPROBS:
            message = f"Requested sample {name} of {value}, which is greater than max allowed: {_MAX_LOGPROBS}"
            raise bad_request(message, name)
    options = fields.stream_options or StreamOptions()
    include_usage = bool(options.include_usage)
    return GenerationRequest(
        kind=kind,
        external_id=external_id,
        model=fields.model or config.model,
        prompts=prompts,
        n=fields.n or 1,
        sampling=_samplings(fields, most, structure),
        stream=bool(fields.stream),
        include_usage=include_usage,
        continuous_usage=include_usage and bool(options.continuous_usage_stats),
        return_token_ids=bool(fields.return_token_ids),
        tokens_as_ids=bool(fields.return_tokens_as_token_ids),
        logprobs=logprobs,
        prompt_logprobs=fields.prompt_logprobs,
        echo=echo,
        only_echo=only_echo,
        cache_key=0 if fields.cache_salt is None else mix(int.from_bytes(fields.cache_salt.encode()) % (1 << 61) + 1),
        cache_salt=fields.cache_salt or "",
        tool=tool,
        tool_required=tool_required,
    )


def _most_tokens(fields: CommonFields, config: SimulatorConfig, longest: int, limit: int | None) -> int:
    """How many tokens a sequence may generate after a prompt of `longest` tokens. Raises RequestError."""
    context = config.context
    if longest >= context or (limit is not None and longest + limit > context):
        raise bad_request(
            f"This model's maximum context length is {context} tokens. However, you requested {limit or 1} output "
            f"tokens and your prompt contains {longest} input tokens, for a total of {longest + (limit or 1)} tokens. "
            "Please reduce the length of the input prompt or the number of requested output tokens.",
            "input_tokens",
        )
    if limit is not None and limit < 1:
        raise bad_request(f"max_tokens must be at least 1, got {limit}.", "max_tokens")
    least = fields.min_tokens or 0
    if least < 0:
        raise bad_request(f"min_tokens must be greater than or equal to 0, got {least}.", "min_tokens")
    most = context - longest if limit is None else limit
    if least > most:
        raise bad_request(f"min_tokens must be less than or equal to max_tokens={most}, got {least}.", "min_tokens")
    return most


def _samplings(fields: CommonFields, most: int, structure: Structure | None) -> list[Sampling]:
    """The sampling parameters of each choice of a request."""
    stop = [fields.stop] if isinstance(fields.stop, str) else list(fields.stop or [])
    greedy = fields.temperature is not None and fields.temperature < 1e-5
    return [
        Sampling(
            max_tokens=most,
            min_tokens=fields.min_tokens or 0,
            stop=stop,
            stop_token_ids=frozenset(fields.stop_token_ids or ()),
            include_stop=bool(fields.include_stop_str_in_output),
            ignore_eos=bool(fields.ignore_eos),
            salt=0 if greedy else (fields.seed or 0) + child,
            structure=structure,
        )
        for child in range(fields.n or 1)
    ]
