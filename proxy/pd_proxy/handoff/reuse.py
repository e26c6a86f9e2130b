"""Decode takes the prompt as prefill has tokenised it.

Else both engines apply the chat template and the tokenizer to the same messages. That costs the time of a long prompt
twice; and where they come to different tokens (a template that writes the time, another revision of it) decode reads
the KV cache of another prompt, which is wrong text without an error.

Prefill says the ids when it is asked for `return_token_ids`; decode takes them as `kv_transfer_params.prompt_token_ids`
(chat: in place of template and tokenizer only; tools are checked and parsed as ever) or as `prompt` (completions).
Engines that say none, or know no such parameter, tokenise as before. The ids stay the bytes that they came as.
"""

from __future__ import annotations

import msgspec

from pd_proxy.decoding import Undecodable, json_decoder
from pd_proxy.handoff.answer import PrefillAnswer
from pd_proxy.requests.body import Body
from pd_proxy.requests.continuation import inner_ids, with_prompt_ids
from pd_proxy.requests.endpoints import Endpoint, Members


class _Choice(msgspec.Struct):
    prompt_token_ids: msgspec.Raw = msgspec.Raw()


_NONE = msgspec.Raw()
_decode_choices = json_decoder(list[_Choice])


def reusable(body: Body) -> bool:
    """Whether the request's prompt is one that engines tokenise."""
    if body.endpoint == "chat":
        return True
    if body.endpoint != "completions":
        return False
    prompt = body.members.get("prompt")
    return prompt is not None and bytes(memoryview(prompt)[:1]) == b'"' and "prompt_embeds" not in body.members


def prompt_of(answer: PrefillAnswer, body: Body) -> bytes:
    """The ids of the prompt that prefill's answer gives, `1,2,3`; nothing where it gives none, or where there is more
    than text in the prompt."""
    raw = answer.prompt_token_ids
    if body.endpoint == "completions":
        try:
            choices = _decode_choices(answer.choices)
        except Undecodable:
            return b""
        raw = choices[0].prompt_token_ids if len(choices) == 1 else _NONE
    if raw == _NONE or body.media:
        return b""
    return inner_ids(raw)


def with_prompt(members: Members, endpoint: Endpoint, ids: bytes) -> Members:
    """A decode leg's members with these ids as its prompt."""
    if endpoint == "chat":
        return with_prompt_ids(members, ids)
    return {**members, "prompt": msgspec.Raw(b"[%b]" % ids)}
