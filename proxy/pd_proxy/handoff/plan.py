"""The bodies of both legs of one try, and the hand-off between them.

There are two orders of legs, and each connector has one of them. Sequential: prefill answers, and then decode gets the
address of its KV cache, from that answer or from what was agreed on beforehand. Concurrent: both legs are sent at once,
since prefill waits for decode, or decode waits for prefill; their parameters are known beforehand. For a plan the
orders differ only in whether the hand-off is known before prefill's answer.
"""

from __future__ import annotations

from typing import Any

import msgspec

from pd_proxy.decoding import decode_json
from pd_proxy.encoding import TRUE, encode_json
from pd_proxy.handoff.answer import PrefillAnswer, read_answer
from pd_proxy.handoff.connector import Connector, Handoff, Rendezvous
from pd_proxy.handoff.first_token import FirstToken
from pd_proxy.handoff.reuse import prompt_of, with_prompt
from pd_proxy.handoff.traits import Order
from pd_proxy.requests.body import Body
from pd_proxy.requests.continuation import Continuation
from pd_proxy.requests.endpoints import LAYOUTS, Members
from pd_proxy.requests.sglang_generate import usage_of

_FREEING = frozenset({"chat", "completions", "messages", "responses"})
_TOGETHER = (Order.CONCURRENT, Order.CALLED_BACK)
_LONG = 4096  # tokens, estimated
_SOME = msgspec.Raw(b'"."')
_WITH_USAGE = msgspec.Raw(b'{"include_usage":true}')


class Leg(msgspec.Struct, frozen=True):
    """One request to an engine: its path, its body, and the header lines that other legs do not have. The body is in
    pieces: a long prompt is a piece by itself, so that it is not copied."""

    path: str
    body: tuple[bytes | memoryview, ...]
    headers: bytes = b""


