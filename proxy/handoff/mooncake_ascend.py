"""vllm-ascend's MooncakeConnectorV1 (pull), the connector of its Qwen3-235B tutorial on Atlas A3.

As `nixl.py` on the wire, with three differences (vllm-ascend, `mooncake_connector.py`): prefill keeps the blocks only
if its request ended because of its length, hence `min_tokens`; both legs must carry the same X-Request-Id, since
versions before `remote_request_id` pair by it; the blocks stay for 480 s.
"""

from __future__ import annotations

import msgspec

from proxy.errors import HandoffInvalid
from proxy.handoff.body import Endpoint, Members
from proxy.handoff.connector import ASK, Handoff, Name, Port, check, check_blocks, one_token


class MooncakeAscendParams(msgspec.Struct):
    """What decode needs of prefill's parameters; `remote_request_id` is absent before vllm-ascend 0.18."""

    do_remote_prefill: bool
    remote_block_ids: msgspec.Raw
    remote_engine_id: Name
    remote_host: Name
    remote_port: Port
    remote_request_id: Name | None = None


_required = msgspec.json.Decoder(MooncakeAscendParams)


class MooncakeAscend:
    """MooncakeConnectorV1 of vllm-ascend (pull)."""

    name = "mooncake_ascend"
    lease = 480.0  # VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT

    def prefill(self, members: Members, endpoint: Endpoint) -> Members:
        return {**one_token(members), "min_tokens": msgspec.Raw(b"1"), "kv_transfer_params": ASK}

    def handoff(self, params: msgspec.Raw) -> Handoff:
        checked = check(params, _required)
        if not checked.do_remote_prefill:
            raise HandoffInvalid("prefill's kv_transfer_params say do_remote_prefill: false")
        check_blocks(checked.remote_block_ids)
        return Handoff(params)

    def decode(self, members: Members, handoff: Handoff) -> Members:
        return {**members, "kv_transfer_params": handoff.params}
