"""P2pNcclConnector: the request's id is the legs' only parameter."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pd_proxy.handoff.connectors.registry import CONNECTORS
from pd_proxy.handoff.coordinates import Coordinates
from pd_proxy.handoff.plan import Plan
from pd_proxy.requests.body import read_body

P2P = CONNECTORS["p2p_nccl"]
NAME = "0f" * 16
P, D = Coordinates(host="10.0.0.1", port=21001), Coordinates(host="fd00::2", port=22001)


def test_both_legs_have_one_id_with_both_addresses() -> None:
    rendezvous = P2P.negotiate(P, D, NAME, None)
    assert rendezvous.id == f"___prefill_addr_10.0.0.1:21001___decode_addr_[fd00::2]:22001_{NAME}"
    # As the engines read it: prefill looks for decode's address, and decode for prefill's.
    assert re.search(r"___decode_addr_(.*):(\d+)", rendezvous.id).groups() == ("[fd00::2]", "22001")  # type: ignore[union-attr]
    assert re.search(r"___prefill_addr_(.*):(\d+)___", rendezvous.id).groups() == ("10.0.0.1", "21001")  # type: ignore[union-attr]


def test_the_legs_have_no_other_parameters() -> None:
    made = Plan(read_body(b'{"messages":[],"max_tokens":9}', "chat"), P2P, rendezvous=P2P.negotiate(P, D, NAME, None))
    assert b"kv_transfer_params" not in b"".join(made.prefill_leg().body)
    handoff, _ = made.take(b'{"choices":[]}')
    assert handoff is not None
    assert b"".join(made.decode_leg(handoff).body) == b'{"messages":[],"max_tokens":9}'
    assert made.release_leg(handoff, sent=False) is None


def test_no_request_without_such_an_id_goes_to_either_engine() -> None:
    assert (P2P.traits.plain_decode, P2P.traits.plain_prefill, P2P.traits.transferable) == (False, False, False)


def registration(**said: Any) -> bytes:
    members = {"type": "P", "http_address": "10.0.0.1:20001", "zmq_address": "10.0.0.1:21001", **said}
    return msgspec.msgpack.encode(members)


def test_a_registration_is_read() -> None:
    said = P2P.read_registration(registration())
    assert (said.role, said.host, said.port) == ("prefill", "10.0.0.1", 20001)
    assert said.coordinates == P


@pytest.mark.parametrize(
    "text",
    [
        "10.0.0.1",
        "10.0.0.1:",
        ":1",
        "10.0.0.1:70000",
        "a b:1",
        "a\r\nx-evil: 1:1",
        "a___decode_addr_b:1",
        "é:1",
        "[::1:2",
    ],
)
def test_an_address_that_would_spoil_the_id_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        P2P.read_registration(registration(zmq_address=text))


@given(text=st.text(max_size=40) | st.from_regex(r"[0-9A-Za-z.:\[\]_-]{1,20}:[0-9]{1,5}"))
def test_whatever_address_registers_an_id_is_one_line_with_two_addresses(text: str) -> None:
    try:
        coordinates = P2P.read_registration(registration(zmq_address=text)).coordinates
    except ValueError:
        return
    name = P2P.negotiate(coordinates, D, NAME, None).id
    assert re.fullmatch(r"___prefill_addr_[0-9A-Za-z.:\[\]-]+:\d+___decode_addr_\[fd00::2\]:22001_[0-9a-f]{32}", name)
