"""The request that continues a broken answer, and the conditions under which its text is exactly the same.

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

_PENALTIES = frozenset({"presence_penalty", "frequency_penalty"})
_STRUCTURE = frozenset(
    ("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar")
)
_STATEFUL = ("bad_words", "repetition_detection", "logits_processors")  # each is its own reason
_SUSPECTS = _PENALTIES | _STRUCTURE | {*_STATEFUL, "stop", "seed", "tools", "logprobs"}
_EMPTY = (b"null", b"false", b"[]", b"{}", b'""', b"0", b"0.0")

UNTRIED = "endpoint"
"""The reason why nothing is continued on endpoints that do not take the tokens of an answer."""
_UNTRIED = frozenset(endpoint for endpoint, layout in LAYOUTS.items() if not layout.resumable)

_DIGITS = b"0123456789, \t\r\n"

_read_number = json_decoder(float)


class Continuation(msgspec.Struct, frozen=True):
    """The point from which a request continues.

    Attributes:
        ids: the token ids of the prompt and of the answer so far, `1,2,3`.
        said: how many of them belong to the answer.
    """

    ids: bytes
    said: int

    def apply(self, members: Members, endpoint: Endpoint) -> Members:
        """The client's members for the rest of the answer: its token bounds less the tokens so far, and for completions
        the longer prompt. Chat's prompt goes into `kv_transfer_params` (`in_params`)."""
        rest = dict(members)
        for name in ("max_tokens", "max_completion_tokens", "min_tokens"):
            if (raw := rest.get(name)) is not None and bytes(raw) != b"null":
                least = 0 if name == "min_tokens" else 1
                rest[name] = msgspec.Raw(b"%d" % max(least, int(_read_number(raw)) - self.said))
        if endpoint == "completions":
            if "max_tokens" not in rest or bytes(rest["max_tokens"]) == b"null":
                rest["max_tokens"] = msgspec.Raw(b"%d" % max(1, 16 - self.said))  # the engine's default is 16
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
    """Why an answer to this request could not be continued exactly, or an empty string. Reasons that show only in the
    answer (tool calls, reasoning) are not among them.

    An engine counts the tokens so far as prompt once they are sent again. So whatever looks at the output alone, or
    keeps a state beside the tokens, starts again.
    """
    if body.unsplittable:
        return body.unsplittable
    if body.endpoint in _UNTRIED:
        return UNTRIED
    members = body.members
    if _SUSPECTS.isdisjoint(members):
        return ""

    given = {name for name in members.keys() & _SUSPECTS if bytes(memoryview(members[name])[:8]) not in _EMPTY}
    if given & _PENALTIES:
        return "penalties"
    if "stop" in given:
        return "stop"  # text is held back while it could be the beginning of a stop string
    if _is_structured(members, given):
        return "structured_output"
    if _is_seeded(members, given):
        return "seed"
    for name in _STATEFUL:
        if name in given:
            return name
    if body.endpoint == "completions" and ("logprobs" in given or bytes(members.get("logprobs", b"")) == b"0"):
        return "logprobs"  # text_offset counts from the answer's beginning
    return ""


def _is_structured(members: Members, given: set[str]) -> bool:
    """Whether a grammar decides which tokens may follow."""
    for name in given & _STRUCTURE:
        if name != "response_format" or b'"text"' not in bytes(members[name]):
            return True
    choice = members.get("tool_choice")
    return "tools" in given and choice is not None and bytes(choice) not in (b"null", b'"auto"', b'"none"')


def _is_seeded(members: Members, given: set[str]) -> bool:
    """Whether the tokens depend on the state of a random generator that the request seeds; 0 is a seed too."""
    if "seed" not in given and bytes(members.get("seed", b"")) != b"0":
        return False
    temperature = members.get("temperature")
    return temperature is None or bytes(temperature) not in (b"0", b"0.0")


def has_tools(body: Body) -> bool:
    """Whether an engine may parse the answer for tool calls."""
    choice = body.members.get("tool_choice")
    return "tools" in body.members and (choice is None or bytes(choice) != b'"none"')


def choices(body: Body) -> int:
    """How many answers a request asks for; `sys.maxsize` where it has several prompts."""
    if body.unsplittable == "prompt_list":
        return sys.maxsize
    where = body.members
    try:
        if body.endpoint == "generate":
            where = decode_members(where.get("sampling_params", b"{}"))
        return max(1, int(_read_number(where.get("n", b"1"))))
    except (ValueError, OverflowError):
        return 1  # not a number; the engine's error says so


def inner_ids(raw: msgspec.Raw) -> bytes:
    """The ids of a JSON list, without its brackets; empty where it is not a list of ids."""
    ids = bytes(raw)
    inner = ids[1:-1] if ids.startswith(b"[") else b""
    return b"" if inner.translate(None, _DIGITS) else inner
