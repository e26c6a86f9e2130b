"""The form of the gateway's errors in each API: as a whole answer, and as the last event of a stream."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from pd_proxy.errors import GatewayError
from pd_proxy.requests.endpoints import Endpoint

# https://docs.anthropic.com/en/api/errors
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class ErrorShape(msgspec.Struct, frozen=True):
    """The form of errors in one API.

    Attributes:
        body: makes the body of a whole answer.
        event: makes the last event of a stream. Its second argument is the number of the last event that the client was
            sent, where the API numbers events.
    """

    body: Callable[[GatewayError], bytes]
    event: Callable[[GatewayError, int], bytes]


def _anthropic_body(error: GatewayError) -> bytes:
    kind = _ANTHROPIC_TYPES.get(error.status) or ("invalid_request_error" if error.status < 500 else "api_error")
    return msgspec.json.encode({"type": "error", "error": {"type": kind, "message": error.public_message}})


def _anthropic_event(error: GatewayError, sequence: int) -> bytes:
    return b"event: error\ndata: %b\n\n" % _anthropic_body(error)


def _openai_body(error: GatewayError) -> bytes:
    return error.body()  # for an error of an engine, the engine's own body


def _openai_event(error: GatewayError, sequence: int) -> bytes:
    return error.event()


def _responses_event(error: GatewayError, sequence: int) -> bytes:
    """OpenAI's `error` event. Besides the documented members it has `error`, by which OpenAI's client recognises it."""
    detail = {"code": error.code, "message": error.public_message, "param": error.param}
    members = {
        "type": "error",
        **detail,
        "sequence_number": sequence + 1,
        "error": {**detail, "type": error.type},
    }
    return b"event: error\ndata: %b\n\n" % msgspec.json.encode(members)


def _sglang_event(error: GatewayError, sequence: int) -> bytes:
    """OpenAI's event, which has all members of SGLang's own. `[DONE]` follows, since SGLang's clients read up to it."""
    return error.event() + b"data: [DONE]\n\n"


OPENAI = ErrorShape(_openai_body, _openai_event)
SGLANG = ErrorShape(_openai_body, _sglang_event)
RESPONSES = ErrorShape(_openai_body, _responses_event)
ANTHROPIC = ErrorShape(_anthropic_body, _anthropic_event)

ERROR_SHAPES: dict[Endpoint, ErrorShape] = {
    "chat": OPENAI,
    "completions": OPENAI,
    "messages": ANTHROPIC,
    "responses": RESPONSES,
    "generate": OPENAI,
    "sglang_generate": SGLANG,
}
