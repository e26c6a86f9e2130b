"""vLLM's MooncakeConnector: prefill pushes to a decode engine that has requested it, so both legs are sent at once.

Decode gets the addresses of prefill's workers from prefill's bootstrap server, and requests the blocks of a
`transfer_id` from them. Only that id pairs the legs. Prefill's answer contains nothing of the hand-off. From vLLM 0.32,
`mooncake_connector.py`:

- Prefill keeps blocks only of a request that ended because of its length, hence no stop and `ignore_eos`.
- Aborting a prefill request before it was scheduled breaks a step of the connector, so a prefill leg is not cancelled.
- Decode does not learn that prefill has failed, so the flow ends the decode leg.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from pd_proxy.decoding import json_decoder
from pd_proxy.handoff.connector import Connector, Handoff, Name, Rendezvous, params, refused
from pd_proxy.handoff.coordinates import Coordinates
from pd_proxy.handoff.traits import Order, Traits
from pd_proxy.requests.endpoints import Members


class _Worker(msgspec.Struct):
    """The bootstrap server's entry for a data-parallel rank, which also has the addresses of its workers."""

    engine_id: Name


_Rank = Annotated[str, msgspec.Meta(pattern="^[0-9]{1,4}$")]
_read_workers = json_decoder(dict[_Rank, _Worker])


class Mooncake(Connector):
    """MooncakeConnector of vLLM."""

    traits = Traits(
        name="mooncake",
        fingerprints=frozenset({"MooncakeConnector"}),
        order=Order.CONCURRENT,
        negotiates=True,
        lease=480.0,  # VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT
        prefill_cancellable=False,
        release_by_refusal=True,
        port=8998,  # VLLM_MOONCAKE_BOOTSTRAP_PORT
    )

    def negotiate(self, prefill: Coordinates, decode: Coordinates, name: str, rank: int | None) -> Rendezvous:
        transfer = f"xfer-{name}"
        for_prefill = {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": transfer}
        for_decode = {
            "do_remote_decode": False,
            "do_remote_prefill": True,
            "remote_bootstrap_addr": f"http://{prefill.authority}",
            "remote_engine_id": prefill.engine_ids[rank or 0],
            "transfer_id": transfer,
        }
        return Rendezvous(params(for_prefill), Handoff(params(for_decode)))

    def release(self, members: Members, handoff: Handoff, *, sent: bool) -> Members | None:
        return refused(members, handoff)

    def info_url(self, coordinates: Coordinates) -> str:
        return f"http://{coordinates.authority}/query"

    def learn(self, coordinates: Coordinates, answer: bytes) -> Coordinates:
        workers = {int(rank): worker.engine_id for rank, worker in _read_workers(answer).items()}
        if sorted(workers) != list(range(max(1, len(workers)))):
            raise ValueError(f"not every data-parallel rank has registered: {sorted(workers)}")
        ids = tuple(workers[rank] for rank in range(len(workers)))
        return msgspec.structs.replace(coordinates, engine_ids=ids, dp=len(ids))
