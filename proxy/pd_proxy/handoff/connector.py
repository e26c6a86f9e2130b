"""What a connector is: the few things in which one hand-off protocol differs from another.

A connector is data and small pure functions; it does no I/O, reads no clock and holds no state. `plan.py` calls it.
What one of them cannot do safely is a property here, which the flow asks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import msgspec

from pd_proxy.decoding import Undecodable, json_decoder
from pd_proxy.errors import BackendGarbled, HandoffInvalid
from pd_proxy.handoff.blocks import check_blocks
from pd_proxy.handoff.coordinates import Announcement, Coordinates
from pd_proxy.handoff.first_token import FirstToken
from pd_proxy.requests.endpoints import COMMON, Endpoint, Members


class Handoff(msgspec.Struct, frozen=True):
    """What decode is told of the KV cache.

    Attributes:
        members: of its body, beside the client's; from prefill's answer they are checked, and word for word as they
            came.
        headers: whole lines.
        prompt: ids of the prompt as prefill has tokenised it, `1,2,3`; empty where decode is to do that itself.
        cached: how many tokens of the prompt prefill says were cached, for decode to tell; None where it does not.
    """

    members: Members
    headers: bytes = b""
    prompt: bytes = b""
    cached: int | None = None


class Rendezvous(msgspec.Struct, frozen=True):
    """What the two legs of one try are told of each other before either is sent.

    Attributes:
        prefill: members of the prefill leg, beside those that `Connector.prefill` leaves.
        handoff: what decode is told; None where that follows from prefill's answer. Such a try is sequential, whatever
            the connector's order.
        id: the X-Request-Id of both legs, where the protocol gives it a form; else empty. It may name addresses, so
            clients are shown another in its place.
        notices: how many notices with the try's name prefill's ranks send, by which the KV cache has arrived at decode.
    """

    prefill: Members
    handoff: Handoff | None = None
    id: str = ""
    notices: int = 0


_ABSENT = msgspec.Raw()


class PrefillAnswer(msgspec.Struct):
    """What is read of prefill's answer."""

    choices: msgspec.Raw = _ABSENT
    content: msgspec.Raw = _ABSENT
    output: msgspec.Raw = _ABSENT
    kv_transfer_params: msgspec.Raw = _ABSENT
    prompt_token_ids: msgspec.Raw = _ABSENT
    usage: msgspec.Raw = _ABSENT
    prompt_token_ids_b64: msgspec.Raw = _ABSENT


_decode_answer = json_decoder(PrefillAnswer)
_encode = msgspec.json.Encoder().encode


def read_answer(answer: bytes, member: str = "choices") -> PrefillAnswer:
    """Prefill's answer.

    Arguments:
        member: without which it is none (`Layout.answer`).
    Raises:
        BackendGarbled: it is none.
    """
    try:
        parsed = _decode_answer(answer)
    except Undecodable as error:
        raise BackendGarbled(f"prefill's answer is not one: {error}") from None
    if parsed.choices is _ABSENT and getattr(parsed, member) is _ABSENT:
        raise BackendGarbled(f"prefill's answer has no {member}")
    return parsed


