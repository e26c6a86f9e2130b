"""What is constant about one hand-off protocol: the traits of a connector."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from math import inf

from pd_proxy.requests.endpoints import COMMON, Endpoint


class Order(Enum):
    """In which order the two legs of a request are sent."""

    SEQUENTIAL = "sequential"
    """Decode's leg follows prefill's answer."""
    CONCURRENT = "concurrent"
    """Both legs are sent at once, since prefill waits for decode."""
    CALLED_BACK = "called_back"
    """Decode's leg is sent first. Its engine calls the gateway back when it has memory for the KV cache, and prefill's
    leg carries what that call says."""
    NOTIFIED = "notified"
    """Decode's leg follows prefill's answer and the notifications by which prefill's ranks say that the KV cache has
    arrived at the decode engine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """The constants of one connector. The defaults hold for most of them.

    Attributes:
        name: the connector's name in the settings.
        order: the order of the legs.
        negotiates: the parameters of both legs are known before either is sent (`Connector.negotiate`).
        lease: seconds for which prefill keeps the blocks for a decode leg that does not come; `inf` where it keeps
            none. Decode would read wrong text from an older hand-off, so the flow stays far below this.
        first_token: decode can continue behind the token that prefill has sampled, with the same blocks; verified.
        reuses_prompt_ids: decode takes the prompt's token ids from prefill's answer (`reuse.py`).
        resumable: the engines can continue from token ids (`continuation.py`), so a broken stream can be resumed.
        plain_decode: a decode engine answers a request without a hand-off correctly, from the prompt alone.
        plain_prefill: a prefill engine does so.
        endpoints: the endpoints whose requests are split between prefill and decode. Others are served by one engine.
        splittable: the reasons of `Body.unsplittable` for which these engines can split a request all the same.
        transferable: a hand-off that no decode engine has read may go to another one than it was made for.
        own_request_ids: the legs' X-Request-Id has a form of its own, so no part of it can come from the client.
        pairs_by_id: the engines pair the legs by their request ids. Where such an id names the decode engine (a stored
            response), the decode leg goes to no other.
        prefill_cancellable: a prefill leg that is no longer wanted may be cancelled. Where not, it runs to its end.
        release_by_refusal: an engine refuses the leg of `Connector.release` for its token bounds, and that frees the
            blocks, so the leg needs no prompt.
        port: the default of `Coordinates.port`.
        registers: the engines announce periodically where their sides of the hand-off are
            (`Connector.read_registration`). One that does not takes part in no hand-off.
        info_pages: paths of a prefill engine's own HTTP port, the newest first, of which the first that exists tells
            more of its coordinates (`Connector.learn`).
        any_role: the engines serve both kinds of leg, in whatever role they were started.
        may_miss: decode may find nothing of the hand-off and compute the prompt, which is no error.
        called_back: the order is `CALLED_BACK`.
        notified: the order is `NOTIFIED`.
        fingerprints: how engines that speak the protocol name it (`fleet/health/fingerprints.py`): the connector in
            vLLM's configuration, the beginning of metric names that it alone has, or another engine's name.
    """

    name: str = ""
    order: Order = Order.SEQUENTIAL
    negotiates: bool = False
    lease: float = inf
    first_token: bool = False
    reuses_prompt_ids: bool = False
    resumable: bool = True
    plain_decode: bool = True
    plain_prefill: bool = True
    endpoints: frozenset[Endpoint] = COMMON
    splittable: frozenset[str] = frozenset()
    transferable: bool = True
    own_request_ids: bool = False
    pairs_by_id: bool = False
    prefill_cancellable: bool = True
    release_by_refusal: bool = False
    port: int = 0
    registers: bool = False
    info_pages: tuple[str, ...] = ()
    any_role: bool = False
    may_miss: bool = False
    fingerprints: frozenset[str] = frozenset()

    called_back: bool = field(init=False)
    notified: bool = field(init=False)

    def __post_init__(self) -> None:
        # Plain attributes, since they are read for each request.
        object.__setattr__(self, "called_back", self.order is Order.CALLED_BACK)
        object.__setattr__(self, "notified", self.order is Order.NOTIFIED)
