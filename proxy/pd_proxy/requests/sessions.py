"""Finds the session of a request, by the members that APIs have for it."""

from __future__ import annotations

from pd_proxy.requests.body import Body

_MEMBERS = ("prompt_cache_key", "conversation", "previous_response_id", "session_id", "user", "safety_identifier")
"""The first that a request has is used. Names of conversations come before names of users. `session_id` is SGLang's,
and all others are OpenAI's."""
_MOST = 1024  # bytes; longer values are ignored


def session_of(body: Body) -> bytes:
    """The name of a request's session, as the bytes of a JSON value; empty where the request names none."""
    for name in _MEMBERS:
        if (value := body.members.get(name)) is not None and 2 < len(view := memoryview(value)) <= _MOST:
            said = bytes(view)
            if said != b"null":
                return said
    return b""
