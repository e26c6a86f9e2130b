"""Turns prefill's answer into the client's: the events that open a stream, a whole answer, or the beginning of one.

Events are written member by member as vLLM 0.32 writes them, and as decode would have written them. So an answer does
not show which engine sampled its first token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from pd_proxy.decoding import Undecodable, decode_members, is_null, json_decoder
from pd_proxy.dialects.strip import strip_members
from pd_proxy.encoding import ABSENT, NULL, encode_json
from pd_proxy.handoff.first_token import FirstToken
from pd_proxy.requests.body import Body

_decode_choices = json_decoder(list[dict[str, msgspec.Raw]])
_decode_text = json_decoder(str | None)
_decode_object = json_decoder(dict[str, Any])
_decode_list = json_decoder(list[msgspec.Raw])
_decode_columns = json_decoder(dict[str, list[Any]] | None)

_OPENING = msgspec.Raw(b'[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]')
_DONE = b"data: [DONE]\n\n"
_STREAMED = {"chat": msgspec.Raw(b'"chat.completion.chunk"'), "completions": msgspec.Raw(b'"text_completion"')}

Merge = Callable[[dict[str, Any]], dict[str, Any]]
"""Decode's `usage` -> that of the whole answer."""


def opening_events(first: FirstToken, body: Body) -> tuple[bytes, bytes, bytes]:
    """The events that begin a stream: the event with the role (for chat; else empty), the event with the token, and, if
    the answer is whole, the events that end it."""
    answer, wants_ids = first.answer, body.wants_token_ids
    counts = _Counts(answer.usage, body)
    head = {"id": answer.id, "object": _STREAMED[body.endpoint], "created": answer.created, "model": answer.model}
    last = {} if is_null(answer.system_fingerprint) else {"system_fingerprint": answer.system_fingerprint}
    role = b""
    if body.endpoint == "chat":
        more = {"prompt_token_ids": msgspec.Raw(b"[%b]" % first.prompt)} if wants_ids else {}
        if answer.prompt_text is not ABSENT:  # vLLM 0.32 has the member, older versions do not
            more["prompt_text"] = NULL
        role = _event({**head, "choices": _OPENING, **counts.running(0), **more})
    choice = _choice(first, body)
    closing = {} if not first.whole or body.wants_usage else last
    token = _event({**head, "choices": [choice], **counts.running(1), **closing})
    end = b""
    if first.whole:
        end = _event({**head, "choices": [], "usage": counts.total(), **last}) if body.wants_usage else b""
        end += _DONE
    return role, token, end


def _choice(first: FirstToken, body: Body) -> dict[str, Any]:
    given = first.choice
    finish = given["finish_reason"] if first.whole else None
    stop = given.get("stop_reason", NULL) if first.whole else None
    shown: dict[str, Any] = {"index": 0}
    if body.endpoint == "chat":
        shown["delta"] = {"content": first.text, **(_beside_text(given) if first.whole else {})}
    else:
        shown["text"] = first.text
    shown["logprobs"] = given.get("logprobs", NULL)
    shown["finish_reason"] = finish
    if first.whole or body.endpoint == "completions":
        shown["stop_reason"] = stop
    if body.wants_token_ids:
        if body.endpoint == "completions":
            shown["prompt_token_ids"] = msgspec.Raw(b"[%b]" % first.prompt)
        shown["token_ids"] = given.get("token_ids", NULL)
    return shown


def _beside_text(choice: dict[str, msgspec.Raw]) -> dict[str, Any]:
    """The members of a whole answer's message beside its content, in the form of a delta."""
    message = _decode_object(choice["message"])
    said = {name: message[name] for name in ("reasoning", "reasoning_content") if message.get(name)}
    if calls := message.get("tool_calls"):
        said["tool_calls"] = [{"index": index, **call} for index, call in enumerate(calls) if isinstance(call, dict)]
    return said


