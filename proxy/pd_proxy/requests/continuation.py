"""How a request is made again from the middle of its answer, and when that is exact.

The tokens so far become a part of the prompt, as ids: `prompt` for completions; for chat
`kv_transfer_params.prompt_token_ids`, which takes the place of template and tokenizer, on both legs. Tried on real
vLLM 0.32; `docs/resume.md` has the figures, and the table of the reasons below.
"""

from __future__ import annotations

import sys

import msgspec

from pd_proxy.decoding import decode_members, json_decoder
from pd_proxy.requests.body import Body
from pd_proxy.requests.endpoints import LAYOUTS, Endpoint, Members

_SUSPECTS = frozenset(
    {
        *("presence_penalty", "frequency_penalty", "stop", "seed", "tools", "logprobs"),
        *("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"),
        *("bad_words", "repetition_detection", "logits_processors"),
    }
)
_STRUCTURE = frozenset(name for name in _SUSPECTS if name.startswith(("response", "structured", "guided")))
_EMPTY = (b"null", b"false", b"[]", b"{}", b'""', b"0", b"0.0")

UNTRIED = "endpoint"
"""The reason for which nothing is continued on endpoints that take no tokens of an answer."""
_UNTRIED = frozenset(endpoint for endpoint, layout in LAYOUTS.items() if not layout.resumable)

_DIGITS = b"0123456789, \t\r\n"

_read_number = json_decoder(float)


class Continuation(msgspec.Struct, frozen=True):
    """Where to go on.

    Attributes:
        ids: prompt and answer so far, `1,2,3`.
        said: how many of them are the answer's.
    """

    ids: bytes
    said: int

    def apply(self, members: Members, endpoint: Endpoint) -> Members:
        """The client's members for the rest of the answer: its bounds less what was said, and for completions its
        prompt. Chat's prompt goes into `kv_transfer_params` (`in_params`)."""
        rest = dict(members)
        for name in ("max_tokens", "max_completion_tokens", "min_tokens"):
            if (raw := rest.get(name)) is not None and bytes(raw) != b"null":
                least = 0 if name == "min_tokens" else 1
                rest[name] = msgspec.Raw(b"%d" % max(least, int(_read_number(raw)) - self.said))
        if endpoint == "completions":
            if "max_tokens" not in rest or bytes(rest["max_tokens"]) == b"null":
                rest["max_tokens"] = msgspec.Raw(b"%d" % max(1, 16 - self.said))  # the engine's default
            rest["prompt"] = msgspec.Raw(b"[%b]" % self.ids)
        return rest

    def in_params(self, members: Members) -> Members:
        """A chat leg's members with the prompt's ids among its `kv_transfer_params`."""
        return with_prompt_ids(members, self.ids)


def with_prompt_ids(members: Members, ids: bytes) -> Members:
    """A chat leg's members with these ids, `1,2,3`, as its prompt, in place of template and tokenizer."""
    params = bytes(members.get("kv_transfer_params", msgspec.Raw(b"{}"))).strip()
    rest = params[1:].lstrip()
    comma = b"" if rest.startswith(b"}") else b","
    with_ids = b'{"prompt_token_ids":[%b]%b%b' % (ids, comma, rest)
    return {**members, "kv_transfer_params": msgspec.Raw(with_ids)}


def inexact(body: Body) -> str:
    """Why an answer to this request could not be continued exactly, or an empty string. What shows only in the answer
    (tool calls, reasoning) is not known here.

    An engine counts the tokens so far as prompt once they are sent again: what looks at output alone, or keeps a state
    beside the tokens, begins anew.
    """
    if body.alone:
        return body.alone
    if body.endpoint in _UNTRIED:
        return UNTRIED
    members = body.members
    if _SUSPECTS.isdisjoint(members):
        return ""

    def given(name: str) -> bool:
        raw = members.get(name)
        return raw is not None and bytes(memoryview(raw)[:8]) not in _EMPTY

    for name in ("presence_penalty", "frequency_penalty"):
        if given(name):
            return "penalties"
    if given("stop"):
        return "stop"  # text is held back while it could be the beginning of a stop string
    for name in members.keys() & _STRUCTURE:
        if given(name) and not (name == "response_format" and b'"text"' in bytes(members[name])):
            return "structured_output"
    choice = members.get("tool_choice")
    if given("tools") and choice is not None and bytes(choice) not in (b"null", b'"auto"', b'"none"'):
        return "structured_output"
    if given("seed") or _is_zero_seed(members):
        temperature = members.get("temperature")
        if temperature is None or bytes(temperature) not in (b"0", b"0.0"):
            return "seed"
    for name in ("bad_words", "repetition_detection", "logits_processors"):
        if given(name):
            return name
    if body.endpoint == "completions" and (given("logprobs") or bytes(members.get("logprobs", b"")) == b"0"):
        return "logprobs"  # text_offset counts from the answer's beginning
    return ""


def has_tools(body: Body) -> bool:
    """Whether an engine may look for tool calls in the answer."""
    choice = body.members.get("tool_choice")
    return "tools" in body.members and (choice is None or bytes(choice) != b'"none"')


def choices(body: Body) -> int:
    """How many answers a request has; more than can be counted where it has several prompts."""
    if body.alone == "prompt_list":
        return sys.maxsize
    where = body.members
    try:
        if body.endpoint == "generate":
            where = decode_members(where.get("sampling_params", b"{}"))
        return max(1, int(_read_number(where.get("n", b"1"))))
    except (ValueError, OverflowError):
        return 1  # the engine says what is wrong with it


def _is_zero_seed(members: Members) -> bool:
    return bytes(members.get("seed", b"")) == b"0"


def inner_ids(raw: msgspec.Raw) -> bytes:
    """The ids of a JSON list without its brackets; nothing for what is no list of ids."""
    ids = bytes(raw)
    inner = ids[1:-1] if ids.startswith(b"[") else b""
    return b"" if inner.translate(None, _DIGITS) else inner
