"""The P2P tier of vLLM's OffloadingConnector: prefill stores its blocks in CPU memory under a name that both legs
carry, and decode fetches them by that name. Prefill's answer contains nothing of the hand-off. From vLLM 0.32,
`kv_offload/tiering/p2p`:

- The members are named after the *other* side: the prefill leg has `remote_decoder`.
- Blocks that are not fetched within 60 s (`unbound_store_timeout_s`) are dropped, and a later fetch is refused at once.
- Decode finds blocks by the hash of their tokens, and computes those that it does not get, so its answer cannot be
  wrong. But it waits up to 30 s for a prefill engine that has died.
- No leg can free blocks that will not be fetched.
"""

from __future__ import annotations

from pd_proxy.handoff.connector import Connector, Handoff, Rendezvous, params
from pd_proxy.handoff.coordinates import Coordinates
from pd_proxy.handoff.traits import Traits


class OffloadP2P(Connector):
    """OffloadingConnector of vLLM with a P2P tier."""

    traits = Traits(
        name="offload_p2p",
        negotiates=True,
        lease=60.0,  # unbound_store_timeout_s
        port=5710,  # VLLM_P2P_SIDE_CHANNEL_PORT; each data-parallel rank has the next one
    )

    def negotiate(self, prefill: Coordinates, decode: Coordinates, name: str, rank: int | None) -> Rendezvous:
        request = f"kv-{name}"
        source = {"kv_request_id": request, "remote_host": prefill.host, "remote_port": prefill.port + (rank or 0)}
        return Rendezvous(
            params({"remote_decoder": {"kv_request_id": request}}), Handoff(params({"remote_prefiller": source}))
        )
