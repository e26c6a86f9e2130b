"""Finds out why a request cannot be split between a prefill and a decode backend."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any, Literal

import msgspec

from pd_proxy.decoding import Undecodable, WrongShape, json_decoder
from pd_proxy.errors import InvalidRequest
from pd_proxy.requests import json_scan as scan
from pd_proxy.requests.endpoints import Endpoint, Members

_MAX_TOOLS = 4096  # tools that are read


class _Sampling(msgspec.Struct):
    max_tokens: int | None = None
    n: int | None = None


_decode_sampling = json_decoder(_Sampling)


def read_sampling(members: Members) -> tuple[int | None, int | None]:
    """`max_tokens` and `n` of a request to `/inference/v1/generate`, which has them in `sampling_params`."""
    if "sampling_params" not in members:
        return None, None
    try:
        sampling = _decode_sampling(members["sampling_params"])
    except Undecodable:
        raise InvalidRequest(
            "`sampling_params` must be an object, its `max_tokens` and `n` integers", param="sampling_params"
        ) from None
    return sampling.max_tokens, sampling.n


def sampling_members(members: Members) -> Members:
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


def why_unsplittable(members: Members, endpoint: Endpoint, n: int | None) -> str:
    """Why a request cannot be split between a prefill and a decode backend, or empty.

    - With several choices or prompts the engine reports one hand-off for all, so decode would answer most of them from
      the wrong KV cache.
    - With prompt logprobs or echo, decode computes the whole prompt itself.
    - Truncation depends on `max_tokens`, which differs between the legs.
    """
    if n is not None and n != 1:
        return "n"
    if not _NO_PART.isdisjoint(members):
        for name in _WHOLE:
            if name in members and bytes(members[name]) not in (b"null", b"false"):
                return name
    if endpoint == "completions" and _is_list_of_prompts(members.get("prompt")):
        return "prompt_list"  # last, since some connectors can split these (`Traits.splittable`)
    return ""


class _CertainTool(msgspec.Struct):
    type: Literal["tool"]


_decode_certain_tool = json_decoder(_CertainTool)


def why_message_unsplittable(members: Members) -> str:
    """The same for Anthropic's messages.

    Where a request demands a certain tool, the engine parses all output as the arguments of the call, and fails where
    they are not JSON, as prefill's one token is not. The prefill leg cannot leave `tool_choice` out, since some
    templates write it into the prompt.
    """
    try:
        _decode_certain_tool(members.get("tool_choice", b"null"))
    except Undecodable:
        return ""
    return "tool_choice"


class _Tool(msgspec.Struct, gc=False):
    type: Literal["function", "custom", "namespace"] = "function"  # the kinds of tools that clients call


_decode_tool = json_decoder(_Tool)


def why_response_unsplittable(members: Members, read: Mapping[str, Any]) -> str:
    """The same for OpenAI's responses.

    - The earlier response that a request continues is stored in one backend.
    - A request in the background goes on after its answer, so a failure of its hand-off would not be noticed.
    - With tools that the engine calls itself it generates several times, each time with the parameters of the one
      hand-off.
    - Truncation depends on the bound of tokens, which differs between the legs.
    """
    for name in ("previous_response_id", "background"):
        if read.get(name):
            return name
    if bytes(members.get("truncation", b"")) == b'"auto"':
        return "truncation"
    tools = islice(scan.elements(bytes(members.get("tools", b"null"))), _MAX_TOOLS + 1)
    try:
        count = len([_decode_tool(tool) for tool in tools])
    except Undecodable:  # a built-in tool; or malformed, which the engine reports
        return "builtin_tools"
    return "builtin_tools" if count > _MAX_TOOLS else ""


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