class Plan:
    """Prefill, then or meanwhile decode with the KV cache's address; or decode alone.

    Arguments:
        body: the body of the client's request.
        connector: the protocol that both backends speak.
        continuation: where to continue, if the client has a part of the answer.
        rendezvous: the parameters of both legs, if the connector negotiates.
        token_ids: ask decode for the ids of the tokens, so that the answer can be continued.
        first_token: let prefill sample the client's first token.
        answer_id: the id of the answer, without its prefix, for the APIs whose requests set it.
        reuse: let decode take the prompt's ids from prefill's answer.
    Attributes:
        continuation: where its decode leg continues.
        handoff: the hand-off, if it is known before prefill's answer.
        notices: how many notifications of prefill must have arrived before decode may begin.
        encoded: members that tell the engine which computes the prompt where encoded media are (`encoder.py`).
    """

    __slots__ = (
        "_body",
        "_first_token",
        "_layout",
        "_members",
        "_rendezvous",
        "_reuse",
        "_token_ids",
        "answer_id",
        "connector",
        "continuation",
        "encoded",
        "handoff",
        "notices",
    )

    def __init__(
        self,
        body: Body,
        connector: Connector,
        continuation: Continuation | None = None,
        *,
        rendezvous: Rendezvous | None = None,
        token_ids: bool = False,
        first_token: bool = False,
        answer_id: str = "",
        reuse: bool = False,
    ) -> None:
        self._body = body
        self.connector = connector
        self.continuation = continuation
        self._rendezvous = rendezvous
        self._token_ids = token_ids
        self._first_token = first_token
        self.answer_id = answer_id
        self._layout = LAYOUTS[body.endpoint]
        self._reuse = reuse and continuation is None  # a continuation has ids of its own
        self._members = body.members if continuation is None else continuation.apply(body.members, body.endpoint)
        self.handoff, self.notices = (None, 0) if rendezvous is None else (rendezvous.handoff, rendezvous.notices)
        self.encoded: Members | None = None

    def prefill_leg(self, called_back: Members | None = None) -> Leg:
        """The prefill leg.

        Arguments:
            called_back: the members from the call of decode's engine, if it calls back.
        """
        members = self.connector.prefill(self._members, self._body.endpoint, token=self._first_token)
        if self._rendezvous is not None:
            members.update(self._rendezvous.prefill)
        if called_back is not None:
            members.update(called_back)
        if self.encoded is not None:
            members.update(self.encoded)
        if (translate_leg := self._layout.translate_leg) is not None:
            members = translate_leg(members)
        if self._reuse:
            members["return_token_ids"] = TRUE
        return self._leg(members)

    def behind(self, first: FirstToken) -> Plan:
        """The plan for the rest of the answer, after prefill's token."""
        continuation = Continuation(b"%b,%b" % (first.prompt, first.token), 1)
        return Plan(self._body, self.connector, continuation, rendezvous=self._rendezvous, token_ids=self._token_ids)

    @property
    def together(self) -> bool:
        """Both legs are sent at once."""
        return self.connector.traits.order in _TOGETHER and self.handoff is not None

    def take(self, answer: bytes) -> tuple[Handoff | None, PrefillAnswer]:
        """Read prefill's answer. Returns its hand-off, or None where it has none, and what was read.

        Raises:
            BackendGarbled: it is not an answer.
            HandoffInvalid: its hand-off would harm decode.
        """
        if self._layout.of_one_family:
            return self.handoff, PrefillAnswer(usage=usage_of(answer, self._body.prompts))
        parsed = read_answer(answer, self._layout.answer)
        handoff = self.handoff or self.connector.take(parsed)
        if self._reuse and handoff is not None and (ids := prompt_of(parsed, self._body)):
            handoff = msgspec.structs.replace(handoff, prompt=ids)
        return handoff, parsed

    def decode_leg(self, handoff: Handoff | None) -> Leg:
        """The decode leg; without a hand-off the backend computes the prompt itself."""
        headers = b""
        if handoff is None:
            members = dict(self._members)
            if self.encoded is not None:
                members.update(self.encoded)
        else:
            members = self.connector.decode(self._members, handoff)
            headers = handoff.headers
            if handoff.prompt and self.continuation is None:
                members = with_prompt(members, self._body.endpoint, handoff.prompt)
        if self._token_ids:
            members["return_token_ids"] = TRUE
        if self._body.stream and not self._body.wants_usage:
            # Only the engine's own count is right, since a chunk may have several tokens. The relay takes the extra
            # event out again.
            members["stream_options"] = _with_usage(members.get("stream_options"))
        return self._leg(members, headers)

    @property
    def refusal_frees(self) -> bool:
        """Whether decode's handler makes prefill free the blocks when it refuses the leg. That is so for connectors
        whose release is such a refusal, on the endpoints whose handler does this."""
        return self.connector.traits.release_by_refusal and self._body.endpoint in _FREEING

    def release_leg(self, handoff: Handoff, *, sent: bool) -> Leg | None:
        """A decode leg that makes prefill free the blocks of a hand-off that is not used; None where none is safe.

        Arguments:
            sent: a decode engine has received the hand-off, and has answered with an error.
        """
        members, translate_leg = self._members, self._layout.translate_leg
        if translate_leg is not None and self.connector.traits.release_by_refusal:
            # On this endpoint an engine would serve the leg instead of refusing it. Only the name of the blocks
            # matters, so another endpoint is used.
            members = {"prompt": _SOME, **{name: members[name] for name in ("model",) if name in members}}
            released = self.connector.release(members, handoff, sent=sent)
            path = LAYOUTS["completions"].path
            return None if released is None else Leg(path, (encode_json(released),), handoff.headers)
        released = self.connector.release(members, handoff, sent=sent)
        if released is not None and translate_leg is not None:
            released = translate_leg(released)
        return None if released is None else self._leg(released, handoff.headers)

    def _leg(self, members: Members, headers: bytes = b"") -> Leg:
        layout = self._layout
        if self.continuation is not None and self._body.endpoint == "chat":
            members = self.continuation.in_params(members)
        elif layout.id_member:
            named, prompts = layout.id_prefix + self.answer_id, self._body.prompts
            each = [f"{named}_{prompt}" for prompt in range(prompts)]
            members[layout.id_member] = msgspec.Raw(encode_json(each or named))
            if layout.of_one_family:
                members.pop("model", None)
        name = layout.prompt[0]
        if self._body.prompt_tokens < _LONG or name not in members:
            return Leg(layout.path, (encode_json(members),), headers)
        rest = dict(members)
        prompt = memoryview(rest.pop(name))
        comma = "," if rest else ""
        return Leg(layout.path, (encode_json(rest)[:-1] + f'{comma}"{name}":'.encode(), prompt, b"}"), headers)


def _with_usage(options: msgspec.Raw | None) -> msgspec.Raw:
    """The client's stream options with `include_usage`, and without `continuous_usage_stats`, which had no effect."""
    if options is None:
        return _WITH_USAGE
    members: dict[str, Any] = decode_json(options) or {}
    members.pop("continuous_usage_stats", None)
    return msgspec.Raw(encode_json({**members, "include_usage": True}))
