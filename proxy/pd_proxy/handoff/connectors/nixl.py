"""vLLM's NixlConnector in pull mode: prefill answers with the address of its blocks, and decode reads them by RDMA.

Member names are those of vLLM 0.32, `nixl/pull_scheduler.py`. Decode's scheduler does not check them: without block ids
the engine dies on an assertion, and without one of the others the request waits for ever. So all are required here.
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
    """The members of prefill's parameters that decode needs. Others are passed on."""

    remote_request_id: Name
    tp_size: Annotated[int, msgspec.Meta(ge=1)]


_required = json_decoder(NixlParams)


class Nixl(Connector):
    """NixlConnector (pull)."""

    traits = Traits(
        name="nixl",
        lease=30.0,  # kv_lease_duration
        fingerprints=frozenset({"NixlConnector", "NixlPullConnector", "vllm:nixl_"}),
        first_token=True,  # prefill keeps the blocks however its request ended, and decode reads them by position
        release_by_refusal=True,
        any_role=True,  # an engine finds its role in the parameters of the leg
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
