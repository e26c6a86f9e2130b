"""What the tests of bodies share."""

from __future__ import annotations

import json
from typing import Any

from pd_proxy.requests.body import Body, read_body


def chat(**members: Any) -> Body:
    """A chat with these members, as the gateway reads it."""
    return read_body(json.dumps(members).encode(), "chat")


def completion(**members: Any) -> Body:
    """A completions request with these members, as the gateway reads it."""
    return read_body(json.dumps(members).encode(), "completions")


def raw(body: Body, name: str) -> bytes:
    """The bytes of a member."""
    return bytes(body.members[name])
