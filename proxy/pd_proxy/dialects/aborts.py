"""Recognises answers that an engine has aborted: they have status 200, and a `finish_reason` that no API defines.

vLLM sends `abort` for every request that runs when it is stopped, paused, put to sleep or scaled. SGLang does the same
(in some places as an object), and TensorRT-LLM sends `cancelled`. For an internal failure they send `error`.
Anthropic's messages have no such reason: vLLM leaves their `stop_reason` empty.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import msgspec

from pd_proxy.decoding import Undecodable, json_decoder
from pd_proxy.dialects.engine_errors import engine_error_event
from pd_proxy.encoding import encode_json
from pd_proxy.errors import BackendAborted, BackendError

ORDINARY = ("stop", "length")
"""The reasons with which nearly all answers end."""
_WORDS = frozenset({"abort", "aborted", "cancelled", "canceled", "error"})


class Ending(Protocol):
    """A choice that may have ended."""

    finish_reason: Any


class _Choice(msgspec.Struct):
    finish_reason: Any = None


_decode_choices = json_decoder(list[_Choice])


def is_abort(reason: object) -> bool:
    """Whether a `finish_reason` means that the engine aborted the request. SGLang's may be an object with a `type`."""
    if isinstance(reason, dict):
        reason = reason.get("type")
    return isinstance(reason, str) and reason.lower() in _WORDS


def abort_of(choices: Iterable[Ending]) -> object:
    """The `finish_reason` of the first choice that was aborted, or None."""
    for choice in choices:
        if choice.finish_reason is not None and is_abort(choice.finish_reason):
            return choice.finish_reason
    return None


_BACKSLASH = ord("\\")


def ends_well(answer: bytes) -> bool:
    """Whether a whole answer has surely ended at its limit of tokens, as the answer to a prefill leg does. If not, it
    must be parsed.

    Within a string a quote has a backslash before it. So the first condition finds a member, and the other two ensure
    that there is no second one.
    """
    return (
        answer.find(b'"finish_reason":"length"') >= 0
        and answer.count(b"finish_reason") == 1
        and (_BACKSLASH not in answer or answer.find(b"\\u00") < 0)  # a letter of the name as an escape
    )


def abort_in(choices: msgspec.Raw) -> object:
    """The `finish_reason` of the first choice of a whole answer that was aborted, or None."""
    if not memoryview(choices):
        return None
    try:
        return abort_of(_decode_choices(choices))
    except Undecodable:
        return None  # what is wrong with them is reported where they are read


def aborted(url: str, reason: object) -> BackendError:
    """The error for such a reason. If the reason has a status, it is the error of that status: SGLang refuses a prompt
    that is too long in this way."""
    if isinstance(reason, dict) and isinstance(status := reason.get("status_code"), int):
        error = {"message": reason.get("message"), "type": reason.get("err_type") or "Abort", "param": None}
        return engine_error_event(url, encode_json({"error": {**error, "code": status}}))
    word = reason.get("type") if isinstance(reason, dict) else reason
    return BackendAborted(f"{url} ended the request before its time ({word or 'without a reason'})")
