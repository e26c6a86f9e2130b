"""Whether a prompt is more than text: images, sound and the like, which its token ids do not tell.

Names of parts as in vLLM 0.32, `renderers/chat_utils.py`, in Anthropic's messages and in OpenAI's responses. What is
not known to be text is taken for more: nothing clever is done with such a prompt then, and no harm.
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
"""Messages and parts that are looked at one by one, where there may be many in few bytes."""
_FEW = 256
_BYTES_EACH = 256  # of text for each message or part, from which they may all be decoded at once
_LONG = 1024 * 1024  # bytes of parts in a part that are not looked into: each level takes as much again
_DEEPEST = 2  # a result of a tool has parts of its own; nothing goes deeper


class _Message(msgspec.Struct, gc=False):
    content: msgspec.Raw = ABSENT
    output: msgspec.Raw = ABSENT  # of a function, among the items of responses


class _TextPart(msgspec.Struct, gc=False):
    type: _Text
    uuid: None = None  # with one, a part may be a medium whatever its type says
    content: msgspec.Raw = ABSENT


_PARTS = re.compile(rb'"content"[ \t\r\n]*:[ \t\r\n]*\[')

_decode_messages = json_decoder(list[_Message])
_decode_message = json_decoder(_Message)
_decode_parts = json_decoder(list[_TextPart])
_decode_part = json_decoder(_TextPart)


def has_media(members: Members) -> bool:
    """Whether there is more than text in what a request says."""
    messages = members.get("messages") or members.get("input")
    if messages is None:
        return members.get("prompt_embeds", NULL) != NULL
    said = bytes(messages)
    if said.startswith(b'"') or said.find(b"[", 1) < 0:  # a text; or no list in the list, so that nothing has parts
        return False
    if said == b"null":
        return False
    try:
        return _Look().finds_more(said)
    except Undecodable:
        return True  # the engine says what is wrong with them


class _Look:
    """One look at a prompt, which ends when it has seen so much that no person can have written it."""

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
                return True  # as its parts would show, each level of which is passed over twice
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
            with suppress(WrongShape):  # there is a medium, or a bare string
                parts = _decode_parts(content)
                return any(self._is_more(part.content, depth + 1) for part in parts)
        if depth > 1:
            return True  # each level is passed over twice here, and only Anthropic's messages have a second
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
    """Whether there is a list of parts within another. Within a string the quotes of such a name have backslashes."""
    first = _PARTS.search(message)
    return first is not None and _PARTS.search(message, first.end()) is not None


def _is_sparse(said: bytes) -> bool:
    """Whether there can be few objects in a text, for its length."""
    return has_few(said, b"{", _FEW) or said.count(b"{") <= len(said) // _BYTES_EACH
