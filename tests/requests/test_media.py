"""Which chats have more than text."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from pd_proxy.requests.media import has_media
from pd_proxy.requests.members import read_members


def has_more_than_text(**members: Any) -> bool:
    return has_media(read_members(msgspec.json.encode(members)))


def messages_with(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": list(parts)}]


@pytest.mark.parametrize(
    "messages",
    [
        [],
        None,
        [{"role": "user", "content": "Hello"}],
        [{"role": "user", "content": 'I say "type":"image_url" and [{"type":"image"}]'}],
        [{"role": "assistant", "content": None, "tool_calls": [{"type": "function"}]}],
        [{"role": "assistant"}],
        messages_with({"type": "text", "text": "Hello"}, "there"),
        messages_with(
            {"type": "thinking", "thinking": "hm"}, {"type": "tool_use", "id": "1", "input": {"type": "image"}}
        ),
        messages_with({"type": "tool_result", "content": [{"type": "text", "text": "4"}]}),
        messages_with({"type": "tool_result", "content": "4"}),
    ],
)
def test_chats_of_text_have_no_more_than_text(messages: Any) -> None:
    assert not has_more_than_text(messages=messages)


@pytest.mark.parametrize(
    "messages",
    [
        messages_with(
            {"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": "http://a/b"}}
        ),
        messages_with({"type": "input_audio", "input_audio": {}}),
        messages_with({"type": "image", "source": {}}),
        messages_with({"type": "prompt_embeds", "data": "AAAA"}),
        messages_with({"image_url": "http://a/b"}),  # vLLM takes a part's type from its only other member
        # with a uuid, vLLM does so before it looks at the type
        messages_with({"type": "text", "uuid": "1", "image_url": "http://a/b"}),
        messages_with({"type": "tool_result", "content": [{"type": "image", "source": {}}]}),
        messages_with({"type": "of next year"}),
        messages_with({"type": 7}),
        [7, [8]],  # the engine will refuse it
    ],
)
def test_chats_with_media_or_unknown_parts_have_more_than_text(messages: Any) -> None:
    assert has_more_than_text(messages=messages)


def test_names_in_escapes_are_read() -> None:
    raw = rb'{"messages":[{"content":[{"t\u0079pe":"im\u0061ge_url"}]}]}'
    assert has_media(read_members(raw))


def test_bodies_without_messages_have_no_media() -> None:
    assert not has_more_than_text(prompt="hello")
    assert not has_more_than_text(prompt="hello", prompt_embeds=None)
    assert has_more_than_text(prompt_embeds="AAAA")


def test_the_input_of_responses_is_read_for_media() -> None:
    assert not has_more_than_text(input='Say [{"type":"input_image"}]')
    assert not has_more_than_text(input=[{"role": "user", "content": [{"type": "input_text", "text": "hello"}]}])
    assert not has_more_than_text(input=[{"type": "function_call_output", "output": "[4]"}])
    assert has_more_than_text(input=[{"role": "user", "content": [{"type": "input_image", "image_url": "http://a/b"}]}])
    assert has_more_than_text(input=[{"type": "function_call_output", "output": [{"type": "input_file"}]}])


@pytest.mark.parametrize(("depth", "media"), [(1, False), (2, False), (3, True), (50, True), (400, True)])
def test_nested_parts_are_read_as_deep_as_engines_read_them(depth: int, media: bool) -> None:
    deep = b'{"messages":[{"content":' + b'[{"type":"tool_result","content":' * depth + b'"x"' + b"}]" * depth + b"}]}"
    assert has_media(read_members(deep)) is media
