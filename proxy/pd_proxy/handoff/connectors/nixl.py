"""vLLM's NixlConnector in pull mode: prefill answers with its blocks' address, decode reads them by RDMA.

Fields as in vLLM 0.32, `nixl/pull_scheduler.py`. Decode's scheduler trusts them: without block ids its engine dies
on an assertion, without one of the others the request waits for ever, so all are demanded here.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from pd_proxy.decoding import json_decoder
from pd_proxy.handoff.answer import PrefillAnswer
from pd_proxy.handoff.connector import (
    ASK,
    Connector,
    Handoff,
    Name,
    PullParams,
    given_params,
    one_token,
    pulled,
    refused,
)
from pd_proxy.handoff.first_token import sampled_token
from pd_proxy.handoff.traits import Traits
from pd_proxy.requests.endpoints import Endpoint, Members


class NixlParams(PullParams):
    """What decode needs of prefill's parameters; they may hold more, which is passed on."""

    remote_request_id: Name
    tp_size: Annotated[int, msgspec.Meta(ge=1)]


_required = json_decoder(NixlParams)


class Nixl(Connector):
    """NixlConnector (pull)."""

    traits = Traits(
        name="nixl",
        lease=30.0,  # kv_lease_duration
        fingerprints=frozenset({"NixlConnector", "NixlPullConnector", "vllm:nixl_"}),
        first_token=True,  # it keeps the blocks however prefill's request ended, and reads them by position
        release_by_refusal=True,
        any_role=True,  # of the two legs' parameters alone it knows which it is
        reuses_prompt_ids=True,
        port=5600,  # VLLM_NIXL_SIDE_CHANNEL_PORT
    )

    def prefill(self, members: Members, endpoint: Endpoint, *, token: bool = False) -> Members:
        leg = sampled_token(members) if token else one_token(members)
        leg["kv_transfer_params"] = ASK
        return leg

    def take(self, answer: PrefillAnswer) -> Handoff | None:
        params = given_params(answer)
        return None if params is None else pulled(params, _required)

    def release(self, members: Members, handoff: Handoff, *, sent: bool) -> Members | None:
        return refused(members, handoff)
