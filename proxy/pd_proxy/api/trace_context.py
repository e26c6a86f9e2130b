"""The trace of a request: the two headers of W3C's Trace Context, which are forwarded to the engines.

The gateway makes no spans, so the engines' spans are children of the client's. Invalid headers are dropped, as the
standard requires: a client's bytes reach an engine only after they have been checked.
"""

from __future__ import annotations

import re

_PARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-[\x21-\x7e]*)?")
_KEY = rb"(?:[a-z][a-z0-9_\-*/]{0,255}|[a-z0-9][a-z0-9_\-*/]{0,240}@[a-z][a-z0-9_\-*/]{0,13})"
_MEMBER = re.compile(rb"(" + _KEY + rb")=[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e]")
_MEMBERS = 32
_LENGTH = 512  # characters of a tracestate that every participant has to forward
_LONG = 128  # characters; longer members are removed first where the tracestate is too long
_LONGEST_PARENT = 256


def trace_context(headers: list[tuple[bytes, bytes]]) -> bytes:
    """The valid trace headers of a request, as header lines for its legs; empty where it has none."""
    parents = [value for name, value in headers if name == b"traceparent"]
    if len(parents) != 1 or not (parent := _parent(parents[0].strip(b" \t"))):
        return b""
    state = _state(b",".join(value for name, value in headers if name == b"tracestate"))
    return b"traceparent: %b\r\n%b" % (parent, b"tracestate: %b\r\n" % state if state else b"")


def _parent(value: bytes) -> bytes:
    """A traceparent in version 00, the only one that the gateway knows; empty where it is not valid."""
    found = _PARENT.fullmatch(value) if len(value) <= _LONGEST_PARENT else None
    if found is None:
        return b""
    version, trace, span, flags, more = found.groups()
    if version == b"ff" or (version == b"00" and more is not None):
        return b""
    if not trace.strip(b"0") or not span.strip(b"0"):
        return b""
    if version != b"00":  # of a later version, only the fields of version 00 are known
        flags = b"%02x" % (int(flags, 16) & 1)
    return b"00-%b-%b-%b" % (trace, span, flags)


def _state(value: bytes) -> bytes:
    """A tracestate, shortened to the characters that have to be forwarded; empty where it is not valid."""
    members = [member for part in value.split(b",") if (member := part.strip(b" \t"))]
    if len(members) > _MEMBERS:
        return b""
    found = [_MEMBER.fullmatch(member) for member in members]
    keys = {match[1] for match in found if match is not None}
    if len(keys) < len(members):
        return b""  # a member is not valid, or its key is repeated
    while len(b",".join(members)) > _LENGTH:
        longest = [index for index, member in enumerate(members) if len(member) > _LONG]
        del members[longest[-1] if longest else -1]
    return b",".join(members)
