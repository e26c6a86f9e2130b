"""The order of the legs and what each of them says, for one try of one request.

There are two orders, and each connector has one of them. Sequential: prefill answers, and then decode is told of its
KV cache, by that answer or by what the legs agreed on beforehand. Concurrent: both legs are sent at once, since prefill
waits for decode, or decode is to wait for prefill; what they are told of each other is known before. To a plan the two
are the same but for one thing: whether the hand-off is there before prefill's answer.
"""

from __future__ import annotations

import msgspec

from proxy.handoff.body import Body, Members
from proxy.handoff.connector import Connector, Handoff, Meeting, read_answer
from proxy.handoff.continuation import Continuation
from proxy.handoff.first_token import FirstToken

PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}

_encode = msgspec.json.Encoder().encode
_LONG = 4096  # tokens, estimated
_TRUE = msgspec.Raw(b"true")
_WITH_USAGE = msgspec.Raw(b'{"include_usage":true}')


class Leg(msgspec.Struct, frozen=True):
    """One upstream request: its path, its body, and headers beside the usual ones, as whole lines. The body comes in
    pieces: a long prompt is one by itself, and not copied."""

    path: str
    body: tuple[bytes | memoryview, ...]
    headers: bytes = b""


class Plan:
    """Prefill, then or meanwhile decode with the KV cache's address; or decode alone.

    Arguments:
        body: the client's.
        connector: the protocol both backends speak.
        continuation: where to go on, when a part of the answer has been given.
        meeting: what the legs are told of each other, where the connector `meets`.
        token_ids: ask decode for the ids of the tokens, so that the answer can be continued.
        first_token: have prefill sample the client's first token.
    Attributes:
        handoff: the hand-off, where it is known before prefill's answer.
    """

    __slots__ = (
        "_body",
        "_continuation",
        "_first_token",
        "_meeting",
        "_members",
        "_path",
        "_token_ids",
        "connector",
        "handoff",
    )

    def __init__(
        self,
        body: Body,
        connector: Connector,
        continuation: Continuation | None = None,
        *,
        meeting: Meeting | None = None,
        token_ids: bool = False,
        first_token: bool = False,
    ) -> None:
        self._body = body
        self.connector = connector
        self._continuation = continuation
        self._meeting = meeting
        self._token_ids = token_ids
        self._first_token = first_token
        self._path = PATHS[body.endpoint]
        self._members = body.members if continuation is None else continuation.apply(body.members, body.endpoint)
        self.handoff = None if meeting is None else meeting.handoff

    def prefill_leg(self) -> Leg:
        members = self.connector.prefill(self._members, self._body.endpoint, token=self._first_token)
        if self._meeting is not None:
            members.update(self._meeting.prefill)
        return self._leg(members)

    def behind(self, first: FirstToken) -> Plan:
        """The plan for what comes behind the token that prefill has given."""
        continuation = Continuation(b"%b,%b" % (first.prompt, first.token), 1)
        return Plan(self._body, self.connector, continuation, meeting=self._meeting, token_ids=self._token_ids)

    @property
    def continuation(self) -> Continuation | None:
        """Where its decode leg goes on."""
        return self._continuation

    def take(self, answer: bytes) -> tuple[Handoff | None, msgspec.Raw]:
        """Read prefill's answer: the hand-off (None when there is none) and the answer's `usage`.

        Raises:
            BackendGarbled: it is not an answer.
            HandoffInvalid: what it says would harm decode.
        """
        parsed = read_answer(answer)
        return self.handoff or self.connector.take(parsed), parsed.usage

    def decode_leg(self, handoff: Handoff | None) -> Leg:
        """The decode leg; without a hand-off the backend computes the prompt itself."""
        headers = b""
        if handoff is None:
            members = dict(self._members)
        else:
            members = self.connector.decode(self._members, handoff)
            headers = handoff.headers
        if self._token_ids:
            members["return_token_ids"] = _TRUE
        if self._body.stream and not self._body.wants_usage:
            # The engine's own count is the only right one (a chunk may hold several tokens); the relay takes the
            # extra event out again.
            members["stream_options"] = _with_usage(members.get("stream_options"))
        return self._leg(members, headers)

    def release_leg(self, handoff: Handoff, *, sent: bool) -> Leg | None:
        """A decode leg that has prefill free the blocks of a hand-off nobody wants; None where there is no safe one.

        Arguments:
            sent: a decode engine has had it, and has answered with an error.
        """
        members = self.connector.release(self._members, handoff, sent=sent)
        return None if members is None else self._leg(members, handoff.headers)

    def _leg(self, members: Members, headers: bytes = b"") -> Leg:
        if self._continuation is not None and self._body.endpoint == "chat":
            members = self._continuation.in_params(members)
        name = "messages" if self._body.endpoint == "chat" else "prompt"
        if self._body.prompt_tokens < _LONG or name not in members:
            return Leg(self._path, (_encode(members),), headers)
        rest = dict(members)
        prompt = memoryview(rest.pop(name))
        comma = "," if rest else ""
        return Leg(self._path, (_encode(rest)[:-1] + f'{comma}"{name}":'.encode(), prompt, b"}"), headers)


def _with_usage(options: msgspec.Raw | None) -> msgspec.Raw:
    """The client's stream options and `include_usage`; without it `continuous_usage_stats` had no effect either."""
    if options is None:
        return _WITH_USAGE
    members = msgspec.json.decode(options) or {}
    members.pop("continuous_usage_stats", None)
    return msgspec.Raw(_encode({**members, "include_usage": True}))
