"""Requests of the contract, and the answers of one engine alone to compare with."""

from __future__ import annotations

import json
from typing import Any

from tests.contract.cases import one_engine
from tests.support import chat, completion, events_of, text_of

PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}


def body(endpoint: str, **more: Any) -> dict[str, Any]:
    """A chat or a completions request."""
    return chat(**more) if endpoint == "chat" else completion(**more)


def text_of_stream(text: str) -> str:
    """The text of a stream, which must have come to its end."""
    choices = [choice for event in events_of(text) for choice in event["choices"]]
    return "".join(c["text"] if "text" in c else c["delta"].get("content") or "" for c in choices)


_ALONE: dict[str, str] = {}  # by request; the same for every connector


async def text_of_one(endpoint: str, **more: Any) -> str:
    """The answer of one engine alone."""
    asked = body(endpoint, **more)
    if (key := json.dumps(asked)) not in _ALONE:
        async with one_engine() as alone:
            _ALONE[key] = text_of((await alone.http.post(PATHS[endpoint], json=asked)).json())
    return _ALONE[key]
