"""Anthropic's messages.

They have no reason for an answer that the engine aborted. vLLM's `stop_reason` is then null, which it never is in a
whole answer.
"""

from __future__ import annotations

from typing import Any

import msgspec

from pd_proxy.decoding import Undecodable, decode_json, json_decoder
from pd_proxy.dialects.aborts import is_abort
from pd_proxy.dialects.named import NamedEvent, NamedEvents
from pd_proxy.dialects.whole import WholeAnswer
from pd_proxy.encoding import NULL


class _Stop(msgspec.Struct):
    stop_reason: Any = msgspec.UNSET


class _Delta(msgspec.Struct):
    """What an event adds to a message: text, thinking or a piece of a tool's input."""

    text: str = ""
    thinking: str = ""
    partial_json: str = ""
    signature: str = ""
    citation: Any = None


_decode_stop = json_decoder(_Stop)
_decode_delta = json_decoder(_Delta)


class MessageEvents(NamedEvents, frozen=True):
    """Anthropic's messages."""

    def abort_reason_in(self, event: NamedEvent) -> object:
        try:
            return _abort_reason(_decode_stop(event.delta).stop_reason)
        except Undecodable:
            return None

    def abort_reason_of(self, answer: WholeAnswer) -> object:
        try:
            return _abort_reason(decode_json(answer.stop_reason or NULL))
        except Undecodable:
            return None

    def is_empty(self, event: NamedEvent) -> bool:
        if not memoryview(event.delta):
            return False
        try:
            delta = _decode_delta(event.delta)
        except Undecodable:
            return False
        return event.type.endswith(self.tokens) and not any(getattr(delta, name) for name in delta.__struct_fields__)


def _abort_reason(stop_reason: object) -> object:
    if stop_reason is None:
        return "no stop_reason"
    return stop_reason if is_abort(stop_reason) else None


MESSAGES = MessageEvents(
    generated="content",
    opening=frozenset({"message_start", "ping", "content_block_start", "content_block_stop"}),
    tokens="block_delta",
    last=frozenset({"message_stop"}),
    failed=frozenset({"error"}),
    inside=("message",),
    preempted=b'"stop_sequence":"recomputed"',
    ends=frozenset({"message_delta"}),
)
