"""Reading what engines answer: usage, and errors in the several shapes they come in.

The one place that turns an engine's words into `errors.py`. vLLM says `{"error": {...}}`, `{"error": "text"}` (401, and
503 while scaling), or, behind another proxy, HTML; SGLang and TensorRT-LLM say the members of the object without the
object around them. Under status 200 a stream may carry the same as an event.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Annotated, Any
from urllib.parse import urlsplit

import msgspec

from pd_proxy.decoding import UNDECODABLE, Undecodable, WrongShape, bare_json_decoder, decode_json, json_decoder
from pd_proxy.errors import (
    BackendAnswered,
    BackendBusy,
    BackendFailed,
    BackendLacksModel,
    BackendRejected,
    BackendStopping,
)

HANDOFF_FIELDS = frozenset({"kv_transfer_params", "ec_transfer_params", "disaggregated_params"})
"""Members of an answer that carry the engines' addresses and block ids, and so stay inside. TensorRT-LLM has the last
of them in its choices."""

_ANSWERS = frozenset({"choices", "message", "response", "error"})
"""Members that hold an answer, or a part of one, where its own stand."""

HANDOFF_MARK = b'_params"'
"""How their names end in JSON. Within a string a quote has a backslash before it, so this is the end of a name, or of a
text that ends so."""
# A letter of such a name as an escape. Encoders write none for letters, so that what has one is looked at closely.
_SPELLED = re.compile(rb"\\u00(?:5[fF]|6[1-9a-fA-F]|7[0-9aA])")
# host:port, URLs, bare IP addresses, SGLang's rooms: an engine's 5xx may quote the peer that it could not reach.
# Each alternative looks at a bounded number of characters: a megabyte of nonsense costs no more than its length.
_ADDRESS = re.compile(r"\w://|\b\d{1,3}(?:\.\d{1,3}){3}\b|\[[0-9a-fA-F:]{3,45}\]|[\w-]:\d{2,5}\b|\bbootstrap_")
# vLLM, told to stop while it lets requests end (`--shutdown-timeout`): its tokenizer's threads take no more.
_STOPPING = "cannot schedule new futures after"

_decode_members = json_decoder(dict[str, msgspec.Raw])
_decode_objects = json_decoder(list[dict[str, msgspec.Raw]])
_decode_list = json_decoder(list[msgspec.Raw])
_encode = msgspec.json.Encoder().encode

_MOST = 2**53 - 1  # what a float counts exactly, and JavaScript's clients too
_Count = Annotated[int, msgspec.Meta(ge=0, le=_MOST)]


class CachedDetails(msgspec.Struct):
    cached_tokens: _Count | None = None
    created_cache_tokens: _Count | None = None
    cache_write_tokens: _Count | None = None


class Usage(msgspec.Struct):
    """The `usage` object of an answer, as far as the gateway reads it. Anthropic's messages and OpenAI's responses say
    `input_tokens` and `output_tokens`; the former without those that came from a cache."""

    prompt_tokens: _Count | None = None
    completion_tokens: _Count | None = None
    prompt_tokens_details: CachedDetails | None = None
    input_tokens: _Count | None = None
    output_tokens: _Count | None = None
    input_tokens_details: CachedDetails | None = None
    cache_read_input_tokens: _Count | None = None
    cache_creation_input_tokens: _Count | None = None

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
_decode_count = json_decoder(_Count)


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


class _Choice(msgspec.Struct):
    message: msgspec.Raw = msgspec.Raw()
    text: msgspec.Raw = msgspec.Raw()
    token_ids: msgspec.Raw = msgspec.Raw()


_decode_choices = json_decoder(list[_Choice])


def reason_of(answer: WholeAnswer, member: str) -> str:
    """Why an answer in one piece is none, or an empty string. A stream without a token is none either.

    Arguments:
        member: the one that holds what was generated.
    """
    said = getattr(answer, member, None)
    if said is None:
        return ""  # its dialect has looked
    if bytes(memoryview(said)[:1]) != b"[":
        return f"it has no list of {member}"
    if member != "choices":
        return ""  # what a model may leave empty
    try:
        choices = _decode_choices(said)
    except Undecodable as error:
        return f"its choices are none: {error}"
    if not choices:
        return "it has no choices"
    for choice in choices:
        starts = [bytes(memoryview(raw)[:1]) for raw in (choice.message, choice.text, choice.token_ids)]
        if starts[0] != b"{" and starts[1] != b'"' and starts[2] != b"[":
            return "a choice has neither a message nor text nor token ids"
    return ""


def read_usage(raw: msgspec.Raw | bytes) -> Usage | None:
    """The usage object in chat's words, or None where there is none or it is not one we understand. Of one number that
    cannot be a count of tokens (0 to 2^53, whole) nothing is believed: counters would fall, or overflow."""
    try:
        usage = _decode_usage(raw)
    except UNDECODABLE:
        return None
    if usage.prompt_tokens is None and usage.input_tokens is not None:
        read = usage.cache_read_input_tokens
        usage.prompt_tokens = usage.input_tokens + (read or 0) + (usage.cache_creation_input_tokens or 0)
        usage.completion_tokens = usage.output_tokens
        usage.prompt_tokens_details = usage.input_tokens_details if read is None else CachedDetails(read)
        if usage.prompt_tokens > _MOST:
            return None
    details, prompt = usage.prompt_tokens_details, usage.prompt_tokens
    if details is not None and prompt is not None and (details.cached_tokens or 0) > prompt:
        details.cached_tokens = prompt  # no more can be cached than the prompt has
    return usage


def count_usage(prompt: object, completion: object, cached: object) -> Usage | None:
    """The usage of these counts, on the same terms."""
    return read_usage(
        _encode(
            {
                "prompt_tokens": prompt,
                "completion_tokens": completion,
                "prompt_tokens_details": {"cached_tokens": cached},
            }
        )
    )


def names_handoff(data: bytes) -> bool:
    """Whether JSON, or events of it, may have a member of the hand-off, however its name is spelled."""
    # `find`: `in` tries to take the needle for a number first, and the exception that this raises costs more.
    return data.find(HANDOFF_MARK) >= 0 or (data.find(b"\\u00") >= 0 and _SPELLED.search(data) is not None)


def strip_handoff(body: bytes) -> bytes:
    """JSON without the hand-off's members; bytes that name none as they are. Elsewhere in an answer those names are a
    client's own words, as in the schema of a tool.

    Raises:
        Undecodable: there may be some, and it is no JSON. It must not be given to a client.
    """
    if not names_handoff(body):
        return body
    try:
        return _encode(_stripped(_decode_members(body)))
    except WrongShape:  # a list of answers, or no answer at all
        try:
            return _encode([_stripped(members) for members in _decode_objects(body)])
        except WrongShape:
            return body


def _stripped(members: dict[str, msgspec.Raw], depth: int = 3) -> dict[str, msgspec.Raw]:
    for field in HANDOFF_FIELDS & members.keys():
        del members[field]
    for name in _ANSWERS & members.keys():
        raw = bytes(members[name])
        if not depth or not names_handoff(raw):
            continue
        if raw.startswith(b"{"):
            members[name] = msgspec.Raw(_encode(_stripped(_decode_members(raw), depth - 1)))
        elif raw.startswith(b"["):
            shown = [
                _stripped(_decode_members(item), depth - 1) if bytes(memoryview(item)[:1]) == b"{" else item
                for item in _decode_list(raw)
            ]
            members[name] = msgspec.Raw(_encode(shown))
    return members


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
        answer = _encode({"error": {name: detail.get(name) for name in _OPENAI}}) if said else None
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
    return (_encode(parsed) if b"\\" in body else body), parsed


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