class Connector:
    """One hand-off protocol: what holds for most of them. Each is a subclass, and has one instance.

    Attributes:
        name: as in the settings.
        order: whether decode's leg follows prefill's answer, or both are sent at once, since prefill waits for decode.
        meets: the legs are told of each other beforehand (`meet`).
        lease: seconds for which prefill keeps the blocks for a decode that does not come; `inf` where it keeps none. A
            hand-off older than that gives silently wrong text, so the flow stays far below it.
        first_token: it is known that decode may go on behind the token that prefill has sampled, with the same blocks.
        takes_ids: decode takes the prompt's ids from prefill's answer (`reuse.py`).
        continues: engines that speak it go on from token ids (`continuation.py`), so that streams can be resumed.
        plain_decode: a decode engine answers a request without hand-off right, from the prompt alone.
        plain_prefill: a prefill engine does.
        endpoints: those whose requests are split between prefill and decode; others are served whole.
        splits: reasons of `Body.alone` that are none here: its engines pair every part of such a request themselves.
        transferable: a hand-off that no decode engine has read may go to another than the one it was made for.
        own_ids: an X-Request-Id of the legs has a form of its own, of which a client's id can be no part.
        pairs_by_id: engines pair the legs by their request ids. Where such an id names the decode engine (a stored
            response), that leg goes to no other.
        prefill_may_be_cut: a prefill leg that is not wanted any more may be ended. Where not, it runs out.
        refused_release: engines refuse its `release` leg for what that says of tokens, and need not know the prompt.
        port: of `Coordinates`, where none is set.
        called_back: decode's leg goes first, and its engine calls the gateway back once it has memory for the KV cache
            (`invite`); prefill's leg waits for that, and says what the call said (`heard`). Of concurrent connectors.
        registers: its engines tell where their sides of the hand-off are, again and again (`announced`); one that does
            not can take part in no hand-off.
        waits: prefill sends notices (`Meeting.notices`), for which decode waits.
        pages: paths of a prefill engine's own HTTP port at which it tells more of its coordinates: the first that it
            has. As `inquiry`, for engines that need not be asked elsewhere.
        any_role: its engines do what a request asks, whatever role they were started in.
        may_miss: decode may find nothing of what was handed over, and compute the prompt, without anything being wrong.
        marks: by which an engine that speaks it is known (`fleet/health/fingerprints.py`): how vLLM's configuration
            calls it, how the names of series begin that it alone has, or another engine's name.
    """

    name: ClassVar[str]
    order: ClassVar[Literal["sequential", "concurrent"]] = "sequential"
    negotiates: ClassVar[bool] = False
    lease: ClassVar[float] = inf
    first_token: ClassVar[bool] = False
    takes_ids: ClassVar[bool] = False
    continues: ClassVar[bool] = True
    plain_decode: ClassVar[bool] = True
    plain_prefill: ClassVar[bool] = True
    endpoints: ClassVar[frozenset[Endpoint]] = COMMON
    splits: ClassVar[frozenset[str]] = frozenset()
    transferable: ClassVar[bool] = True
    own_ids: ClassVar[bool] = False
    pairs_by_id: ClassVar[bool] = False
    prefill_may_be_cut: ClassVar[bool] = True
    refused_release: ClassVar[bool] = False
    port: ClassVar[int] = 0
    called_back: ClassVar[bool] = False
    registers: ClassVar[bool] = False
    waits: ClassVar[bool] = False
    pages: ClassVar[tuple[str, ...]] = ()
    any_role: ClassVar[bool] = False
    may_miss: ClassVar[bool] = False
    marks: ClassVar[frozenset[str]] = frozenset()

    def prefill(self, members: Members, endpoint: Endpoint, *, token: bool = False) -> Members:
        """The prefill leg's body: a new mapping.

        Arguments:
            token: the client is to be given the token that it samples; only with `first_token`.
        """
        return one_token(members)

    def negotiate(self, prefill: Coordinates, decode: Coordinates, name: str, rank: int | None) -> Rendezvous:
        """What the legs of one try are told of each other; only with `meets`.

        Arguments:
            name: unique to the try; its X-Request-Id, if the meeting gives no other. What is before its last 16 hex
                digits may be a client's choice.
            rank: the data-parallel rank of prefill that the leg is sent to, or None where there is but one.
        """
        raise NotImplementedError

    def apart(self, rendezvous: Rendezvous, prompts: int, ranks: int) -> Rendezvous:
        """A meeting of a batch of prompts, each of which the engines answer by itself.

        Arguments:
            ranks: how many data-parallel ranks prefill has.
        """
        return rendezvous

    def remember(self, coordinates: Coordinates, handoff: Handoff, rank: int | None) -> Coordinates:
        """Prefill's coordinates with what its answer says of them, where a meeting could not say the hand-off; as they
        are where that is nothing. They hold until there is cause to think that the engine is another."""
        return coordinates

    def take(self, answer: PrefillAnswer) -> Handoff | None:
        """What decode is told, from prefill's answer; None when that says nothing. Only of sequential connectors, and
        where the meeting did not say it.

        Raises:
            HandoffInvalid: it is incomplete or of the wrong type. Sent on, it would kill the decode engine or leave
                the request waiting for ever.
        """
        raise NotImplementedError

    def whole(self, answer: bytes) -> FirstToken | None:
        """Prefill's answer where it is all there is to say, so that decode is not asked; else None.

        Raises:
            BackendGarbled: it would be, but lacks what a client must be told.
        """
        return None

    def decode(self, members: Members, handoff: Handoff) -> Members:
        """The decode leg's body with a hand-off: a new mapping, which the plan goes on to fill."""
        return {**members, **handoff.members}

    def release(self, members: Members, handoff: Handoff, *, sent: bool) -> Members | None:
        """The body of a decode leg that has prefill free the blocks of a hand-off nobody wants; None where there is no
        safe one.

        It must not read blocks that may be free already: what it found there would stay in decode's prefix cache, as
        wrong text for every later prompt that begins alike.

        Arguments:
            sent: a decode engine has had it, and has answered with an error.
        """
        return None

    def inquiry(self, coordinates: Coordinates) -> str:
        """The URL at which a prefill engine tells more of its coordinates; empty where there is none. An engine that
        does not answer there takes no requests."""
        return ""

    def learn(self, coordinates: Coordinates, answer: bytes) -> Coordinates:
        """The coordinates, as people set them, with what `inquiry` answered, or one of the `pages`.

        Raises:
            ValueError: that is not what such an engine says.
        """
        raise NotImplementedError

    def invite(self, url: str) -> Rendezvous:
        """What decode is told so that its engine calls back at `url`. Only with `called_back`."""
        raise NotImplementedError

    def heard(self, call: bytes) -> Members:
        """The members by which prefill's leg says what decode's engine has called back with; only with `called_back`.

        Raises:
            HandoffInvalid: that is not what such an engine says.
        """
        raise NotImplementedError

    def announced(self, message: bytes) -> Announcement:
        """What an engine says of itself in a registration; only with `registers`.

        Raises:
            ValueError: that is not what such an engine says.
        """
        raise NotImplementedError


