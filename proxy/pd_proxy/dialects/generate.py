"""vLLM's tokens in, tokens out (`/inference/v1/generate`).

Its answers have choices as chat's have, with token ids in place of a message or a text: an event with ids has content.
"""

from __future__ import annotations

from pd_proxy.dialects.chat import ChoicesDialect

GENERATE = ChoicesDialect()
