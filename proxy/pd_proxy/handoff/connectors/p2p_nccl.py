"""P2pNcclConnector of older vLLM (removed in 0.32): prefill sends its KV cache to the address in the request's id.

Engines register with the address of their ZeroMQ socket (`registers`). Both legs carry the same X-Request-Id and no
other parameters: `___prefill_addr_<P>___decode_addr_<D>_<32 hex digits>`. Each engine reads the other's address from
it. So a request without such an id kills the engine or waits for ever, on either side. The legs are paired by the whole
id, so engines must not change it (`VLLM_DISABLE_REQUEST_ID_RANDOMIZATION=1` for versions that would).
"""

from __future__ import annotations

from pd_proxy.decoding import msgpack_decoder
from pd_proxy.handoff.connector import Connector, Handoff, Rendezvous
from pd_proxy.handoff.connectors.announcement import ROLES, Registration, address_of
from pd_proxy.handoff.coordinates import Announcement, Coordinates
from pd_proxy.handoff.traits import Traits

_read_registration = msgpack_decoder(Registration)


class P2pNccl(Connector):
    """P2pNcclConnector."""

    traits = Traits(
        name="p2p_nccl",
        negotiates=True,
        registers=True,
        plain_decode=False,
        plain_prefill=False,
        transferable=False,
        own_request_ids=True,
        endpoints=frozenset(
            {"chat", "completions"}
        ),  # those in whose answers the id can be replaced for clients (`Rendezvous.id`)
    )

    def negotiate(self, prefill: Coordinates, decode: Coordinates, name: str, rank: int | None) -> Rendezvous:
        name = f"___prefill_addr_{prefill.authority}___decode_addr_{decode.authority}_{name}"
        return Rendezvous({}, Handoff({}), id=name)

    def read_registration(self, message: bytes) -> Announcement:
        registration = _read_registration(message)
        host, port = address_of(registration.http_address)
        own_host, own_port = address_of(registration.zmq_address)
        return Announcement(ROLES[registration.type], host, port, Coordinates(host=own_host, port=own_port))
