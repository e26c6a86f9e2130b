"""What a connector is: the few things in which one hand-off protocol differs from another.

A connector is data and small pure functions; it does no I/O, reads no clock and holds no state. `plan.py` calls it.
"""

from __future__ import annotations

from typing import Annotated, Protocol, TypeVar

import msgspec

from proxy.errors import HandoffInvalid
from proxy.handoff.body import Endpoint, Members


class Handoff(msgspec.Struct, frozen=True):
    """Where decode finds the KV cache: prefill's `kv_transfer_params`, checked, and word for word as they came."""

    params: msgspec.Raw


class Connector(Protocol):
    """One hand-off protocol.

    Attributes:
        name: as in the settings.
        lease: seconds for which prefill keeps the blocks for a decode that does not come. A hand-off older than
            that gives silently wrong text, so the flow stays far below it.
        first_token: it is known that decode may go on behind the token that prefill has sampled, with the same blocks.
    """

    @property
    def name(self) -> str: ...

    @property
    def lease(self) -> float: ...

    @property
    def first_token(self) -> bool: ...

    def prefill(self, members: Members, endpoint: Endpoint, *, token: bool = False) -> Members:
        """The prefill leg's body.

        Arguments:
            token: the client is to be given the token that it samples; only with `first_token`.
        """

    def handoff(self, params: msgspec.Raw) -> Handoff:
        """Check prefill's parameters.

        Raises:
            HandoffInvalid: they are incomplete or of the wrong type. Sent on, they would kill the decode engine or
                leave the request waiting for ever.
        """

    def decode(self, members: Members, handoff: Handoff) -> Members:
        """The decode leg's body with a hand-off: a new mapping, which the plan goes on to fill."""

    def release(self, members: Members, handoff: Handoff, *, sent: bool) -> Members | None:
        """The body of a decode leg that has prefill free the blocks of a hand-off nobody wants; None where there is no
        safe one.

        It must not read blocks that may be free already: what it found there would stay in decode's prefix cache, as
        wrong text for every later prompt that begins alike.

        Arguments:
            sent: a decode engine has had it, and has answered with an error.
        """


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
    "response_format",  # a grammar compiled for a token nobody sees
    "structured_outputs",
    "return_token_ids",
}

_ONE = msgspec.Raw(b"1")
_TRUE = msgspec.Raw(b"true")
_FALSE = msgspec.Raw(b"false")


def one_token(members: Members) -> Members:
    """The members of a prefill leg before a connector adds its own: the same prompt, one token, not streamed."""
    leg = dict(members)
    for name in _DROPPED & members.keys():
        del leg[name]
    leg["stream"] = _FALSE
    leg["max_tokens"] = _ONE
    if "max_completion_tokens" in leg:  # for chat it wins over max_tokens
        leg["max_completion_tokens"] = _ONE
    leg["ignore_eos"] = _TRUE
    return leg


ASK = msgspec.Raw(
    b'{"do_remote_decode":true,"do_remote_prefill":false,"remote_engine_id":null,"remote_block_ids":null,'
    b'"remote_host":null,"remote_port":null}'
)
"""The `kv_transfer_params` by which the pull connectors ask prefill to keep its blocks for a decode elsewhere."""

BlockId = Annotated[int, msgspec.Meta(ge=0)]
Name = Annotated[str, msgspec.Meta(min_length=1)]
Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]

_decode_groups = msgspec.json.Decoder(list[list[BlockId]]).decode  # one list a KV cache group
_decode_flat = msgspec.json.Decoder(list[BlockId]).decode  # engines before 0.2x


class PullParams(msgspec.Struct):
    """What every connector by which decode pulls needs of prefill's parameters."""

    do_remote_prefill: bool
    remote_block_ids: msgspec.Raw
    remote_engine_id: Name
    remote_host: Name
    remote_port: Port


P = TypeVar("P", bound=PullParams)


def pulled(params: msgspec.Raw, required: msgspec.json.Decoder[P]) -> Handoff:
    """The hand-off of a pull connector.

    Arguments:
        required: decodes what the connector demands.
    Raises:
        HandoffInvalid: something is missing or of the wrong type.
    """
    try:
        checked = required.decode(params)
    except msgspec.MsgspecError as error:
        raise HandoffInvalid(f"prefill's kv_transfer_params are not usable: {error}") from None
    if not checked.do_remote_prefill:
        raise HandoffInvalid("prefill's kv_transfer_params say do_remote_prefill: false")
    check_blocks(checked.remote_block_ids)
    return Handoff(params)


def check_blocks(ids: msgspec.Raw) -> None:
    """Raise `HandoffInvalid` unless `ids` names at least one block, in either of the two shapes engines use."""
    try:
        some = any(_decode_groups(ids))
    except msgspec.MsgspecError:
        try:
            some = bool(_decode_flat(ids))
        except msgspec.MsgspecError as error:
            raise HandoffInvalid(f"prefill's remote_block_ids are not usable: {error}") from None
    if not some:
        raise HandoffInvalid("prefill's remote_block_ids name no block")
