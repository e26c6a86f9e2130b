"""vllm-ascend's MooncakeLayerwiseConnector: decode goes first, and prefill pushes to it, layer by layer.

Decode's engine queues the request, gives it blocks, and then posts them and its own coordinates to the `metaserver`
that its leg names: the gateway. The prefill leg says the same, and prefill writes into those blocks as it computes.
From `mooncake_layerwise_connector.py` and its example proxy:

- The two engines know a request by its external id, so both legs have one X-Request-Id and one path.
- Prefill's scheduler reads `remote_cached_tokens` without a default: an engine that lacks it dies.
- Decode keeps the blocks of a request that was aborted while it waits until prefill says that it is done (vLLM's
  scheduler frees them no sooner, since they may still be written to). Hence a prefill leg that was sent runs out.
- Decode posts a second time when the first post did not get through; there is nothing more in it.
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
    """What decode's engine says of itself: what every prefill engine needs of it, and the types of what some do."""

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
        endpoints=frozenset({"chat", "completions", "messages"}),  # others' ids have a form that no call is known by
        order=Order.CALLED_BACK,
        own_request_ids=True,  # what engines call back with is nothing that a client could guess
        prefill_cancellable=False,
    )

    def prefill(self, members: Members, endpoint: Endpoint, *, token: bool = False) -> Members:
        return {**one_token(members), "min_tokens": msgspec.Raw(b"1")}

    def callback_params(self, url: str) -> Rendezvous:
        told = {"do_remote_decode": False, "do_remote_prefill": True, "metaserver": url}
        return Rendezvous({}, Handoff(params(told)))

    def read_callback(self, call: bytes) -> Members:
        try:
            said, members = _read(call), _read_members(call)
        except Undecodable as error:
            raise HandoffInvalid(f"decode's call back is not usable: {error}") from None
        if not said.do_remote_decode or said.do_remote_prefill:
            raise HandoffInvalid("decode's call back does not ask for a remote decode")
        check_blocks(said.remote_block_ids)
        # What only newer engines know of begins alike; anything else might say more than where the blocks are.
        foreign = [name for name in members if name not in _Call.__struct_fields__ and not name.startswith("remote_")]
        if foreign:
            raise HandoffInvalid(f"decode's call back says more than where its blocks are: {foreign[0][:64]!r}")
        return {"kv_transfer_params": msgspec.Raw(encode_json(members))}
