"""Decides whether the token that prefill has sampled may be the client's first token, and reads it.

Prefill samples a token that is usually discarded, and decode samples it again once it has the KV cache. If the client
gets prefill's token at once, decode continues behind it: a continuation (`continuation.py`) whose prompt is one token
longer than the blocks of prefill. Two questions are separate:

- Is it *exact*: is the answer the same as from one engine? `inexact_because` decides this from the request alone,
before
  anything is sent.
- Is it *safe*: decode reads the blocks of another engine by number, and crashes if it needs more blocks than there are.
  `read` decides this from prefill's answer and from what is known of both engines.

Tried on real vLLM 0.32; `docs/first-token.md` has the figures, and explains the reasons below.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from pd_proxy.decoding import Undecodable, decode_members, decode_objects, json_decoder
from pd_proxy.encoding import ABSENT, FALSE, TRUE
from pd_proxy.handoff.answer import PrefillAnswer
from pd_proxy.handoff.blocks import block_counts
from pd_proxy.requests.body import Body
from pd_proxy.requests.continuation import UNTRIED, has_tools, inexact, inner_ids
from pd_proxy.requests.endpoints import Members

# Members of the decode leg that prefill's does not carry. An engine that refuses them after the first token would break
# an answer in its middle.
_CHECKED_BY_DECODE = frozenset({"stream_options", "min_tokens"})
_NEVER = frozenset({"structured_output", "tool_calls", "stop", "media", "options", "repetition_detection", UNTRIED})
"""Reasons that no setting overrules: the text would be wrong, not only another sample."""

_MARKUP = ("<", "[", "\u25c1")
"""How tags begin that reasoning parsers take out of a stream. In a whole answer of one token, such a tag would be
shown as text."""

_ONE = msgspec.Raw(b"1")
_RANK = re.compile(r"_dp\d+$")

_read_options = json_decoder(dict[str, bool | None] | None)
_read_count = json_decoder(int | None)


def inexact_because(body: Body, *, even_inexact: bool) -> str:
    """Why the first token of this request should be decode's, or an empty string.

    Arguments:
        even_inexact: only reasons count for which the text would be wrong, not only another sample.
    """
    if body.max_tokens is not None and body.max_tokens <= 1:
        return "one_token"
    flaw = inexact(body)
    if flaw == "logprobs" and not body.stream:
        flaw = ""  # those of both answers are joined (`opening.py`)
    if flaw and not (even_inexact and flaw not in _NEVER and flaw != body.unsplittable):
        return flaw
    if has_tools(body):
        return "tool_calls"
    if not _CHECKED_BY_DECODE.isdisjoint(body.members) and _may_be_refused(body):
        return "options"
    return "media" if body.media else ""


def _may_be_refused(body: Body) -> bool:
    try:
        _read_options(body.members.get("stream_options", b"null"))
        least = _read_count(body.members.get("min_tokens", b"null"))
    except Undecodable:
        return True
    return least is not None and (least < 0 or (body.max_tokens is not None and least > body.max_tokens))


def sampled_token(members: Members) -> Members:
    """The members of a prefill leg whose token is the client's first: the same prompt and the same sampling, one token,
    not streamed, with its id and the prompt's."""
    leg = {name: value for name, value in members.items() if name not in ("stream_options", "n", "min_tokens")}
    leg["stream"] = FALSE
    leg["max_tokens"] = _ONE
    if "max_completion_tokens" in leg:  # for chat it wins over max_tokens
        leg["max_completion_tokens"] = _ONE
    if (least := members.get("min_tokens")) is not None and _read_count(least):
        leg["min_tokens"] = _ONE  # so that this token does not end the answer
    leg["return_token_ids"] = TRUE
    return leg


class FirstToken(msgspec.Struct, frozen=True):
    """Prefill's answer, as the client's first token.

    Attributes:
        answer: what was read of it.
        choice: the members of its one choice.
        prompt: ids of the prompt, `1,2,3`.
        token: its id; empty where the answer is whole and has no ids.
        text: its text; never a part of a character.
        whole: it is the whole answer, so that decode is not needed.
        engine: the engine that sampled it, without its data-parallel rank; empty where there is no hand-off.
        members: all members of the answer, where it is whole.
    """

    answer: PrefillAnswer
    choice: Members
    prompt: bytes
    token: bytes
    text: str
    whole: bool
    engine: str
    members: Members = {}


