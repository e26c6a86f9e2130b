"""Events with choices: what is read of them, and what they carry."""

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
    """Whether one of these choices is beyond the opening role chunk."""
    for choice in choices:
        delta = choice.delta
        if delta is None or "role" not in delta or choice.finish_reason is not None:
            return True
        if delta.get("content") or has_more(delta):
            return True
    return False


_OPENING = frozenset({"role", "content"})


def has_more(delta: dict[str, Any]) -> bool:
    """Whether a delta gives the client anything beside a role and content."""
    return not delta.keys() <= _OPENING and any(value for name, value in delta.items() if name not in _OPENING)


def has_content(choices: list[Choice]) -> bool:
    """Whether an event gives the client anything to read, or says that an answer has ended. Where there is neither text
    nor a delta (`generate.py`), token ids are what is read."""
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
    """The ids of a JSON list without its brackets; nothing for null and for what is no list."""
    return ids[1:-1] if ids.startswith(b"[") else b""


def count_ordinary(block: bytes) -> int:
    """How many events a block has, if every one is an ordinary token event of one choice; else 0."""
    count = block.count(b"\n\n")
    if (
        count
        and count == block.count(b'"choices":[{') == block.count(NOT_FINISHED)
        and count == block.count(b'"finish_reason"')  # no choice beside it has ended
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
    """Whether an event carries nothing beside what every event has, `frame`, and token ids: no logprobs, no usage,
    nothing that is not known here."""
    try:
        members: dict[str, Any] = decode_json(payload)
    except Undecodable:  # in what the relay does not read
        return False
    if any(value is not None and name not in frame for name, value in members.items()):
        return False
    return all(
        value is None or name in _CHOICE_FRAME for choice in members["choices"] for name, value in choice.items()
    )


def is_preempted(event: Event) -> bool:
    """Whether the engine has dropped the request to get at its memory (vllm-ascend's recompute scheduler)."""
    choices = event.choices
    return choices is not None and len(choices) == 1 and choices[0].stop_reason == "recomputed"


def is_ordinary(choices: list[Choice]) -> bool:
    """Whether an event is one of those that follow each other in a stream: one choice, text, nothing else."""
    if len(choices) != 1 or choices[0].finish_reason is not None:
        return False
    return choices[0].delta is None or list(choices[0].delta) == ["content"]
