"""A connector: what one hand-off protocol does differently from another.

A connector is data (`traits.py`) and small pure functions. It does no I/O, reads no clock and holds no state.
`plan.py` calls the functions; the flow reads the traits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, TypeVar

import msgspec

from pd_proxy.decoding import Undecodable
from pd_proxy.encoding import ABSENT, FALSE, TRUE, encode_json
from pd_proxy.errors import HandoffInvalid
from pd_proxy.handoff.answer import PrefillAnswer
from pd_proxy.handoff.blocks import check_blocks
from pd_proxy.handoff.coordinates import Announcement, Coordinates
from pd_proxy.handoff.first_token import FirstToken
from pd_proxy.handoff.traits import Traits
from pd_proxy.requests.endpoints import Endpoint, Members


class Handoff(msgspec.Struct, frozen=True):
    """What the decode leg carries so that its engine finds the KV cache.

    Attributes:
        members: members of the leg's body beside the client's. Those from prefill's answer are checked and passed on
            byte for byte.
        headers: header lines of the leg.
        prompt: token ids of the prompt from prefill, `1,2,3`; empty where decode tokenises the prompt itself.
        cached: tokens of the prompt that prefill found in its cache; None where it does not say.
    """

    members: Members
    headers: bytes = b""
    prompt: bytes = b""
    cached: int | None = None


class Rendezvous(msgspec.Struct, frozen=True):
    """The parameters of the two legs of one try, agreed on before either is sent.

    Attributes:
        prefill: members of the prefill leg, beside those of `Connector.prefill`.
        handoff: the hand-off; None where it comes with prefill's answer. Such a try is sequential, whatever the
            connector's order.
        id: the X-Request-Id of both legs, where the protocol gives it a form; else empty. It may name addresses, so
            clients get another one.
        notices: how many notifications with the try's name prefill's ranks send when the KV cache has arrived.
    """

    prefill: Members
    handoff: Handoff | None = None
    id: str = ""
    notices: int = 0


class Connector:
    """One hand-off protocol: its traits, and functions with what most of them do. Each is a subclass with one instance.

    Attributes:
        traits: what is constant about it.
    """

    traits: ClassVar[Traits] = Traits()

    @property
    def name(self) -> str:
        """Its name in the settings."""
        return self.traits.name

    def prefill(self, members: Members, endpoint: Endpoint, *, token: bool = False) -> Members:
        """The prefill leg's body: a new mapping.

        Arguments:
            token: the client is to be given the token that it samples; only with `first_token`.
        """
        return one_token(members)

    def negotiate(self, prefill: Coordinates, decode: Coordinates, name: str, rank: int | None) -> Rendezvous:
        """The parameters of both legs of one try, known before either is sent. Only with `Traits.negotiates`.

        Arguments:
            name: a name unique to the try, and its X-Request-Id unless the rendezvous has another. Only its last 16 hex
                digits are certainly not chosen by the client.
            rank: the data-parallel rank of prefill that the leg is sent to; None where there is only one.
        """
        raise NotImplementedError

    def per_prompt(self, rendezvous: Rendezvous, prompts: int, ranks: int) -> Rendezvous:
        """The rendezvous of a batch of prompts, each of which has a hand-off of its own.

        Arguments:
            prompts: the number of prompts.
            ranks: the number of prefill's data-parallel ranks.
        """
        return rendezvous

    def remember(self, coordinates: Coordinates, handoff: Handoff, rank: int | None) -> Coordinates:
        """Prefill's coordinates with what its answer adds to them, where the rendezvous had no hand-off; unchanged
        where the answer adds nothing. They are used until the engine may have been restarted."""
        return coordinates

    def take(self, answer: PrefillAnswer) -> Handoff | None:
        """The hand-off in prefill's answer; None where there is none. Only of sequential connectors, and where the
        rendezvous has no hand-off.

        Raises:
            HandoffInvalid: it is incomplete or of the wrong type. Sent on, it would kill the decode engine or leave
                the request waiting for ever.
        """
        raise NotImplementedError

    def whole(self, answer: PrefillAnswer) -> FirstToken | None:
        """Prefill's answer where it is the whole answer, so that there is no decode leg; else None.

        Raises:
            BackendGarbled: it is the whole answer, but lacks a member that clients need.
        """
        return None

    def decode(self, members: Members, handoff: Handoff) -> Members:
        """The decode leg's body with a hand-off: a new mapping, which the plan goes on to fill."""
        return {**members, **handoff.members}

    def release(self, members: Members, handoff: Handoff, *, sent: bool) -> Members | None:
        """The body of a decode leg that makes prefill free the blocks of a hand-off that no leg will read; None where
        no such leg is safe.

        It must not read blocks that may be free already: what it found there would stay in decode's prefix cache, as
        wrong text for every later prompt that begins alike.

        Arguments:
            sent: a decode engine has received the hand-off, and has answered with an error.
        """
        return None

    def info_url(self, coordinates: Coordinates) -> str:
        """The URL of the page on which a prefill engine states more of its coordinates; empty where there is none. An
        engine whose page does not answer gets no requests."""
        return ""

    def learn(self, coordinates: Coordinates, answer: bytes) -> Coordinates:
        """The coordinates of the settings, completed from the page at `info_url` or from one of `Traits.info_pages`.

        Raises:
            ValueError: the page is not one of such an engine.
        """
        raise NotImplementedError

    def callback_params(self, url: str) -> Rendezvous:
        """The parameters by which decode's engine calls the gateway back at `url`. Only with `Order.CALLED_BACK`."""
        raise NotImplementedError

    def read_callback(self, call: bytes) -> Members:
        """The members of prefill's leg, from the call of decode's engine. Only with `Order.CALLED_BACK`.

        Raises:
            HandoffInvalid: the call is not one of such an engine.
        """
        raise NotImplementedError

    def read_registration(self, message: bytes) -> Announcement:
        """The announcement in a registration. Only with `Traits.registers`.

        Raises:
            ValueError: the message is not a registration of such an engine.
        """
        raise NotImplementedError