class _Message(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Any] | None = None


class _Choice(msgspec.Struct):
    message: _Message | None = None
    text: str | None = None
    finish_reason: str | None = None
    stop_reason: Any = None
    token_ids: list[int] | None = None
    prompt_token_ids: msgspec.Raw = msgspec.Raw()


class _Params(msgspec.Struct):
    """The members of a hand-off that describe its blocks. The connector has checked the rest."""

    remote_block_ids: msgspec.Raw
    remote_engine_id: str
    remote_num_tokens: int | None = None
    dcp_size: int = 1
    pp_size: int = 1


class _Usage(msgspec.Struct):
    prompt_tokens: int


_decode_choice = json_decoder(list[_Choice])
_decode_params = json_decoder(_Params)
_decode_usage = json_decoder(_Usage)


def read(answer: PrefillAnswer, body: Body, *, block_size: int, context: int, limit: int) -> FirstToken | str:
    """The first token in prefill's answer, or the reason why it must not be used.

    Arguments:
        block_size: of both engines, in tokens; 0 where it is not known or differs.
        context: the most tokens of prompt and answer together on the decode engine.
        limit: the most bytes of the prompt's ids.
    """
    try:
        choices, found = _decode_choice(answer.choices), decode_objects(answer.choices)
    except Undecodable:
        return "unreadable"
    if len(choices) != 1 or answer.lacks():
        return "unreadable"
    choice = choices[0]
    ids = choice.prompt_token_ids if answer.prompt_token_ids is ABSENT else answer.prompt_token_ids
    prompt = inner_ids(ids)
    if not prompt or choice.token_ids is None or len(choice.token_ids) != 1:
        return "no_token_ids"
    if len(prompt) > limit:
        return "too_long"
    message = choice.message
    if message is not None and (message.reasoning or message.reasoning_content):
        return "reasoning"
    if message is not None and message.tool_calls:
        return "tool_calls"
    text = (choice.text if message is None else message.content) or ""
    if message is not None and text.lstrip().startswith(_MARKUP):
        return "markup"
    whole = choice.finish_reason == "stop" and choice.stop_reason != "recomputed"
    if not whole and choice.finish_reason != "length":
        return "unreadable"
    engine = ""
    if not whole:
        if not text or "\ufffd" in text:
            return "no_text"
        try:
            handed = _decode_params(answer.kv_transfer_params)
            counted = _decode_usage(answer.usage).prompt_tokens
            held = block_counts(handed.remote_block_ids)
        except Undecodable:
            return "unreadable"
        if why := _unsafe(handed, held, counted, prompt.count(b",") + 1, body, block_size, context):
            return why
        engine = _RANK.sub("", handed.remote_engine_id)
    token, members = b"%d" % choice.token_ids[0], decode_members(answer.body) if whole else {}
    return FirstToken(answer, found[0], prompt, token, text, whole, engine, members)


def _unsafe(
    handed: _Params, held: Sequence[int], counted: int, tokens: int, body: Body, block_size: int, context: int
) -> str:
    """Why decode must not continue from the prompt and one token more with these blocks, or an empty string.

    Arguments:
        held: blocks of each of the engine's groups of them.
        counted: tokens of the prompt, as the usage says.
        tokens: the same, as the ids say.
    """
    if not block_size:
        return "unknown_engine"
    if len(held) != 1 or handed.dcp_size != 1 or handed.pp_size != 1:
        return "unlike_blocks"  # their size differs from the one that was learnt
    blocks = -(-tokens // block_size)
    if held[0] != blocks or handed.remote_num_tokens not in (None, tokens) or counted != tokens:
        return "unlike_blocks"
    if tokens % block_size == 0:
        return "full_blocks"  # one token more would need a block that does not exist: the decode engine would crash
    if tokens + (body.max_tokens or 2) > context:
        return "context"  # decode would refuse it
    return ""
