"""Passes the prompt's token ids from prefill to decode, so that the prompt is tokenised once.

Otherwise both engines apply the chat template and the tokenizer to the same messages. For a long prompt this takes
twice the time. And where the results differ (a template that writes the time, or another revision of it), decode reads
the KV cache of another prompt, and answers with wrong text and without an error.

Prefill returns the ids when it is asked for `return_token_ids`. Decode takes them as
`kv_transfer_params.prompt_token_ids` for chat, where they replace only template and tokenizer, and as `prompt` for
completions. Engines that return no ids, or do not know these parameters, tokenise as before. The ids are passed on as
the bytes that prefill returned.
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
    """Whether the request's prompt is one that engines would tokenise."""
    if body.endpoint == "chat":
        return True
    if body.endpoint != "completions":
        return False
    prompt = body.members.get("prompt")
    return prompt is not None and bytes(memoryview(prompt)[:1]) == b'"' and "prompt_embeds" not in body.members


def prompt_of(answer: PrefillAnswer, body: Body) -> bytes:
    """The ids of the prompt in prefill's answer, `1,2,3`; empty where it has none, or where the prompt has media."""
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
