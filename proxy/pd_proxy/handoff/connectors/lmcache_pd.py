"""LMCache's prefill-decode mode (LMCacheConnectorV1 with `enable_pd`): prefill writes to a decode engine.

Decode is chosen first, and its receiver's address is in prefill's leg (`disagg_spec`). When prefill's ranks have
written all chunks, each pushes a notice to the gateway; only then may decode begin, which finds the cache by the prompt
and is told nothing. From LMCache 0.5, `integration/vllm` and `storage_backend/pd_backend*.py`:

- A receiver knows a chunk's key from the moment its memory is set aside: a decode leg before the notice reads memory
  that is not written yet, and answers wrong.
- A key that is missing in `disagg_spec`, or a port for each of prefill's ranks, kills prefill's scheduler or worker.
- A cache that was written to one decode engine is on no other.
"""

from __future__ import annotations

from typing import Any

from pd_proxy.handoff.connector import Connector, Handoff, Rendezvous, params
from pd_proxy.handoff.coordinates import Coordinates
from pd_proxy.handoff.traits import Order, Traits


class LMCachePD(Connector):
    """LMCacheConnectorV1 with PDBackend."""

    traits = Traits(
        name="lmcache_pd",
        order=Order.NOTIFIED,
        negotiates=True,
        plain_prefill=False,  # a sender knows nobody to write to
        transferable=False,
    )

    def negotiate(self, prefill: Coordinates, decode: Coordinates, name: str, rank: int | None) -> Rendezvous:
        receiver: dict[str, Any] = {
            "req_id": name,
            "receiver_host": decode.host,
            "receiver_init_port": decode.init_ports,
            "receiver_alloc_port": decode.alloc_ports,
        }
        if decode.query_ports:
            receiver["receiver_query_port"] = decode.query_ports
        # Prefill's token is not asked for (`ret_first_tok`): decode samples it again, with the client's settings.
        return Rendezvous(params({"disagg_spec": receiver}), Handoff({}), notices=len(decode.init_ports))
