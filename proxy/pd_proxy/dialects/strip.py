"""Takes out the members of a hand-off that no client may see.

The members in `HANDOFF_FIELDS` carry the engines' addresses and block ids. They are taken out wherever an answer's own
members stand: at the top level of a whole answer, of an event or of an error, in the object inside (`message`,
`response`, `error`), and in each of the choices. Elsewhere the same names belong to the client, as in the schema of a
tool, and stay. Every path to a client goes through the functions here; no other module knows the names.
"""

from __future__ import annotations

import re

import msgspec

from pd_proxy.decoding import Members, WrongShape, decode_items, decode_members, decode_objects
from pd_proxy.dialects.sse import write_event
from pd_proxy.encoding import encode_json

HANDOFF_FIELDS = frozenset({"kv_transfer_params", "ec_transfer_params", "disaggregated_params"})
"""Members of an answer that belong to a hand-off. TensorRT-LLM has the last of them in its choices."""

_ANSWERS = frozenset({"choices", "message", "response", "error"})
"""Members that hold an answer, or a part of one, with members of its own."""
_DEPTH = 3  # of answers within answers: an event, its response, an error of that

# How the names above end in JSON. Within a string a quote has a backslash before it, so this is the end of a name, or
# of a text that ends so.
_MARK = b'_params"'
# A letter of such a name as an escape. Encoders write none for letters, so that what has one is looked at closely.
_BACKSLASH = ord("\\")
_ESCAPED = re.compile(rb"\\u00(?:5[fF]|6[1-9a-fA-F]|7[0-9aA])")


def names_handoff(data: bytes) -> bool:
    """Whether JSON, or events of it, may have a member of the hand-off, however its name is spelled."""
    # `find`: `in` tries to take the needle for a number first, and the exception that this raises costs more. For one
    # byte, given as its number, `in` is much quicker than `find`.
    return data.find(_MARK) >= 0 or (_BACKSLASH in data and _ESCAPED.search(data) is not None)


def strip_handoff(body: bytes) -> bytes:
    """JSON without the hand-off's members; the same bytes where none is named.

    Raises:
        Undecodable: some may be named, and it is not JSON. It must not be sent to a client.
    """
    if not names_handoff(body):
        return body
    try:
        return encode_json(strip_members(decode_members(body)))
    except WrongShape:  # a list of answers, or no answer at all
        try:
            return encode_json([strip_members(members) for members in decode_objects(body)])
        except WrongShape:
            return body


def strip_event(event: bytes, payload: bytes, name: bytes = b"") -> bytes:
    """A server-sent event without the hand-off's members; the same bytes where none is named.

    Arguments:
        event: as it came.
        payload: its data.
        name: of the event, where it has one.
    Raises:
        Undecodable: some may be named, and the payload is not JSON. It must not be sent to a client.
    """
    if not names_handoff(payload):
        return event
    return write_event(strip_handoff(payload), name)


def strip_members(members: Members, depth: int = _DEPTH) -> Members:
    """An answer's members without those of the hand-off.

    Arguments:
        members: is changed.
        depth: how many answers may stand within each other.
    Raises:
        Undecodable: an answer within it is not JSON.
    """
    for field in HANDOFF_FIELDS & members.keys():
        del members[field]
    for name in _ANSWERS & members.keys():
        raw = bytes(members[name])
        if not depth or not names_handoff(raw):
            continue
        if raw.startswith(b"{"):
            members[name] = msgspec.Raw(encode_json(strip_members(decode_members(raw), depth - 1)))
        elif raw.startswith(b"["):
            members[name] = msgspec.Raw(encode_json([_strip_item(item, depth - 1) for item in decode_items(raw)]))
    return members


def _strip_item(item: msgspec.Raw, depth: int) -> msgspec.Raw | Members:
    """One item of a list of answers; what is no object stays as it is."""
    return strip_members(decode_members(item), depth) if bytes(memoryview(item)[:1]) == b"{" else item
