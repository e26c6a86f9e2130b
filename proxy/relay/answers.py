"""Reading what engines answer: usage, and errors in the several shapes they come in.

The one place that turns an engine's words into `errors.py`. vLLM says `{"error": {...}}`, `{"error": "text"}` (401, and
503 while scaling), or, behind another proxy, HTML; SGLang and TensorRT-LLM say the members of the object without the
object around them. Under status 200 a stream may carry the same as an event.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from proxy.decoding import UNDECODABLE, Undecodable, bare_json_decoder, decode_json, json_decoder
from proxy.errors import (
    BackendAnswered,
    BackendBusy,
    BackendFailed,
    BackendLacksModel,
    BackendRejected,
    BackendStopping,
)

HANDOFF_FIELDS = ("kv_transfer_params", "ec_transfer_params")
"""Members of an answer that carry the engines' addresses and block ids, and so stay inside."""

_HANDOFF_MARK = b'_transfer_params"'
_IN_CHOICES = "disaggregated_params"
"""The same of TensorRT-LLM, which has it in its choices."""
_IN_CHOICES_MARK = b'"disaggregated_params"'
# host:port, URLs, bare IP addresses, SGLang's rooms: an engine's 5xx may quote the peer that it could not reach.
# Each alternative looks at a bounded number of characters: a megabyte of nonsense costs no more than its length.
_ADDRESS = re.compile(r"\w://|\b\d{1,3}(?:\.\d{1,3}){3}\b|\[[0-9a-fA-F:]{3,45}\]|[\w-]:\d{2,5}\b|\bbootstrap_")
# vLLM, told to stop while it lets requests end (`--shutdown-timeout`): its tokenizer's threads take no more.
_STOPPING = "cannot schedule new futures after"

_decode_members = json_decoder(dict[str, msgspec.Raw])
_decode_choices = json_decoder(list[dict[str, msgspec.Raw]])
_encode = msgspec.json.Encoder().encode


class CachedDetails(msgspec.Struct):
    cached_tokens: int | None = None
    created_cache_tokens: int | None = None
    cache_write_tokens: int | None = None


class Usage(msgspec.Struct):
    """The `usage` object of an answer, as far as the gateway reads it. Anthropic's messages and OpenAI's responses say
    `input_tokens` and `output_tokens`; the former without those that came from a cache."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: CachedDetails | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    input_tokens_details: CachedDetails | None = None
    cache_read_input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None

    @property
    def cached_tokens(self) -> int:
        return (self.prompt_tokens_details.cached_tokens or 0) if self.prompt_tokens_details else 0

    @property
    def written_tokens(self) -> int | None:
        """Tokens of the prompt that were computed and written to a cache; None where the engine has not said."""
        details = self.prompt_tokens_details
        if details is None or details.created_cache_tokens is None:
            said = None if details is None else details.cache_write_tokens
            return self.cache_creation_input_tokens if said is None else said
        return details.created_cache_tokens


_decode_usage = bare_json_decoder(Usage)


class WholeAnswer(msgspec.Struct):
    """What is read of an answer that was not streamed."""

    choices: msgspec.Raw = msgspec.Raw()
    content: msgspec.Raw = msgspec.Raw()
    output: msgspec.Raw = msgspec.Raw()
    usage: msgspec.Raw = msgspec.Raw()
    error: msgspec.Raw = msgspec.Raw()
    stop_reason: msgspec.Raw = msgspec.Raw()
    status: msgspec.Raw = msgspec.Raw()
    incomplete_details: msgspec.Raw = msgspec.Raw()


read_whole = json_decoder(WholeAnswer)


def read_usage(raw: msgspec.Raw | bytes) -> Usage | None:
    """The usage object in chat's words, or None where there is none or it is not one we understand."""
    try:
        usage = _decode_usage(raw)
    except UNDECODABLE:
        return None
    if usage.prompt_tokens is None and usage.input_tokens is not None:
        read = usage.cache_read_input_tokens
        usage.prompt_tokens = usage.input_tokens + (read or 0) + (usage.cache_creation_input_tokens or 0)
        usage.completion_tokens = usage.output_tokens
        usage.prompt_tokens_details = usage.input_tokens_details if read is None else CachedDetails(read)
    return usage


