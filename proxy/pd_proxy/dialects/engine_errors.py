"""Translates the errors of engines, in all their shapes, into the gateway's.

This is the only place that turns an engine's error into one of `errors/`. vLLM sends `{"error": {...}}`, `{"error":
"text"}`
(401, and 503 while scaling) or, behind another proxy, HTML; SGLang and TensorRT-LLM send the members of the object
without the object around them. Under status 200 an event of a stream may be the same.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any
from urllib.parse import urlsplit

from pd_proxy.decoding import Undecodable, decode_json
from pd_proxy.dialects.strip import names_handoff, strip_handoff
from pd_proxy.encoding import encode_json
from pd_proxy.errors import (
    BackendAnswered,
    BackendBusy,
    BackendFailed,
    BackendLacksModel,
    BackendRejected,
    BackendStopping,
)

# host:port, URLs, bare IP addresses, SGLang's rooms: an engine's 5xx may quote the peer that it could not reach.
# Each alternative looks at a bounded number of characters: a megabyte of nonsense costs no more than its length.
_ADDRESS = re.compile(r"\w://|\b\d{1,3}(?:\.\d{1,3}){3}\b|\[[0-9a-fA-F:]{3,45}\]|[\w-]:\d{2,5}\b|\bbootstrap_")
# vLLM when it is being stopped and lets requests end (`--shutdown-timeout`): its tokenizer's threads take no more work.
_STOPPING = "cannot schedule new futures after"


def engine_error(url: str, status: int, headers: dict[bytes, bytes], body: bytes) -> BackendAnswered:
    """The error that a status other than 200 stands for.

    Returns:
        `BackendRejected` for 4xx (`BackendLacksModel` where the engine has no such model), `BackendBusy` for 429 and
        503, `BackendFailed` for the others.
    """
    return _error(url, status, body, _retry_after(headers))


def engine_error_event(url: str, payload: bytes) -> BackendAnswered:
    """The error that an error event under status 200 stands for; its `code` is the status it would have had."""
    return _error(url, 0, payload, None)


def _error(url: str, status: int, body: bytes, retry_after: int | None) -> BackendAnswered:
    body, parsed = _read_error(body)
    detail = _detail(parsed)
    code = detail.get("code")
    if status == 0:
        status = code if isinstance(code, int) and 400 <= code <= 599 else 500
    if not 400 <= status <= 599:  # a redirect or an odd success: not what was asked for
        return BackendFailed(f"{url} answered {status}", status=502)
    kind = detail.get("type")
    message = detail.get("message", detail.get("text"))
    engine_message = message if isinstance(message, str) else None
    # A refusal may quote the request, and the text of clients is not logged.
    log_line = f"{url} answered {status}" + (f" ({kind}: {engine_message})" if engine_message and status >= 500 else "")
    # An error in OpenAI's shape is passed on as it is, unless an address stands anywhere in it.
    whole, param = "message" in detail and body.startswith(b"{") and len(body) <= _LARGEST, None
    text = body.decode("utf-8", "replace")
    if status >= 500 and _ADDRESS.search(text):
        engine_message, whole = None, False
    elif status < 500:
        if engine_message is None and not whole:
            engine_message, param = _reason(parsed, text), _field(parsed)
        addresses = _addresses_of(url)
        if whole and addresses.search(text):
            whole, param = False, _hidden(addresses, detail.get("param"))
        engine_message = _hidden(addresses, engine_message and engine_message[:_LONGEST])
    answer = body if whole else None
    if answer and detail.get("object") == "error":  # the members without the object around them
        answer = encode_json({"error": {name: detail.get(name) for name in _OPENAI}}) if engine_message else None
    if status in (429, 503):
        # vLLM's front door says "Service Unavailable" when a queue limit is reached, before it reads the request.
        unread = status == 429 or kind in ("Service Unavailable", None)
        return BackendBusy(
            log_line,
            status=status,
            answer=answer,
            engine_message=engine_message,
            retry_after=retry_after or 1,
            unread=unread,
        )
    if status >= 500 and isinstance(message, str) and _STOPPING in message:
        return BackendStopping(log_line, status=503, retry_after=1)
    if status >= 500:
        return BackendFailed(log_line, status=status, answer=answer, engine_message=engine_message)
    lacks = status == 404 and kind == "NotFoundError" and detail.get("param") == "model"
    refusal = BackendLacksModel if lacks else BackendRejected
    error = refusal(log_line, status=status, answer=answer, engine_message=engine_message)
    error.param = param
    error.handled = kind in _HANDLERS and detail.get("param") not in _VALIDATED
    return error


_HANDLERS = ("BadRequestError", "NotFoundError")
# Parameters that vLLM 0.32's request models check: a refusal of theirs has the same type as one of the handler's. (A
# refusal of pydantic's own has the type "Bad Request", and an unknown path has none.)
_VALIDATED = frozenset(
    {
        *("background", "echo", "kv_transfer_params.prompt_token_ids", "logprob_token_ids", "logprobs", "n", "prompt"),
        *("prompt_embeds", "prompt_logprobs", "response_format", "stream_options", "structured_outputs"),
        *("tool_choice", "tool_choice.function", "tool_choice.function.name", "tools", "top_logprobs"),
        "use_beam_search",
    }
)


_OPENAI = ("message", "type", "param", "code")


def _read_error(body: bytes) -> tuple[bytes, Any]:
    """An error's bytes as a client may have them, and their value; None where they are not JSON.

    An engine that cuts a text in the middle of a character sends JSON with a wrong byte; the rest of it is still read.
    """
    try:
        body = strip_handoff(body.strip())
        parsed = decode_json(body)
    except Undecodable:
        try:
            body = strip_handoff(body.decode("utf-8", "replace").encode())
            return body, decode_json(body)
        except Undecodable:
            return (b"" if names_handoff(body) else body), None
    # Without escapes, for the search of addresses.
    return (encode_json(parsed) if b"\\" in body else body), parsed


def _detail(parsed: Any) -> dict[str, Any]:
    """The `error` object of an answer, or the answer if it is such an object; `{"text": ...}` for a bare string; `{}`
    for anything else."""
    if isinstance(parsed, dict) and parsed.get("object") == "error":
        return parsed
    error = parsed.get("error") if isinstance(parsed, dict) else None
    if isinstance(error, dict):
        return error
    # Not under "message": such a body does not have OpenAI's shape and is written again.
    return {"text": error} if isinstance(error, str) else {}


# Refusals by others than vLLM's API servers: FastAPI (`detail`, a text or a list of texts with the place of each),
# other frameworks, the text of a web server.

_LONGEST = 2000  # characters of a reason
_LARGEST = 64 * 1024  # bytes of an error that is passed on as it is
_MOST_REASONS = 5
_REASONS = ("message", "msg", "detail", "error", "errors", "reason", "error_message")


def _reason(parsed: Any, text: str) -> str | None:
    """The reason of a refusal in a shape that is not OpenAI's; None where none is found."""
    if parsed is None:
        text = " ".join(text[: 2 * _LONGEST].split())
        page = text.startswith(("<", "{", "[")) or text == "null"  # or broken JSON
        reason = "" if page or not text.isprintable() or text.count("\ufffd") > len(text) // 4 else text
    else:
        reason = _words(parsed, 4)
    return reason[:_LONGEST] or None


