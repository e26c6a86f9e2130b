"""vLLM's MoRIIOConnector (AMD), in its two modes: decode reads from prefill, or prefill writes to decode.

Engines register with their ports (`registers`). Each leg names the other engine by `remote_host`,
`remote_handshake_port` and `remote_notify_port`, so engines need not read these from a request's id. From vLLM 0.32,
`moriio_connector.py` and `moriio_common.py`:

- `transfer_id` pairs the legs. A leg without it, or without the other engine's address, kills the engine's scheduler.
  So does a leg without `remote_block_ids` and `remote_engine_id`, which may be null. This holds for prefill's leg in
  both modes.
- Prefill keeps blocks only of a request that ended because of its length, for 60 s.
- In read mode a decode engine treats every request as one with a hand-off. It answers one without from memory that was
  never written.
- In write mode decode notifies the prefill rank that its leg names. If another rank has the request, that one waits.
- An engine in one mode cannot hand over to an engine in the other.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

import msgspec

from pd_proxy.decoding import Undecodable, json_decoder, msgpack_decoder
from pd_proxy.encoding import encode_json
from pd_proxy.errors import HandoffInvalid
from pd_proxy.handoff.answer import PrefillAnswer
from pd_proxy.handoff.blocks import check_blocks
from pd_proxy.handoff.connector import (
    Connector,
    Handoff,
    Name,
    Port,
    Rendezvous,
    given_params,
    params,
    refused,
)
from pd_proxy.handoff.connectors.announcement import ROLES, Ranks, Registration, address_of, host_of, port_of
from pd_proxy.handoff.coordinates import Announcement, Coordinates
from pd_proxy.handoff.traits import Order, Traits
from pd_proxy.requests.endpoints import Members


class _Registration(Registration):
    dp_size: Ranks
    tp_size: Ranks
    transfer_mode: Literal["READ", "WRITE"]


_read_registration = msgpack_decoder(_Registration)


_COMMON = Traits(
    negotiates=True,
    registers=True,
    lease=60.0,  # defer_timeout
    transferable=False,  # prefill's leg names the decode engine
    release_by_refusal=True,
)


class MoRIIO(Connector):
    """The common part of the two modes.

    Attributes:
        mode: the mode in engines' registrations.
    """

    mode: ClassVar[Literal["READ", "WRITE"]]

    def read_registration(self, message: bytes) -> Announcement:
        registration = _read_registration(message)
        if registration.transfer_mode != self.mode:
            raise ValueError(f"it transfers in {registration.transfer_mode} mode, and its group in {self.mode} mode")
        pairs = [part.partition(":") for part in registration.zmq_address.split(",")]
        parts = {name.strip(): value.strip() for name, _, value in pairs}
        if len(pairs) != 3 or parts.keys() != {"host", "handshake", "notify"}:
            raise ValueError("its zmq_address is not host:…,handshake:…,notify:…")
        host, port = address_of(registration.http_address)
        coordinates = Coordinates(
            host=host_of(parts["host"]),
            port=port_of(parts["handshake"]),
            notify_port=port_of(parts["notify"]),
            tp=registration.tp_size,
            dp=registration.dp_size,
        )
        return Announcement(ROLES[registration.type], host, port, coordinates)

    def release(self, members: Members, handoff: Handoff, *, sent: bool) -> Members | None:
        return refused(members, handoff)

    @staticmethod
    def _asked(decode: Coordinates, transfer: str) -> Members:
        """The parameters of prefill's leg."""
        for_prefill = {
            "do_remote_decode": True,
            "do_remote_prefill": False,
            "transfer_id": transfer,
            **_peer(decode),
        }
        return params(for_prefill)


def _peer(coordinates: Coordinates) -> dict[str, Any]:
    """The members by which a leg names the other engine."""
    return {
        "remote_engine_id": None,
        "remote_block_ids": None,
        "remote_host": coordinates.host,
        "remote_handshake_port": coordinates.port,
        "remote_notify_port": coordinates.notify_port,
        "remote_dp_size": coordinates.dp,
        "remote_tp_size": coordinates.tp,
    }


class MoRIIOWrite(MoRIIO):
    """MoRIIOConnector in write mode: prefill waits for decode's blocks and writes to them, layer by layer."""

    traits = replace(_COMMON, name="moriio_write", order=Order.CONCURRENT)
    mode = "WRITE"

    def negotiate(self, prefill: Coordinates, decode: Coordinates, name: str, rank: int | None) -> Rendezvous:
        transfer = f"tx-{name}"
        for_decode = {
            "do_remote_decode": False,
            "do_remote_prefill": True,
            "transfer_id": transfer,
            **_peer(prefill),
            "remote_dp_rank": rank or 0,
            "remote_dp_rank_override": True,
        }
        return Rendezvous(self._asked(decode, transfer), Handoff(params(for_decode)))


class MoRIIOReadParams(msgspec.Struct):
    """The members of prefill's parameters that decode needs. Others are passed on."""

    do_remote_prefill: bool
    remote_block_ids: msgspec.Raw
    remote_engine_id: Name
    remote_host: Name
    remote_handshake_port: Port
    remote_notify_port: Port
    transfer_id: Name
    tp_size: Ranks = 1


_required = json_decoder(MoRIIOReadParams)
_members = json_decoder(dict[str, msgspec.Raw])


class MoRIIORead(MoRIIO):
    """MoRIIOConnector in read mode (`read_mode: true`)."""

    traits = replace(_COMMON, name="moriio_read", plain_decode=False)
    mode = "READ"

    def negotiate(self, prefill: Coordinates, decode: Coordinates, name: str, rank: int | None) -> Rendezvous:
        return Rendezvous(self._asked(decode, f"tx-{name}"))

    def take(self, answer: PrefillAnswer) -> Handoff | None:
        given = given_params(answer)
        if given is None:
            return None
        try:
            checked = _required(given)
        except Undecodable as error:
            raise HandoffInvalid(f"prefill's kv_transfer_params are not usable: {error}") from None
        if not checked.do_remote_prefill:
            raise HandoffInvalid("prefill's kv_transfer_params say do_remote_prefill: false")
        check_blocks(checked.remote_block_ids)
        for_decode = {"remote_tp_size": msgspec.Raw(b"%d" % checked.tp_size), **_members(given)}
        return Handoff({"kv_transfer_params": msgspec.Raw(encode_json(for_decode))})