class Unknown(Connector):
    """The connector of engines whose protocol is not known yet: they get plain requests and no hand-off."""


UNKNOWN = Unknown()


def params(values: Mapping[str, Any]) -> Members:
    """`kv_transfer_params` of these values, as a member of a leg."""
    return {"kv_transfer_params": msgspec.Raw(encode_json(values))}


_NO_PARAMS = (msgspec.Raw(), msgspec.Raw(b"null"), msgspec.Raw(b"{}"))


def given_params(answer: PrefillAnswer) -> msgspec.Raw | None:
    """`kv_transfer_params` of prefill's answer; None where there are none."""
    params = answer.kv_transfer_params
    return None if params is ABSENT or params in _NO_PARAMS else params


def refused(members: Members, handoff: Handoff) -> Members:
    """The body of a decode leg that releases a hand-off on vLLM. The engine's handler refuses it (min_tokens above
    max_tokens), and the refusal makes prefill free the blocks (`_with_kv_transfer_rejection_cleanup` in 0.32). Nothing
    is read or computed."""
    return {**one_token(members), "min_tokens": msgspec.Raw(b"2"), **handoff.members}


# Members that the prefill leg does not need. Its one token is dropped, so members that shape, report or stop output can
# be left out. All members that shape the *prompt* (messages, tools, tool_choice, template arguments, documents) must
# stay:
# decode reads the KV cache by position, so with another prompt its text would be wrong without an error.
_DROPPED = {
    "stream_options",  # refused by the engine when it does not stream
    "min_tokens",  # refused when above max_tokens
    "n",
    "stop",  # an early stop would end the request with a status for which some connectors keep no blocks
    "stop_token_ids",
    "repetition_detection",
    "logprobs",
    "top_logprobs",
    "structured_outputs",  # `response_format` stays, since some templates write it
    "return_token_ids",
}

_ONE = msgspec.Raw(b"1")


def one_token(members: Members) -> Members:
    """The members of a prefill leg before a connector adds its own: the same prompt, one token, not streamed."""
    leg = dict(members)
    if not _DROPPED.isdisjoint(members):
        for name in _DROPPED.intersection(members):
            del leg[name]
    leg["stream"] = FALSE
    leg["max_tokens"] = _ONE
    if "max_completion_tokens" in leg:  # for chat it overrides max_tokens
        leg["max_completion_tokens"] = _ONE
    leg["ignore_eos"] = TRUE
    return leg


def in_one_piece(members: Members) -> Members:
    """The members of a prefill leg whose first token is the client's, and whose engine ends it by itself: those of the
    client, not streamed."""
    leg = {name: value for name, value in members.items() if name != "stream_options"}
    leg["stream"] = FALSE
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
