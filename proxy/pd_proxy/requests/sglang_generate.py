"""Reads requests to SGLang's own `/generate`, and prefill's answers to them.

A request has one prompt or a batch. A batch is a list, even of one prompt, and its answer is a list too. The members
for sampling are in `sampling_params`, which is one object for all prompts or a list with one for each. Member names are
those of SGLang 0.5.23 (`io_struct.py`).
"""

from __future__ import annotations

from itertools import islice
from typing import Any

import msgspec

from pd_proxy.decoding import Undecodable, json_decoder
from pd_proxy.encoding import NULL, encode_json
from pd_proxy.errors import BackendGarbled, InvalidRequest
from pd_proxy.requests.endpoints import Members
from pd_proxy.requests.json_scan import elements

DROPPED = frozenset(
    {
        "background",  # such a request would go on after its client has disconnected
        "http_worker_ipc",  # an address for the engine's own processes
        "encoder_urls",
        "need_wait_for_mm_inputs",
        "num_items_assigned",
        "kv_router_hint",  # names another engine to read from
        "external_trace_header",
        "received_time",
        "log_metrics",
        "no_logs",
        "custom_labels",
    }
)
"""Members that this endpoint accepts from every client, though they are meant for engines or operators. They are
removed, as those of `members.FORBIDDEN` are for every endpoint."""

MOST_PROMPTS = 4096
"""The most prompts of a batch. Each has an id of its own from the gateway, and an answer of its own."""

_DEFAULT_TOKENS = 128
_BYTES_PER_TOKEN = 4


class Asked(msgspec.Struct, frozen=True):
    """What the gateway reads of a request.

    Attributes:
        prompts: the number of prompts of a batch; 0 for a single prompt.
        prompt_tokens: the estimated tokens of all prompts.
        max_tokens: the bound of the tokens of all answers together.
        unsplittable: why prefill and decode cannot share the request, or empty.
        prompt_logprobs: the answer has log probabilities of the prompt, which only prefill knows.
    """

    prompts: int
    prompt_tokens: int
    max_tokens: int
    unsplittable: str
    prompt_logprobs: bool


class _Sampling(msgspec.Struct):
    max_new_tokens: int | None = None
    n: int | None = None
    beam_width: int | None = None


_decode_sampling = json_decoder(_Sampling | list[_Sampling] | None)
_decode_flag = json_decoder(bool | list[bool] | None)


def read(members: Members) -> Asked:
    """Read a request, and remove the members in `DROPPED`.

    Raises:
        InvalidRequest: a member that the gateway reads has the wrong type.
    """
    for name in DROPPED.intersection(members):
        del members[name]
    for name in ("sampling_params", "return_logprob"):  # one for each prompt
        if name in members:
            _length(name, bytes(members[name]))
    try:
        sampling = _decode_sampling(members.get("sampling_params", NULL)) or _Sampling()
    except Undecodable:
        raise InvalidRequest(
            "`sampling_params` must be an object, or a list of them, with integers for `max_new_tokens` and `n`",
            param="sampling_params",
        ) from None
    try:
        flags = _decode_flag(members.get("return_logprob", NULL))
    except Undecodable:
        raise InvalidRequest("`return_logprob` must be a boolean, or a list of them", param="return_logprob") from None
    each = sampling if isinstance(sampling, list) else [sampling]
    prompts, prompt_tokens = _read_prompts(members)
    bounds = [_DEFAULT_TOKENS if one.max_new_tokens is None else max(0, one.max_new_tokens) for one in each]
    return Asked(
        prompts=prompts,
        prompt_tokens=prompt_tokens,
        max_tokens=sum(bounds) if len(bounds) > 1 else bounds[0] * max(1, prompts),
        unsplittable=_why_unsplittable(members, each),
        prompt_logprobs=any(flags) if isinstance(flags, list) else bool(flags),
    )


def _why_unsplittable(members: Members, sampling: list[_Sampling]) -> str:
    """Why a request cannot be split, or empty. Several choices of a prompt would have the same bootstrap room, and a
    session is stored in one engine."""
    if any(one.n not in (None, 1) for one in sampling):
        return "n"
    if any(one.beam_width not in (None, 1) for one in sampling):
        return "beam_width"
    for name in ("session_params", "session_id"):
        if name in members and bytes(members[name]) != b"null":
            return name
    return ""


def _read_prompts(members: Members) -> tuple[int, int]:
    """The number of prompts of a batch, 0 for a single prompt; and an estimate of their tokens.

    Of the three members the first that is present is used, as in the engine. The engine reports values of a wrong type.
    """
    for name in ("text", "input_ids", "input_embeds"):
        raw = bytes(members.get(name, NULL))
        if raw != b"null":
            break
    else:
        return 0, 1
    if name == "text":
        prompts = _length(name, raw) if raw.startswith(b"[") else 0
        return prompts, len(raw) // _BYTES_PER_TOKEN + 1
    # A single prompt is a list of ids, or a list of embeddings, which are lists. A batch has one more level of lists.
    depth = 2 if name == "input_ids" else 3
    opening = bytes(raw[:256].translate(None, b" \t\r\n"))
    prompts = _length(name, raw) if opening.startswith(b"[" * depth) else 0
    return prompts, raw.count(b",") + 1 if name == "input_ids" else raw.count(b"[")


def _length(name: str, raw: bytes) -> int:
    """The number of elements of a list; 0 where the value is not a list.

    Raises:
        InvalidRequest: there are more than `MOST_PROMPTS`.
    """
    try:
        count = sum(1 for _ in islice(elements(raw), MOST_PROMPTS + 1))
    except Undecodable:
        return 0
    if count > MOST_PROMPTS:
        raise InvalidRequest(f"`{name}` has more than {MOST_PROMPTS} elements, one for each prompt", param=name)
    return count


class _Meta(msgspec.Struct):
    finish_reason: dict[str, Any] | str | None = None
    prompt_tokens: Any = 0
    completion_tokens: Any = 0
    cached_tokens: Any = 0


class _Item(msgspec.Struct):
    meta_info: _Meta


_decode_items = json_decoder(_Item | list[_Item])


def usage_of(answer: bytes, prompts: int) -> msgspec.Raw:
    """The usage in prefill's answer, with the member names of chat.

    Arguments:
        prompts: the number of answers that it must have; 0 for a single answer that is not in a list.
    Raises:
        BackendGarbled: it is not an answer; or prefill has aborted the request, so that decode would wait in vain.
    """
    try:
        items = _decode_items(answer)
    except Undecodable as error:
        raise BackendGarbled(f"prefill's answer is not one: {error}") from None
    if isinstance(items, list) != bool(prompts) or (isinstance(items, list) and len(items) != prompts):
        raise BackendGarbled("prefill's answer is not for as many prompts as it was asked")
    metas = [item.meta_info for item in (items if isinstance(items, list) else [items])]
    if any(isinstance(meta.finish_reason, dict) and meta.finish_reason.get("type") == "abort" for meta in metas):
        raise BackendGarbled("prefill has given the request up")
    counts = [(meta.prompt_tokens, meta.completion_tokens, meta.cached_tokens) for meta in metas]
    if any(type(count) is not int or count < 0 for each in counts for count in each):
        return NULL  # a usage with a wrong value is ignored as a whole
    prompt, completion, cached = map(sum, zip(*counts, strict=True))
    usage = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
    return msgspec.Raw(encode_json(usage))
