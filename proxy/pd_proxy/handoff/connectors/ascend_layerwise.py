"""vllm-ascend's MooncakeLayerwiseConnector: the decode leg is sent first, and prefill pushes the KV cache layer by
layer.

Decode's engine queues the request, allocates blocks, and posts these and its own coordinates to the `metaserver` in its
leg, which is the gateway. The prefill leg carries the content of that call, and prefill writes into the blocks while it
computes. From `mooncake_layerwise_connector.py` and its example proxy:

- Both engines identify a request by its external id, so both legs have the same X-Request-Id and path.
- Prefill's scheduler reads `remote_cached_tokens` without a default: without it the engine dies.
- Where a request is aborted while decode waits, decode keeps its blocks until prefill reports that it is done, since
  prefill may still write to them. So a prefill leg that was sent is not cancelled.
- Decode posts again when the first post has failed. The second call has the same content.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from pd_proxy.decoding import Undecodable, json_decoder
from pd_proxy.encoding import encode_json
from pd_proxy.errors import HandoffInvalid
from pd_proxy.handoff.blocks import BlockId, check_blocks
from pd_proxy.handoff.connector import Connector, Handoff, Name, Port, Rendezvous, one_token, params
from pd_proxy.handoff.traits import Order, Traits
from pd_proxy.requests.endpoints import Endpoint, Members

_Count = Annotated[int, msgspec.Meta(ge=0)]
_Size = Annotated[int, msgspec.Meta(ge=1)]


class _Call(msgspec.Struct):
    """The call of decode's engine: the members that all prefill engines need, and the types of those that some need."""

    request_id: Name
    do_remote_decode: bool
    do_remote_prefill: bool
    remote_block_ids: msgspec.Raw
    remote_engine_id: Name
    remote_host: Name
    remote_port: Port
    remote_cached_tokens: _Count
    remote_tp_size: _Size
    remote_pcp_size: _Size = 1
    remote_dcp_size: _Size = 1
    remote_block_size: list[_Size] | _Size | None = None
    remote_te_rpc_port: Port | None = None
    token_ids: list[BlockId] = []


_read = json_decoder(_Call)
_read_members = json_decoder(dict[str, msgspec.Raw])


class AscendLayerwise(Connector):
    """MooncakeLayerwiseConnector of vllm-ascend (push)."""

    traits = Traits(
        name="ascend_layerwise",
        endpoints=frozenset({"chat", "completions", "messages"}),  # for the others the call's id has another form
        order=Order.CALLED_BACK,
        own_request_ids=True,  # so that clients cannot guess the ids with which engines call back
        prefill_cancellable=False,
    )

    def prefill(self, members: Members, endpoint: Endpoint, *, token: bool = False) -> Members:
        return {**one_token(members), "min_tokens": msgspec.Raw(b"1")}

    def callback_params(self, url: str) -> Rendezvous:
        for_decode = {"do_remote_decode": False, "do_remote_prefill": True, "metaserver": url}
        return Rendezvous({}, Handoff(params(for_decode)))

    def read_callback(self, call: bytes) -> Members:
        try:
            checked, members = _read(call), _read_members(call)
        except Undecodable as error:
            raise HandoffInvalid(f"decode's call back is not usable: {error}") from None
        if not checked.do_remote_decode or checked.do_remote_prefill:
            raise HandoffInvalid("decode's call back does not ask for a remote decode")
        check_blocks(checked.remote_block_ids)
        # Members that newer engines have added begin with `remote_`. Others might be more than the blocks' addresses.
        foreign = [name for name in members if name not in _Call.__struct_fields__ and not name.startswith("remote_")]
        if foreign:
            raise HandoffInvalid(f"decode's call back says more than where its blocks are: {foreign[0][:64]!r}")
        return {"kv_transfer_params": msgspec.Raw(encode_json(members))}
