"""Whether a chat says more than text: images, sound and the like, whose place in the prompt its token ids do not tell.

Names of parts as in vLLM 0.32, `renderers/chat_utils.py`, and in Anthropic's messages. What is not known to be text is
taken for more: nothing clever is done with such a chat then, and no harm.
"""

from __future__ import annotations

import msgspec

from proxy.handoff.endpoints import Members

_TEXT = frozenset(
    {
        "text",
        "input_text",
        "output_text",
        "thinking",
        "redacted_thinking",
        "refusal",
        "tool_reference",
        "tool_use",
        "tool_result",
    }
)
_ABSENT = msgspec.Raw()


class _Message(msgspec.Struct):
    content: msgspec.Raw = _ABSENT


class _Part(msgspec.Struct):
    type: str | None = None
    uuid: str | None = None  # with one, a part may be a medium whatever its type says
    content: msgspec.Raw = _ABSENT


_decode_messages = msgspec.json.Decoder(list[_Message] | None).decode
_decode_parts = msgspec.json.Decoder(list[_Part | str]).decode


def has_media(members: Members) -> bool:
    """Whether there is more than text in the messages of a request; false where it has none."""
    messages = members.get("messages")
    if messages is None:
        return "prompt_embeds" in members
    if bytes(messages).find(b"[", 1) < 0:  # no list in the list
        return False
    try:
        return any(_is_more(message.content) for message in _decode_messages(messages) or ())
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return True  # the engine says what is wrong with them


def _is_more(content: msgspec.Raw) -> bool:
    if bytes(memoryview(content)[:1]) != b"[":
        return False
    return any(not isinstance(part, str) and not _is_text(part) for part in _decode_parts(content))


def _is_text(part: _Part) -> bool:
    return part.type in _TEXT and part.uuid is None and not _is_more(part.content)