class Unknown(Connector):
    """What engines speak of whom that is not known yet: they are sent plain requests, and no hand-off."""

    name = ""


UNKNOWN = Unknown()


def params(values: Mapping[str, Any]) -> Members:
    """`kv_transfer_params` of these values, as a member of a leg."""
    return {"kv_transfer_params": msgspec.Raw(_encode(values))}


_NO_PARAMS = (msgspec.Raw(), msgspec.Raw(b"null"), msgspec.Raw(b"{}"))


def given_params(answer: PrefillAnswer) -> msgspec.Raw | None:
    """`kv_transfer_params` of prefill's answer; None where there are none."""
    params = answer.kv_transfer_params
    return None if params is _ABSENT or params in _NO_PARAMS else params


def refused(members: Members, handoff: Handoff) -> Members:
    """The body of a decode leg that releases a hand-off on vLLM: its handler refuses it (min_tokens above max_tokens),
    and by that alone tells prefill to free the blocks (`_with_kv_transfer_rejection_cleanup` in 0.32): nothing is read,
    nothing computed."""
    return {**one_token(members), "min_tokens": msgspec.Raw(b"2"), **handoff.members}


# What the prefill leg does without. Its one token is thrown away, so nothing that shapes, reports or stops output is
# needed; all that shapes the *prompt* (messages, tools, tool_choice, template arguments, documents) must stay, since
# decode reads the KV cache by position and another prompt would mean silently wrong text.
_DROPPED = {
    "stream_options",  # refused by the engine when it does not stream
    "min_tokens",  # refused when above max_tokens
    "n",
    "stop",  # an early stop would end the request with a status for which some connectors keep no blocks
    "stop_token_ids",
    "repetition_detection",
    "logprobs",
    "top_logprobs",
    "structured_outputs",  # a grammar compiled for a token nobody sees; `response_format` some templates render
    "return_token_ids",
}

_ONE = msgspec.Raw(b"1")
_TRUE = msgspec.Raw(b"true")
_FALSE = msgspec.Raw(b"false")


def one_token(members: Members) -> Members:
    """The members of a prefill leg before a connector adds its own: the same prompt, one token, not streamed."""
    leg = dict(members)
    if not _DROPPED.isdisjoint(members):
        for name in _DROPPED.intersection(members):
            del leg[name]
    leg["stream"] = _FALSE
    leg["max_tokens"] = _ONE
    if "max_completion_tokens" in leg:  # for chat it wins over max_tokens
        leg["max_completion_tokens"] = _ONE
    leg["ignore_eos"] = _TRUE
    return leg


def in_one_piece(members: Members) -> Members:
    """The members of a prefill leg whose first token is the client's, and whose engine knows by itself where to end:
    the client's, not streamed."""
    leg = {name: value for name, value in members.items() if name != "stream_options"}
    leg["stream"] = _FALSE
    return leg


ASK = msgspec.Raw(
    b'{"do_remote_decode":true,"do_remote_prefill":false,"remote_engine_id":null,"remote_block_ids":null,'
    b'"remote_host":null,"remote_port":null}'
)
"""The `kv_transfer_params` by which the pull connectors ask prefill to keep its blocks for a decode elsewhere."""

Name = Annotated[str, msgspec.Meta(min_length=1)]
Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]


class PullParams(msgspec.Struct, kw_only=True):
    """What every connector by which decode pulls needs of prefill's parameters."""

    do_remote_prefill: bool
    remote_block_ids: msgspec.Raw
    remote_engine_id: Name
    remote_host: Name
    remote_port: Port
    remote_prefill_cached_tokens: Any = None


P = TypeVar("P", bound=PullParams)


def pulled(params: msgspec.Raw, required: Callable[[msgspec.Raw], P]) -> Handoff:
    """The hand-off of a pull connector.

    Arguments:
        required: decodes what the connector demands.
    Raises:
        HandoffInvalid: something is missing or of the wrong type.
    """
    try:
        checked = required(params)
    except Undecodable as error:
        raise HandoffInvalid(f"prefill's kv_transfer_params are not usable: {error}") from None
    if not checked.do_remote_prefill:
        raise HandoffInvalid("prefill's kv_transfer_params say do_remote_prefill: false")
    check_blocks(checked.remote_block_ids)
    cached = checked.remote_prefill_cached_tokens
    return Handoff({"kv_transfer_params": params}, cached=cached if type(cached) is int and cached >= 0 else None)
