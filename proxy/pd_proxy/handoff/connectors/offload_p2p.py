"""The P2P tier of vLLM's OffloadingConnector: prefill parks its blocks in CPU memory under a name that both legs are
told, and decode fetches them by it. Nothing comes back in prefill's answer. From vLLM 0.32, `kv_offload/tiering/p2p`:

- The sub-dictionaries are named for the *other* side: prefill is told of its `remote_decoder`.
- What is not fetched within 60 s (`unbound_store_timeout_s`) is dropped, and a later fetch is refused at once.
- Decode finds blocks by the hash of their tokens: what it does not get it computes, so nothing can be wrong; but it
  waits up to 30 s for an engine that is gone.
- There is no leg that frees what nobody will fetch.
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
