"""Whether a prompt is more than text: images, sound and the like, which its token ids do not tell.

Names of parts as in vLLM 0.32, `renderers/chat_utils.py`, in Anthropic's messages and in OpenAI's responses. What is
not known to be text is taken for more: nothing clever is done with such a prompt then, and no harm.
"""

from __future__ import annotations

import msgspec

from proxy.decoding import Undecodable, json_decoder
from proxy.handoff.endpoints import Members

_TEXT = frozenset(
    {
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
    }
)
_ABSENT = msgspec.Raw()
_NULL = msgspec.Raw(b"null")


class _Message(msgspec.Struct):
    content: msgspec.Raw = _ABSENT
    output: msgspec.Raw = _ABSENT  # of a function, among the items of responses


class _Part(msgspec.Struct):
    type: str | None = None
    uuid: str | None = None  # with one, a part may be a medium whatever its type says
    content: msgspec.Raw = _ABSENT


_decode_messages = json_decoder(list[_Message] | None)
_decode_parts = json_decoder(list[_Part | str])


def has_media(members: Members) -> bool:
    """Whether there is more than text in what a request says."""
    messages = members.get("messages") or members.get("input")
    if messages is None:
        return members.get("prompt_embeds", _NULL) != _NULL
    said = bytes(messages)
    if said.startswith(b'"') or said.find(b"[", 1) < 0:  # a text; or no list in the list, so that nothing has parts
        return False
    try:
        return any(_is_more(item.content) or _is_more(item.output) for item in _decode_messages(said) or ())
    except Undecodable:
        return True  # the engine says what is wrong with them


def _is_more(content: msgspec.Raw) -> bool:
    if bytes(memoryview(content)[:1]) != b"[":
        return False
    return any(not isinstance(part, str) and not _is_text(part) for part in _decode_parts(content))


def _is_text(part: _Part) -> bool:
    return part.type in _TEXT and part.uuid is None and not _is_more(part.content)
