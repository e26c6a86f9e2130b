"""Which session a request says that it belongs to, by the members that APIs have for it."""

from __future__ import annotations

from pd_proxy.requests.body import Body

_MEMBERS = ("prompt_cache_key", "conversation", "previous_response_id", "session_id", "user", "safety_identifier")
"""The first that a request has counts: what names a conversation before what names a person. OpenAI's have all but
`session_id`, which is SGLang's."""
_MOST = 1024  # bytes; what is longer is no name


def session_of(body: Body) -> bytes:
    """A name for the session of a request, as the bytes of a JSON value; empty where it does not say."""
    for name in _MEMBERS:
        if (value := body.members.get(name)) is not None and 2 < len(view := memoryview(value)) <= _MOST:
            said = bytes(view)
            if said != b"null":
                return said
    return b""
