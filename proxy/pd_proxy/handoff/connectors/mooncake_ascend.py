"""vllm-ascend's MooncakeConnectorV1 (pull), the connector of its Qwen3-235B tutorial on Atlas A3.

As `nixl.py` on the wire, with three differences (vllm-ascend, `mooncake_connector.py`): prefill keeps the blocks only
if its request ended because of its length, hence `min_tokens`; both legs must carry the same X-Request-Id, since
versions before `remote_request_id` pair by it; the blocks stay for 480 s.
"""

from __future__ import annotations

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
)
from pd_proxy.handoff.traits import Traits
from pd_proxy.requests.endpoints import Endpoint, Members


class MooncakeAscendParams(PullParams):
    """What decode needs of prefill's parameters; `remote_request_id` is absent before vllm-ascend 0.18."""

    remote_request_id: Name | None = None


_required = json_decoder(MooncakeAscendParams)


class MooncakeAscend(Connector):
    """MooncakeConnectorV1 of vllm-ascend (pull)."""

    traits = Traits(
        name="mooncake_ascend",
        fingerprints=frozenset({"MooncakeConnectorV1", "MooncakeHybridConnector"}),
        pairs_by_id=True,  # before remote_request_id
        lease=480.0,  # VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT
        # `first_token` stays off: it keeps no blocks of a request that ended by itself; the rest has not been tried.
        # `release_by_refusal` too: its release is served, since decode reads the blocks, so the prompt must be theirs.
    )

    def prefill(self, members: Members, endpoint: Endpoint, *, token: bool = False) -> Members:
        return {**one_token(members), "min_tokens": msgspec.Raw(b"1"), "kv_transfer_params": ASK}

    def take(self, answer: PrefillAnswer) -> Handoff | None:
        params = given_params(answer)
        return None if params is None else pulled(params, _required)

    def release(self, members: Members, handoff: Handoff, *, sent: bool) -> Members | None:
        # Decode reads the blocks for one token, and prefill frees what was read. One that was sent may be free already.
        return None if sent else {**one_token(members), **handoff.members}
