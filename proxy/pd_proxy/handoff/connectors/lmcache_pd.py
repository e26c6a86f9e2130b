"""LMCache's prefill-decode mode (LMCacheConnectorV1 with `enable_pd`): prefill writes to a decode engine.

Decode is chosen first, and the address of its receiver is in prefill's leg (`disagg_spec`). When prefill's ranks have
written all chunks, each sends a notification to the gateway. Only then may the decode leg begin. It carries no
parameters, since decode finds the KV cache by the prompt. From LMCache 0.5, `integration/vllm` and
`storage_backend/pd_backend*.py`:

- A receiver has the key of a chunk as soon as its memory is allocated. A decode leg before the notification would read
  memory that is not written yet, and give a wrong answer.
- A missing key in `disagg_spec`, or fewer ports than prefill's ranks, kills prefill's scheduler or worker.
- A KV cache that was written to one decode engine is on no other.
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
        plain_prefill=False,  # a sender without a receiver has nowhere to write
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
        # Prefill's token is not requested (`ret_first_tok`): decode samples it again, with the client's parameters.
        return Rendezvous(params({"disagg_spec": receiver}), Handoff({}), notices=len(decode.init_ports))
