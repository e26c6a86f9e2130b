"""Reading what engines answer: usage, and errors in the several shapes they come in.

The one place that turns an engine's words into `errors.py`. vLLM says `{"error": {...}}`, `{"error": "text"}` (401, and
503 while scaling), or, behind another proxy, HTML; SGLang and TensorRT-LLM say the members of the object without the
object around them. Under status 200 a stream may carry the same as an event.
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
# vLLM, told to stop while it lets requests end (`--shutdown-timeout`): its tokenizer's threads take no more.
_STOPPING = "cannot schedule new futures after"


def engine_error(url: str, status: int, headers: dict[bytes, bytes], body: bytes) -> BackendAnswered:
    """The error that a status other than 200 stands for.

    Returns one of `BackendRejected` (4xx; where it says that it has no such model, `BackendLacksModel`), `BackendBusy`
    (429 and 503), `BackendFailed` (the rest).
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
    said = message if isinstance(message, str) else None
    # A refusal may quote the request, and what clients write is not logged.
    log_line = f"{url} answered {status}" + (f" ({kind}: {said})" if said and status >= 500 else "")
    # What has OpenAI's shape is given on as it is, unless it names an address anywhere in it.
    whole, param = "message" in detail and body.startswith(b"{") and len(body) <= _LARGEST, None
    text = body.decode("utf-8", "replace")
    if status >= 500 and _ADDRESS.search(text):
        said, whole = None, False
    elif status < 500:
        if said is None and not whole:
            said, param = _reason(parsed, text), _place(parsed)
        place = _place_of(url)
        if whole and place.search(text):
            whole, param = False, _hidden(place, detail.get("param"))
        said = _hidden(place, said and said[:_LONGEST])
    answer = body if whole else None
    if answer and detail.get("object") == "error":  # the members without the object around them
        answer = encode_json({"error": {name: detail.get(name) for name in _OPENAI}}) if said else None
    if status in (429, 503):
        # vLLM's front door says "Service Unavailable" when a queue limit is reached, before it reads the request.
        unread = status == 429 or kind in ("Service Unavailable", None)
        return BackendBusy(
            log_line, status=status, answer=answer, engine_message=said, retry_after=retry_after or 1, unread=unread
        )
    if status >= 500 and isinstance(message, str) and _STOPPING in message:
        return BackendStopping(log_line, status=503, retry_after=1)
    if status >= 500:
        return BackendFailed(log_line, status=status, answer=answer, engine_message=said)
    lacks = status == 404 and kind == "NotFoundError" and detail.get("param") == "model"
    refusal = BackendLacksModel if lacks else BackendRejected
    error = refusal(log_line, status=status, answer=answer, engine_message=said)
    error.param = param
    error.handled = kind in _HANDLERS and detail.get("param") not in _VALIDATED
    return error


_HANDLERS = ("BadRequestError", "NotFoundError")
# What vLLM 0.32's request models check: such a refusal has the type of the handler's. (That of pydantic's own is
# "Bad Request", and a path that is not there has no type.)
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
    """An answer's bytes as a client may have them, and what they say; None where they are not JSON.

    An engine that cuts a text in the middle of a character sends JSON that is none for a byte; all else of it counts.
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
    # As it may be spelled out for the search of addresses.
    return (encode_json(parsed) if b"\\" in body else body), parsed


def _detail(parsed: Any) -> dict[str, Any]:
    """The `error` object of an answer, or an answer that is one; a bare string becomes its message; `{}` for anything
    else."""
    if isinstance(parsed, dict) and parsed.get("object") == "error":
        return parsed
    error = parsed.get("error") if isinstance(parsed, dict) else None
    if isinstance(error, dict):
        return error
    # Not under "message": such a body has not OpenAI's shape and is given anew.
    return {"text": error} if isinstance(error, str) else {}


# What others than vLLM's API servers say of a refusal: FastAPI (`detail`, a text or a list with a place each), other
# frameworks, a web server's text.

_LONGEST = 2000  # characters of a reason
_LARGEST = 64 * 1024  # bytes of an answer that is given on as it is
_MOST_REASONS = 5
_REASONS = ("message", "msg", "detail", "error", "errors", "reason", "error_message")


def _reason(parsed: Any, text: str) -> str | None:
    """Why an engine refused a request, as far as it says so in a shape that is not OpenAI's."""
    if parsed is None:
        text = " ".join(text[: 2 * _LONGEST].split())
        page = text.startswith(("<", "{", "[")) or text == "null"  # or broken JSON
        said = "" if page or not text.isprintable() or text.count("\ufffd") > len(text) // 4 else text
    else:
        said = _words(parsed, 4)
    return said[:_LONGEST] or None


def _words(said: Any, depth: int) -> str:
    if isinstance(said, str):
        return " ".join(said[: 2 * _LONGEST].split())
    if depth and isinstance(said, list):
        return "; ".join(filter(None, (_words(item, depth - 1) for item in said[:_MOST_REASONS])))
    if depth and isinstance(said, dict):
        words = next(filter(None, (_words(said.get(name), depth - 1) for name in _REASONS)), "")
        place = _path(said.get("loc"))
        return f"{place}: {words}" if place and words else words
    return ""


def _place(parsed: Any) -> str | None:
    """The request's field that FastAPI's first complaint is about."""
    detail = parsed.get("detail") if isinstance(parsed, dict) else parsed
    first = detail[0] if isinstance(detail, list) and detail else None
    return (_path(first.get("loc")) or None) if isinstance(first, dict) else None


def _path(loc: Any) -> str:
    """A place in a request as FastAPI has it, without `body`."""
    parts = loc if isinstance(loc, list) else []
    return ".".join(str(part)[:100] for part in parts[:10] if isinstance(part, str | int) and part != "body")


# A refusal may quote the request, in which a URL is the client's own; so not every address is the engines'. Taken for
# theirs are IP addresses, hosts without a domain, schemes other than HTTP, `host.domain:port` and SGLang's rooms.
_PLACE = (
    r"\bhttps?://(?:[\w-]{1,63}|[\w.-]{1,200}\.(?:svc|local|internal|lan|corp))(?![\w.-])(?::\d{1,5})?|"
    r"\b(?!https?:)[a-z][a-z0-9+]{1,10}://[^\s\"'<>]{1,300}|\b\d{1,3}(?:\.\d{1,3}){3}\b(?::\d{1,5})?"
    r"|\[[0-9a-fA-F:]{3,45}\](?::\d{1,5})?|(?<![\w./-])(?=[\w-]{0,63}[.-])[\w][\w.-]{1,253}:\d{2,5}\b|\bbootstrap_\w{1,20}"
)
_HIDDEN = "[address]"


@cache
def _place_of(url: str) -> re.Pattern[str]:
    """What names the engines' addresses in a refusal by the engine at a URL."""
    parts = urlsplit(url)
    own = sorted(map(re.escape, filter(None, {parts.netloc, parts.hostname})), key=len, reverse=True)
    return re.compile("|".join([*(rf"(?<![\w.-]){name}(?![\w-])" for name in own), _PLACE]))


def _hidden(place: re.Pattern[str], said: Any) -> str | None:
    return place.sub(_HIDDEN, said) if isinstance(said, str) else None


def _retry_after(headers: dict[bytes, bytes]) -> int | None:
    value = headers.get(b"retry-after", b"")
    if not value.isdigit():
        return None
    return min(int(value), 3600) if len(value) < 10 else 3600
