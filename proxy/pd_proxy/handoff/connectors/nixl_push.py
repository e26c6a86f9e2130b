"""vLLM's NixlPushConnector: prefill writes into blocks that decode has registered with it, so both legs are sent at
once.

To register, decode needs the id, the side channel and the ranks of the prefill engine. Where the settings do not
contain them, the first try with a prefill engine is sequential, since prefill's answer contains them (`remember`). From
vLLM 0.32, `nixl/push_scheduler.py` and `push_worker.py`:

- Legs are paired by their request ids without a random suffix, so both have one X-Request-Id; in newer engines by
  `transfer_id`.
- Decode's scheduler reads the parameters without defaults: a missing member kills the engine.
- Decode does not learn that prefill has failed, so the flow ends the decode leg. Decode frees its blocks only after
  prefill has written to them, so a prefill leg that is no longer needed is not cancelled.
- Where a decode leg ends before it has registered, prefill does not learn of it. Prefill's blocks stay until the lease
  ends, and no leg can free them.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from pd_proxy.decoding import Undecodable, json_decoder
from pd_proxy.handoff.answer import PrefillAnswer
from pd_proxy.handoff.connector import (
    Connector,
    Handoff,
    Name,
    Port,
    Rendezvous,
    given_params,
    params,
    pulled,
)
from pd_proxy.handoff.connectors.nixl import NixlParams
from pd_proxy.handoff.coordinates import Coordinates
from pd_proxy.handoff.traits import Order, Traits

_Count = Annotated[int, msgspec.Meta(ge=1)]


class _Place(msgspec.Struct):
    """The coordinates of the prefill engine's rank in its answer."""

    remote_engine_id: Name
    remote_host: Name
    remote_port: Port
    tp_size: _Count
    pp_size: _Count = 1


_required = json_decoder(NixlParams)
_read_place = json_decoder(_Place)


class NixlPush(Connector):
    """NixlPushConnector of vLLM."""

    traits = Traits(
        name="nixl_push",
        order=Order.CONCURRENT,
        negotiates=True,
        pairs_by_id=True,
        lease=30.0,  # kv_lease_duration
        prefill_cancellable=False,
        port=5600,  # VLLM_NIXL_SIDE_CHANNEL_PORT; each data-parallel rank has the next one
    )

    def negotiate(self, prefill: Coordinates, decode: Coordinates, name: str, rank: int | None) -> Rendezvous:
        transfer = f"xfer-{name}"
        for_prefill = params({"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": transfer})
        at = rank or 0
        engine = prefill.engine_ids[at] if at < len(prefill.engine_ids) else ""
        if not engine:
            return Rendezvous(for_prefill)
        for_decode = {
            "do_remote_decode": False,
            "do_remote_prefill": True,
            "remote_engine_id": engine,
            "remote_request_id": name,
            "remote_host": prefill.host,
            "remote_port": prefill.port + at,
            "tp_size": prefill.tp,
            "pp_size": prefill.pp,
            "transfer_id": transfer,
        }
        return Rendezvous(for_prefill, Handoff(params(for_decode)))

    def take(self, answer: PrefillAnswer) -> Handoff | None:
        given = given_params(answer)
        return None if given is None else pulled(given, _required)

    def remember(self, coordinates: Coordinates, handoff: Handoff, rank: int | None) -> Coordinates:
        try:
            place = _read_place(handoff.members["kv_transfer_params"])
        except Undecodable:
            return coordinates  # these parameters can be used for this request only
        at = rank or 0
        host, port = place.remote_host, place.remote_port - at
        # Where an engine's ranks are on several hosts, only the rank that answered last is known.
        known = coordinates.engine_ids if (coordinates.host, coordinates.port) == (host, port) else ()
        ids = [*known, *[""] * (at + 1 - len(known))]
        ids[at] = place.remote_engine_id
        return msgspec.structs.replace(
            coordinates, host=host, port=port, engine_ids=tuple(ids), tp=place.tp_size, pp=place.pp_size
        )
