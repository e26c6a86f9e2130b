"""Prompts: from text, token ids or a conversation to the tokens that the engine sees.

Invariant: the same messages and tools make the same tokens on every engine; text from users never becomes a marker.
"""

from __future__ import annotations

import json
from typing import Any

from pd_proxy_simulator.errors import bad_request, invalid_field
from pd_proxy_simulator.fields import ChatFields, Object
from pd_proxy_simulator.tokens import GENERATED, SPECIAL, VOCABULARY_SIZE, mix, tokenize


def _token_ids(prompt: list[Any], param: str) -> list[int]:
    for token in prompt:
        if type(token) is not int:
            raise invalid_field(param, "int_type", "Input should be a valid integer", token)
        if not 0 <= token < VOCABULARY_SIZE:
            raise bad_request(f"Token id {token} is out of vocabulary", param)
    return prompt


def completion_prompts(prompt: Any) -> list[list[int]]:
    """The prompts of a completion request: one or several, as text or ids."""
    if prompt is None or prompt in ("", []):
        raise bad_request("Either prompt or prompt_embeds must be provided and non-empty.", "prompt")
    if isinstance(prompt, str):
        return [tokenize(prompt)]
    if not isinstance(prompt, list):
        raise invalid_field("prompt", "string_type", "Input should be a valid string", prompt)
    if type(prompt[0]) is int:
        return [_token_ids(prompt, "prompt")]
    prompts = []
    for one in prompt:
        if isinstance(one, str):
            prompts.append(tokenize(one))
        elif isinstance(one, list):
            prompts.append(_token_ids(one, "prompt"))
        else:
            raise invalid_field("prompt", "string_type", "Input should be a valid string", one)
    if not all(prompts):
        raise bad_request("The decoder prompt cannot be empty", "prompt")
    return prompts


def reused_prompt(fields: ChatFields) -> list[int] | None:
    """`kv_transfer_params.prompt_token_ids`: the prompt as prefill had it; not used where the prompt has more than
    text."""
    params = fields.kv_transfer_params
    if not params or "prompt_token_ids" not in params:
        return None
    ids = params["prompt_token_ids"]
    param = "kv_transfer_params.prompt_token_ids"
    if not isinstance(ids, list) or not ids:
        raise bad_request("prompt_token_ids must be a non-empty list of token ids", param)
    if any(type(token) is not int or not 0 <= token < VOCABULARY_SIZE for token in ids):
        raise bad_request("prompt_token_ids must be token ids of the vocabulary", param)
    if fields.echo or any(_has_media(message) for message in fields.messages or ()):
        return None
    return ids


def _has_media(message: Object) -> bool:
    content = message.get("content")
    return isinstance(content, list) and any(isinstance(part, dict) and part.get("type") != "text" for part in content)


_ROLES = {"system": "<|system|>", "developer": "<|system|>", "assistant": "<|assistant|>", "tool": "<|tool|>"}


def render_chat(
    messages: list[Object],
    tools: list[Object] | None,
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
) -> list[int]:
    """The prompt of a conversation: for each message a marker, the role, the text and an end marker."""
    if not messages:
        raise bad_request("messages must not be empty", "messages")
    tokens: list[int] = []
    end = SPECIAL["<|end|>"]
    if tools:
        tokens += [SPECIAL["<|system|>"], *tokenize(json.dumps(tools, sort_keys=True)), end]
    for message in messages:
        role = message.get("role")
        if not isinstance(role, str):
            raise invalid_field("messages", "missing", "Field required", message)
        tokens.append(SPECIAL[_ROLES.get(role, "<|user|>")])
        tokens += _content(message.get("content"))
        if message.get("tool_calls"):
            tokens += tokenize(json.dumps(message["tool_calls"], sort_keys=True))
        tokens.append(end)
    if continue_final_message:
        tokens.pop()
    elif add_generation_prompt:
        tokens.append(SPECIAL["<|assistant|>"])
    return tokens


def _content(content: Any) -> list[int]:
    if content is None:
        return []
    if isinstance(content, str):
        return tokenize(content)
    if not isinstance(content, list):
        raise invalid_field("messages", "string_type", "Input should be a valid string", content)
    tokens: list[int] = []
    for part in content:
        if not isinstance(part, dict):
            raise invalid_field("messages", "dict_type", "Input should be a valid dictionary", part)
        if part.get("type") == "text":
            tokens += tokenize(str(part.get("text", "")))
            continue
        tokens.append(SPECIAL["<|media|>"])
        tokens += part[EMBEDDING] if EMBEDDING in part else embedding(part)
    return tokens


EMBEDDING = "\0embedding"
"""The member of a part that holds the embedding from an encoder. A client's member of this name is not used."""


def embedding(part: Object) -> list[int]:
    """A medium's embedding. It does not depend on the key under which it is cached."""
    seen = json.dumps({name: value for name, value in part.items() if name != "uuid"}, sort_keys=True).encode()
    drawn = mix(sum(value * (index + 1) for index, value in enumerate(seen)))
    return [GENERATED[(drawn >> shift) % len(GENERATED)] for shift in range(0, 64, 4)]
