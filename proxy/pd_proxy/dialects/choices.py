"""Events with choices: what is read of them, and questions about their content."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from pd_proxy.decoding import Undecodable, decode_json
from pd_proxy.dialects.strip import names_handoff
from pd_proxy.dialects.token_pattern import NOT_FINISHED
from pd_proxy.encoding import ABSENT

_ODD = re.compile(rb'"recomputed"|"error":')


class Choice(msgspec.Struct):
    index: Any = 0
    delta: dict[str, Any] | None = None
    text: str | None = None
    finish_reason: Any = None
    stop_reason: Any = None
    token_ids: msgspec.Raw = ABSENT
    prompt_token_ids: msgspec.Raw = ABSENT


class Event(msgspec.Struct):
    """What is read of an event."""

    choices: list[Choice] | None = None
    usage: msgspec.Raw = ABSENT
    error: Any = None
    prompt_token_ids: msgspec.Raw = ABSENT


def carries_token(choices: list[Choice]) -> bool:
    """Whether one of these choices is more than the opening role chunk."""
    for choice in choices:
        delta = choice.delta
        if delta is None or "role" not in delta or choice.finish_reason is not None:
            return True
        if delta.get("content") or has_more(delta):
            return True
    return False


_OPENING = frozenset({"role", "content"})


def has_more(delta: dict[str, Any]) -> bool:
    """Whether a delta has anything beside a role and content."""
    return not delta.keys() <= _OPENING and any(value for name, value in delta.items() if name not in _OPENING)


def has_content(choices: list[Choice]) -> bool:
    """Whether an event has anything to read, or ends an answer. Where there is neither text nor a delta
    (`generate.py`), the client reads token ids."""
    for choice in choices:
        delta = choice.delta
        if choice.finish_reason is not None or choice.text:
            return True
        if delta is None:
            if choice.text is None and bytes(choice.token_ids) not in (b"", b"null", b"[]"):
                return True
        elif delta.get("content") or has_more(delta):
            return True
    return False


def inner_ids(ids: bytes) -> bytes:
    """The ids of a JSON list without its brackets; empty for null and for anything else."""
    return ids[1:-1] if ids.startswith(b"[") else b""


def count_ordinary(block: bytes) -> int:
    """The number of events in a block if all of them are ordinary token events with one choice; else 0."""
    count = block.count(b"\n\n")
    if (
        count
        and count == block.count(b'"choices":[{') == block.count(NOT_FINISHED)
        and count == block.count(b'"finish_reason"')  # no other choice has ended
        and b"\r" not in block
        and not names_handoff(block)
        and not _ODD.search(block)
    ):
        return count
    return 0


_FRAME = frozenset({"id", "object", "created", "model", "system_fingerprint", "choices", "prompt_token_ids"})
OPENING_FRAME = _FRAME | {"usage"}  # it counts no token that the event before had not counted
_CHOICE_FRAME = frozenset({"index", "delta", "token_ids", "prompt_token_ids"})


def is_frame(payload: bytes, frame: frozenset[str] = _FRAME) -> bool:
    """Whether an event has nothing but the members in `frame`, which every event has, and token ids: no logprobs, no
    usage, nothing that is not known here."""
    try:
        members: dict[str, Any] = decode_json(payload)
    except Undecodable:  # in a member that is not read otherwise
        return False
    if any(value is not None and name not in frame for name, value in members.items()):
        return False
    return all(
        value is None or name in _CHOICE_FRAME for choice in members["choices"] for name, value in choice.items()
    )


def is_preempted(event: Event) -> bool:
    """Whether the engine has dropped the request to free memory (vllm-ascend's recompute scheduler)."""
    choices = event.choices
    return choices is not None and len(choices) == 1 and choices[0].stop_reason == "recomputed"


def is_ordinary(choices: list[Choice]) -> bool:
    """Whether an event is like most of a stream: one choice with text, and nothing else."""
    if len(choices) != 1 or choices[0].finish_reason is not None:
        return False
    return choices[0].delta is None or list(choices[0].delta) == ["content"]
