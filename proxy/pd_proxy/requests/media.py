"""Finds out whether a prompt has media, such as images or sound, which its token ids do not show.

The names of parts are those of vLLM 0.32 (`renderers/chat_utils.py`), Anthropic's messages and OpenAI's responses. A
part that is not known to be text counts as a medium. This is safe, since for a prompt with media the gateway only
leaves out optimisations.
"""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Literal

import msgspec

from pd_proxy.decoding import Undecodable, WrongShape, json_decoder
from pd_proxy.encoding import ABSENT, NULL
from pd_proxy.requests.endpoints import Members
from pd_proxy.requests.json_scan import elements, has_few

_Text = Literal[
    "text",
    "input_text",
    "output_text",
    "thinking",
    "redacted_thinking",
    "refusal",
    "summary_text",
    "reasoning_text",
    "tool_reference",
    "tool_use",
    "tool_result",
]

_MOST = 2048
"""The most messages and parts that are read one by one, where there may be many in few bytes."""
_FEW = 256  # objects up to which a prompt is decoded in one step
_BYTES_EACH = 256  # bytes of text for each object from which a prompt is decoded in one step too
_LONG = 1024 * 1024  # bytes of nested parts from which they are not read, since each level has to be read again
_DEEPEST = 2  # levels of parts; the result of a tool has parts of its own, and nothing is nested deeper


class _Message(msgspec.Struct, gc=False):
    content: msgspec.Raw = ABSENT
    output: msgspec.Raw = ABSENT  # of a function call, in the input of a response


class _TextPart(msgspec.Struct, gc=False):
    type: _Text
    uuid: None = None  # with a uuid, a part may be a medium whatever its type is
    content: msgspec.Raw = ABSENT


_PARTS = re.compile(rb'"content"[ \t\r\n]*:[ \t\r\n]*\[')

_decode_messages = json_decoder(list[_Message])
_decode_message = json_decoder(_Message)
_decode_parts = json_decoder(list[_TextPart])
_decode_part = json_decoder(_TextPart)


def has_media(members: Members) -> bool:
    """Whether the prompt of a request has media."""
    messages = members.get("messages") or members.get("input")
    if messages is None:
        return members.get("prompt_embeds", NULL) != NULL
    said = bytes(messages)
    if said[:1] == b'"' or said.find(b"[", 1) < 0:  # text, or no inner lists
        return False
    if said == b"null":
        return False
    try:
        return _Look().finds_more(said)
    except Undecodable:
        return True  # malformed, which the engine reports


class _Look:
    """Reads one prompt, and stops at `_MOST` messages and parts, which no ordinary prompt has."""

    def __init__(self) -> None:
        self._seen = 0
        self._sparse = False

    def finds_more(self, messages: bytes) -> bool:
        self._sparse = _is_sparse(messages)
        if self._sparse:
            found = _decode_messages(messages)
            return any(self._is_more(item.content) or self._is_more(item.output) for item in found)
        for element in elements(messages):
            if len(element) > _LONG and _is_nested(element):
                return True  # not read, since each level of parts would be read twice
            item = _decode_message(element)
            if self._is_enough() or self._is_more(item.content) or self._is_more(item.output):
                return True
        return False

    def _is_more(self, content: msgspec.Raw, depth: int = 1) -> bool:
        if bytes(memoryview(content)[:1]) != b"[":
            return False
        if depth > _DEEPEST or (depth > 1 and len(memoryview(content)) > _LONG):
            return True
        if self._sparse:
            with suppress(WrongShape):  # there may be a medium, or a bare string
                parts = _decode_parts(content)
                return any(self._is_more(part.content, depth + 1) for part in parts)
        if depth > 1:
            return True  # not read, since each level would be read twice; only Anthropic's messages have a second
        for element in elements(memoryview(content)):
            if self._is_enough():
                return True
            if bytes(element[:1]) != b'"' and self._is_more(_decode_part(element).content, depth + 1):
                return True
        return False

    def _is_enough(self) -> bool:
        self._seen += 1
        return self._seen > _MOST


def _is_nested(message: memoryview | bytes) -> bool:
    """Whether there is a list of parts within another one. Inside a string, the quotes of `"content"` would be
    escaped."""
    first = _PARTS.search(message)
    return first is not None and _PARTS.search(message, first.end()) is not None


def _is_sparse(said: bytes) -> bool:
    """Whether a text has few objects for its length."""
    return has_few(said, b"{", _FEW) or said.count(b"{") <= len(said) // _BYTES_EACH
