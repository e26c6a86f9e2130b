"""The order of the legs and what each of them says, for one try of one request.

`SequentialPlan`: prefill answers, and its answer's parameters go into the decode leg. Every connector here so far has
that order.
"""

from __future__ import annotations

import msgspec

from proxy.errors import BackendGarbled
from proxy.handoff.body import Body, Members
from proxy.handoff.connector import Connector, Handoff
from proxy.handoff.continuation import Continuation
from proxy.handoff.first_token import FirstToken

PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}

_encode = msgspec.json.Encoder().encode
_TRUE = msgspec.Raw(b"true")
_WITH_USAGE = msgspec.Raw(b'{"include_usage":true}')


class PrefillAnswer(msgspec.Struct):
    """What is read of prefill's answer."""

    choices: msgspec.Raw = msgspec.Raw()
    kv_transfer_params: msgspec.Raw = msgspec.Raw()
    usage: msgspec.Raw = msgspec.Raw()


_decode_answer = msgspec.json.Decoder(PrefillAnswer).decode


class Leg(msgspec.Struct, frozen=True):
    """One upstream request: its path and its body."""

    path: str
    body: bytes


class SequentialPlan:
    """Prefill, then decode with what prefill answered; or decode alone.

    Arguments:
        body: the client's.
        connector: the protocol both backends speak.
        continuation: where to go on, when a part of the answer has been given.
        token_ids: ask decode for the ids of the tokens, so that the answer can be continued.
        first_token: have prefill sample the client's first token.
    """

    __slots__ = ("_body", "_connector", "_continuation", "_first_token", "_members", "_path", "_token_ids")

    def __init__(
        self,
        body: Body,
        connector: Connector,
        continuation: Continuation | None = None,
        *,
        token_ids: bool = False,
        first_token: bool = False,
    ) -> None:
        self._body = body
        self._connector = connector
        self._continuation = continuation
        self._token_ids = token_ids
        self._first_token = first_token
        self._path = PATHS[body.endpoint]
        self._members = body.members if continuation is None else continuation.apply(body.members, body.endpoint)

    def prefill_leg(self) -> Leg:
        return self._leg(self._connector.prefill(self._members, self._body.endpoint, token=self._first_token))

    def behind(self, first: FirstToken) -> SequentialPlan:
        """The plan for what comes behind the token that prefill has given."""
        continuation = Continuation(b"%b,%b" % (first.prompt, first.token), 1)
        return SequentialPlan(self._body, self._connector, continuation, token_ids=self._token_ids)

    @property
    def continuation(self) -> Continuation | None:
        """Where its decode leg goes on."""
        return self._continuation

    def take(self, answer: bytes) -> tuple[Handoff | None, msgspec.Raw]:
        """Read prefill's answer: the hand-off (None when it gave no parameters) and its `usage`.

        Raises:
            BackendGarbled: it is not an answer.
            HandoffInvalid: its parameters would harm decode.
        """
        try:
            parsed = _decode_answer(answer)
        except msgspec.MsgspecError as error:
            raise BackendGarbled(f"prefill's answer is not one: {error}") from None
        if not memoryview(parsed.choices):
            raise BackendGarbled("prefill's answer has no choices")
        params = parsed.kv_transfer_params
        if bytes(memoryview(params)[:4]) in (b"", b"null", b"{}"):
            return None, parsed.usage
        return self._connector.handoff(params), parsed.usage

    def decode_leg(self, handoff: Handoff | None) -> Leg:
        """The decode leg; without a hand-off the backend computes the prompt itself."""
        members = dict(self._members) if handoff is None else self._connector.decode(self._members, handoff)
        if self._token_ids:
            members["return_token_ids"] = _TRUE
        if self._body.stream and not self._body.wants_usage:
            # The engine's own count is the only right one (a chunk may hold several tokens); the relay takes the
            # extra event out again.
            members["stream_options"] = _with_usage(members.get("stream_options"))
        return self._leg(members)

    def release_leg(self, handoff: Handoff, *, sent: bool) -> Leg | None:
        """A decode leg that has prefill free the blocks of a hand-off nobody wants; None where there is no safe one.

        Arguments:
            sent: a decode engine has had it, and has answered with an error.
        """
        members = self._connector.release(self._members, handoff, sent=sent)
        return None if members is None else self._leg(members)

    def _leg(self, members: Members) -> Leg:
        if self._continuation is not None and self._body.endpoint == "chat":
            members = self._continuation.in_params(members)
        return Leg(self._path, _encode(members))


def _with_usage(options: msgspec.Raw | None) -> msgspec.Raw:
    """The client's stream options and `include_usage`; without it `continuous_usage_stats` had no effect either."""
    if options is None:
        return _WITH_USAGE
    members = msgspec.json.decode(options) or {}
    members.pop("continuous_usage_stats", None)
    return msgspec.Raw(_encode({**members, "include_usage": True}))
