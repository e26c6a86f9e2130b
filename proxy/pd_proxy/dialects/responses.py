"""OpenAI's responses. One that the engine aborted has the status `cancelled`."""

from __future__ import annotations

from typing import Any

import msgspec

from pd_proxy.decoding import Undecodable, decode_json, json_decoder
from pd_proxy.dialects.aborts import is_abort
from pd_proxy.dialects.named import NamedEvent, NamedEvents
from pd_proxy.dialects.whole import WholeAnswer
from pd_proxy.encoding import NULL

_EMPTY = 2  # characters of an empty string in JSON


class _Details(msgspec.Struct):
    reason: Any = None


class _Response(msgspec.Struct):
    status: Any = None
    incomplete_details: _Details | None = None


_decode_response = json_decoder(_Response)
_decode_details = json_decoder(_Details | None)


class ResponseEvents(NamedEvents, frozen=True):
    """OpenAI's responses."""

    def abort_reason_in(self, event: NamedEvent) -> object:
        try:
            return _abort_reason(_decode_response(event.response))
        except Undecodable:
            return None

    def abort_reason_of(self, answer: WholeAnswer) -> object:
        try:
            status = decode_json(answer.status or NULL)
            details = _decode_details(answer.incomplete_details or NULL)
        except Undecodable:
            return None
        return _abort_reason(_Response(status, details))

    def is_empty(self, event: NamedEvent) -> bool:
        return event.type.endswith(self.tokens) and len(memoryview(event.delta)) == _EMPTY


def _abort_reason(response: _Response) -> object:
    if is_abort(response.status):
        return response.status
    details = response.incomplete_details
    return details.reason if details is not None and is_abort(details.reason) else None


RESPONSES = ResponseEvents(
    generated="output",
    opening=frozenset(
        {
            *("response.created", "response.queued", "response.in_progress"),
            *("response.output_item.added", "response.output_item.done"),
            *("response.content_part.added", "response.content_part.done", "response.output_text.done"),
            *("response.reasoning_part.added", "response.reasoning_part.done", "response.reasoning_text.done"),
            *("response.reasoning_summary_part.added", "response.reasoning_summary_part.done"),
            "response.function_call_arguments.done",
        }
    ),
    tokens=".delta",
    last=frozenset({"response.completed", "response.incomplete"}),
    failed=frozenset({"response.failed", "error"}),
    inside=("response",),
    ends=frozenset({"response.completed", "response.incomplete", "response.cancelled"}),
)
