"""vllm-ascend's MooncakeConnectorV1 (pull), the connector of its Qwen3-235B tutorial on Atlas A3.

The protocol is that of `nixl.py`, with three differences (vllm-ascend, `mooncake_connector.py`):

- Prefill keeps the blocks only if its request ended because of its length, hence `min_tokens`.
- Both legs must carry the same X-Request-Id, since versions without `remote_request_id` pair the legs by it.
- Prefill keeps the blocks for 480 s.
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
        # `first_token` is off: prefill keeps no blocks of a request that ended by itself, and the rest was not tried.
        # `release_by_refusal` is off: decode serves the leg of `release` and reads the blocks, so it needs the prompt.
    )

    def prefill(self, members: Members, endpoint: Endpoint, *, token: bool = False) -> Members:
        return {**one_token(members), "min_tokens": msgspec.Raw(b"1"), "kv_transfer_params": ASK}

    def take(self, answer: PrefillAnswer) -> Handoff | None:
        params = given_params(answer)
        return None if params is None else pulled(params, _required)

    def release(self, members: Members, handoff: Handoff, *, sent: bool) -> Members | None:
        # Decode reads the blocks for one token, and prefill then frees them. Those of a sent hand-off may be free
        # already.
        return None if sent else {**one_token(members), **handoff.members}