def strip_handoff(body: bytes) -> bytes:
    """A JSON object without the hand-off's members; other bytes as they are."""
    in_choices = _IN_CHOICES_MARK in body
    if _HANDOFF_MARK not in body and not in_choices:
        return body
    try:
        members = _decode_members(body)
        choices = _decode_choices(members["choices"]) if in_choices and "choices" in members else []
    except Undecodable:
        return body
    for field in HANDOFF_FIELDS:
        members.pop(field, None)
    for choice in choices:
        choice.pop(_IN_CHOICES, None)
    if choices:
        members["choices"] = msgspec.Raw(_encode(choices))
    return _encode(members)


def engine_error(url: str, status: int, headers: dict[bytes, bytes], body: bytes) -> BackendAnswered:
    """The error that a status other than 200 stands for.

    Returns one of `BackendRejected` (4xx; where it says that it has no such model, `BackendLacksModel`), `BackendBusy`
    (429 and 503), `BackendFailed` (the rest).
    """
    return _error(url, status, strip_handoff(body), _retry_after(headers))


def engine_error_event(url: str, payload: bytes) -> BackendAnswered:
    """The error that an error event under status 200 stands for; its `code` is the status it would have had."""
    return _error(url, 0, strip_handoff(payload), None)


def _error(url: str, status: int, body: bytes, retry_after: int | None) -> BackendAnswered:
    detail = _detail(body)
    message = detail.get("message", detail.get("text"))
    kind = detail.get("type")
    code = detail.get("code")
    if status == 0:
        status = code if isinstance(code, int) and 400 <= code <= 599 else 500
    said = message if isinstance(message, str) else None
    # A refusal may quote the request, and what clients write is not logged.
    log_line = f"{url} answered {status}" + (f" ({kind}: {said})" if said and status >= 500 else "")
    if status < 400:  # a redirect or an odd success: not what was asked for
        return BackendFailed(log_line, status=502)
    # What has OpenAI's shape is given on as it is, unless an engine's failure names an address anywhere in it.
    whole = "message" in detail and body.lstrip().startswith(b"{")
    if status >= 500 and _ADDRESS.search(body.decode("utf-8", "replace")):
        said, whole = None, False
    answer = body if whole else None
    if answer and detail.get("object") == "error":  # the members without the object around them
        answer = msgspec.json.encode({"error": {name: detail.get(name) for name in _OPENAI}}) if said else None
    if status in (429, 503):
        # vLLM's front door says "Service Unavailable" when a queue limit is reached, before it reads the request.
        unread = status == 429 or kind in ("Service Unavailable", None)
        return BackendBusy(
            log_line, status=status, answer=answer, engine_message=said, retry_after=retry_after or 1, unread=unread
        )
    if status == 404 and kind == "NotFoundError" and detail.get("param") == "model":
        return BackendLacksModel(log_line, status=status, answer=answer, engine_message=said)
    if status < 500:
        return BackendRejected(log_line, status=status, answer=answer, engine_message=said)
    if isinstance(message, str) and _STOPPING in message:
        return BackendStopping(log_line, status=503, retry_after=1)
    return BackendFailed(log_line, status=status, answer=answer, engine_message=said)


_OPENAI = ("message", "type", "param", "code")


def _detail(body: bytes) -> dict[str, Any]:
    """The `error` object of an answer, or an answer that is one; a bare string becomes its message; `{}` for anything
    else."""
    try:
        parsed = decode_json(body)
    except Undecodable:
        return {}
    if isinstance(parsed, dict) and parsed.get("object") == "error":
        return parsed
    error = parsed.get("error") if isinstance(parsed, dict) else None
    if isinstance(error, dict):
        return error
    # Not under "message": such a body has not OpenAI's shape and is given anew.
    return {"text": error} if isinstance(error, str) else {}


def _retry_after(headers: dict[bytes, bytes]) -> int | None:
    value = headers.get(b"retry-after", b"")
    return min(int(value), 3600) if value.isdigit() else None