class _Counts:
    """The usage of an answer: while it is streamed, and at its end."""

    def __init__(self, raw: msgspec.Raw, body: Body) -> None:
        usage = {} if is_null(raw) else _decode_object(raw)
        prompt = usage.get("prompt_tokens")
        self._prompt = prompt if type(prompt) is int else 0
        self._usage = usage
        # vLLM 0.32 sends this member in the events of chats even if it is null.
        self._more = ("completion_tokens_details",) if body.endpoint == "chat" else ()
        options = body.members.get("stream_options")
        always = options is not None and (_decode_object(options) if bytes(options) != b"null" else {})
        self._always = bool(body.wants_usage and always and always.get("continuous_usage_stats"))

    def running(self, said: int) -> dict[str, Any]:
        """The usage member of an event before the end, if the client asks for it in every event."""
        if not self._always:
            return {}
        counts = {"prompt_tokens": self._prompt, "total_tokens": self._prompt + said, "completion_tokens": said}
        return {"usage": {**counts, **{name: None for name in self._more if name in self._usage}}}

    def total(self) -> dict[str, Any]:
        """The usage of the last event. It has no members that are null, as in vLLM's streams."""
        return _without_nulls(self._usage)


def _without_nulls(members: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _without_nulls(value) if isinstance(value, dict) else value
        for name, value in members.items()
        if value is not None
    }


def _event(members: dict[str, Any]) -> bytes:
    return b"data: %b\n\n" % encode_json(members)


# Answers in one piece


def whole_answer(first: FirstToken, body: Body) -> bytes:
    """Prefill's answer, where it is the whole answer."""
    return encode_json(strip_members(_with_ids(dict(first.members), [dict(first.choice)], body, first)))


def joined_answer(first: FirstToken, answer: bytes, body: Body, merge: Merge) -> bytes:
    """The first token and decode's answer, joined to one answer.

    Raises:
        ValueError: decode's answer cannot be joined to the token.
    """
    try:
        members = decode_members(answer)
        choices = _decode_choices(members["choices"])
        rest = choices[0]
        if len(choices) != 1:
            raise ValueError(f"{len(choices)} choices")
        if body.endpoint == "chat":
            message = decode_members(rest["message"])
            content = first.text + (_decode_text(message["content"]) or "")
            rest["message"] = msgspec.Raw(encode_json({**message, "content": content}))
        else:
            rest["text"] = msgspec.Raw(encode_json(first.text + (_decode_text(rest["text"]) or "")))
        if bytes(rest.get("logprobs", NULL)) != b"null":
            rest["logprobs"] = msgspec.Raw(encode_json(_joined_logprobs(first.choice["logprobs"], rest["logprobs"])))
        if bytes(rest.get("token_ids", NULL)) != b"null":
            ids = [*_decode_list(first.choice["token_ids"]), *_decode_list(rest["token_ids"])]
            rest["token_ids"] = msgspec.Raw(encode_json(ids))
        members["usage"] = msgspec.Raw(encode_json(merge(_decode_object(members["usage"]))))
    except (Undecodable, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"it cannot be joined to its first token: {error}") from None
    for name in ("id", "created", "model"):
        if name in members:
            members[name] = getattr(first.answer, name)
    return encode_json(strip_members(_with_ids(members, [rest], body, first)))


def _with_ids(
    members: dict[str, msgspec.Raw], choices: list[dict[str, msgspec.Raw]], body: Body, first: FirstToken
) -> dict[str, msgspec.Raw]:
    """Set or remove the ids of prompt and answer, as the client has asked. The ids are those of the client's prompt."""
    prompt = msgspec.Raw(b"[%b]" % first.prompt) if body.wants_token_ids else NULL
    for choice in choices:
        if "token_ids" in choice and not body.wants_token_ids:
            choice["token_ids"] = NULL
        if "prompt_token_ids" in choice:
            choice["prompt_token_ids"] = prompt
    if "prompt_token_ids" in members:
        members["prompt_token_ids"] = prompt
    members["choices"] = msgspec.Raw(encode_json(choices))
    return members


def _joined_logprobs(first: msgspec.Raw, rest: msgspec.Raw) -> dict[str, list[Any]]:
    """The log probabilities of both answers in one object. Each member is a list with an entry for each token."""
    before, after = _decode_columns(first), _decode_columns(rest)
    if before is None or after is None:
        raise ValueError("one of two answers lacks its log probabilities")
    if "text_offset" in after:  # it counts from the beginning of the answer, in the text of the tokens
        shift = sum(map(len, before["tokens"]))
        after["text_offset"] = [offset + shift for offset in after["text_offset"]]
    return {name: before.get(name, []) + values for name, values in after.items()}
