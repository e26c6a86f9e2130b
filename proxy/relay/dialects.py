"""The dialects that there are (`dialect.py`).

Anthropic's messages and OpenAI's responses name their events (`type`), and end with one of these instead of `[DONE]`.
SGLang's own are in `sglang_events.py`.
"""

from __future__ import annotations

from proxy.relay.dialect import Dialect
from proxy.relay.sglang_events import SGLANG_EVENTS

DIALECTS: dict[str, Dialect] = {
    "messages": Dialect(
        opening=frozenset({"message_start", "ping", "content_block_start"}),
        tokens="block_delta",
        last=frozenset({"message_stop"}),
        failed=frozenset({"error"}),
        inside=("message",),
        preempted=b'"stop_sequence":"recomputed"',
    ),
    "responses": Dialect(
        opening=frozenset(
            {
                *("response.created", "response.queued", "response.in_progress", "response.output_item.added"),
                *("response.content_part.added", "response.reasoning_part.added"),
                "response.reasoning_summary_part.added",
            }
        ),
        tokens=".delta",
        last=frozenset({"response.completed", "response.incomplete"}),
        failed=frozenset({"response.failed", "error"}),
        inside=("response",),
    ),
    "sglang_generate": SGLANG_EVENTS,
}
"""By endpoint. Those that are not here speak as chat does."""
