"""The dialects that there are (`dialect.py`).

Anthropic's messages and OpenAI's responses name their events (`type`), and end with one of these instead of `[DONE]`.
SGLang's own are in `sglang_events.py`.
"""

from __future__ import annotations

from typing import Any

import msgspec

from pd_proxy.decoding import Undecodable, json_decoder
from pd_proxy.dialects.aborts import is_abort
from pd_proxy.dialects.answers import WholeAnswer
from pd_proxy.dialects.dialect import Dialect, NamedEvent
from pd_proxy.dialects.sglang import SGLANG_EVENTS

_NULL = msgspec.Raw(b"null")
_EMPTY = 2  # characters of a string with nothing in it


class _Stop(msgspec.Struct):
    stop_reason: Any = msgspec.UNSET


class _Delta(msgspec.Struct):
    """What an event of a message adds; text, thinking or a piece of a tool's input."""

    text: str = ""
    thinking: str = ""
    partial_json: str = ""
    signature: str = ""
    citation: Any = None


class _Details(msgspec.Struct):
    reason: Any = None


class _Response(msgspec.Struct):
    status: Any = None
    incomplete_details: _Details | None = None


_decode_stop = json_decoder(_Stop)
_decode_delta = json_decoder(_Delta)
_decode_response = json_decoder(_Response)
_decode_details = json_decoder(_Details | None)
_decode_any = json_decoder(Any)


class MessageEvents(Dialect, frozen=True):
    """Anthropic's messages. They have no word for an answer that was given up: vLLM's `stop_reason` is null then, which
    that of an answer never is."""

    def aborted(self, event: NamedEvent) -> object:
        try:
            reason = _decode_stop(event.delta).stop_reason
        except Undecodable:
            return None
        if reason is None:
            return "no stop_reason"
        return reason if is_abort(reason) else None

    def aborted_whole(self, answer: WholeAnswer) -> object:
        try:
            reason = _decode_any(answer.stop_reason or _NULL)
        except Undecodable:
            return None
        if reason is None:
            return "no stop_reason"
        return reason if is_abort(reason) else None

    def empty(self, event: NamedEvent) -> bool:
        if not memoryview(event.delta):
            return False
        try:
            delta = _decode_delta(event.delta)
        except Undecodable:
            return False
        return event.type.endswith(self.tokens) and not any(getattr(delta, name) for name in delta.__struct_fields__)


class ResponseEvents(Dialect, frozen=True):
    """OpenAI's responses. One that was given up is `cancelled`."""

    def aborted(self, event: NamedEvent) -> object:
        try:
            response = _decode_response(event.response)
        except Undecodable:
            return None
        return _abort(response)

    def aborted_whole(self, answer: WholeAnswer) -> object:
        try:
            status = _decode_any(answer.status or _NULL)
            details = _decode_details(answer.incomplete_details or _NULL)
        except Undecodable:
            return None
        return _abort(_Response(status, details))

    def empty(self, event: NamedEvent) -> bool:
        return event.type.endswith(self.tokens) and len(memoryview(event.delta)) == _EMPTY


def _abort(response: _Response) -> object:
    if is_abort(response.status):
        return response.status
    details = response.incomplete_details
    return details.reason if details is not None and is_abort(details.reason) else None


DIALECTS: dict[str, Dialect] = {
    "messages": MessageEvents(
        opening=frozenset({"message_start", "ping", "content_block_start", "content_block_stop"}),
        tokens="block_delta",
        last=frozenset({"message_stop"}),
        failed=frozenset({"error"}),
        inside=("message",),
        preempted=b'"stop_sequence":"recomputed"',
        ends=frozenset({"message_delta"}),
    ),
    "responses": ResponseEvents(
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
    ),
    "sglang_generate": SGLANG_EVENTS,
}
"""By endpoint. Those that are not here speak as chat does."""