def _words(value: Any, depth: int) -> str:
    if isinstance(value, str):
        return " ".join(value[: 2 * _LONGEST].split())
    if depth and isinstance(value, list):
        return "; ".join(filter(None, (_words(item, depth - 1) for item in value[:_MOST_REASONS])))
    if depth and isinstance(value, dict):
        words = next(filter(None, (_words(value.get(name), depth - 1) for name in _REASONS)), "")
        place = _path(value.get("loc"))
        return f"{place}: {words}" if place and words else words
    return ""


def _field(parsed: Any) -> str | None:
    """The field of the request that the first of FastAPI's errors is about."""
    detail = parsed.get("detail") if isinstance(parsed, dict) else parsed
    first = detail[0] if isinstance(detail, list) and detail else None
    return (_path(first.get("loc")) or None) if isinstance(first, dict) else None


def _path(loc: Any) -> str:
    """FastAPI's `loc`, a place in a request, without `body`."""
    parts = loc if isinstance(loc, list) else []
    return ".".join(str(part)[:100] for part in parts[:10] if isinstance(part, str | int) and part != "body")


# A refusal may quote the request, in which a URL is the client's own, so not every address is an engine's. These are
# taken for engines': IP addresses, hosts without a domain, schemes other than HTTP, `host.domain:port` and SGLang's
# rooms.
_ADDRESSES = (
    r"\bhttps?://(?:[\w-]{1,63}|[\w.-]{1,200}\.(?:svc|local|internal|lan|corp))(?![\w.-])(?::\d{1,5})?|"
    r"\b(?!https?:)[a-z][a-z0-9+]{1,10}://[^\s\"'<>]{1,300}|\b\d{1,3}(?:\.\d{1,3}){3}\b(?::\d{1,5})?"
    r"|\[[0-9a-fA-F:]{3,45}\](?::\d{1,5})?|(?<![\w./-])(?=[\w-]{0,63}[.-])[\w][\w.-]{1,253}:\d{2,5}\b|\bbootstrap_\w{1,20}"
)
_HIDDEN = "[address]"


@cache
def _addresses_of(url: str) -> re.Pattern[str]:
    """Finds the addresses of engines in a refusal by the engine at a URL."""
    parts = urlsplit(url)
    own = sorted(map(re.escape, filter(None, {parts.netloc, parts.hostname})), key=len, reverse=True)
    return re.compile("|".join([*(rf"(?<![\w.-]){name}(?![\w-])" for name in own), _ADDRESSES]))


def _hidden(addresses: re.Pattern[str], text: Any) -> str | None:
    return addresses.sub(_HIDDEN, text) if isinstance(text, str) else None


def _retry_after(headers: dict[bytes, bytes]) -> int | None:
    value = headers.get(b"retry-after", b"")
    if not value.isdigit():
        return None
    return min(int(value), 3600) if len(value) < 10 else 3600
