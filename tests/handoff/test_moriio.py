"""MoRIIOConnector: the legs' bodies in its two modes, and what prefill's answer must have."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pd_proxy.errors import HandoffInvalid
from pd_proxy.handoff.connectors.registry import CONNECTORS
from pd_proxy.handoff.coordinates import Coordinates
from pd_proxy.handoff.plan import Plan
from pd_proxy.handoff.traits import Order
from pd_proxy.requests.body import read_body

from tests.handoff.helpers import body_of

READ, WRITE = CONNECTORS["moriio_read"], CONNECTORS["moriio_write"]
NAME = "ab" * 16
P = Coordinates(host="10.0.0.1", port=6301, notify_port=61005, tp=4, dp=8)
D = Coordinates(host="fd00::2", port=6401, notify_port=62005, tp=2, dp=16)
ASKED = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "transfer_id": f"tx-{NAME}",
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": "fd00::2",
    "remote_handshake_port": 6401,
    "remote_notify_port": 62005,
    "remote_dp_size": 16,
    "remote_tp_size": 2,
}
REPLIED: dict[str, Any] = {
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "remote_block_ids": [[3, 4]],
    "remote_engine_id": "10.0.0.1:6301",
    "remote_host": "10.0.0.1",
    "remote_handshake_port": 6301,
    "remote_notify_port": 61005,
    "remote_dp_rank": 5,
    "remote_dp_rank_override": True,
    "remote_dp_size": 8,
    "remote_dp_size_local": 8,
    "tp_size": 4,
    "transfer_id": f"tx-{NAME}",
}


def plan(name: str, rank: int | None = 5) -> Plan:
    connector = CONNECTORS[name]
    rendezvous = connector.negotiate(P, D, NAME, rank)
    return Plan(read_body(b'{"messages":[],"max_tokens":9}', "chat"), connector, rendezvous=rendezvous)


def answer(params: object) -> bytes:
    return json.dumps({"choices": [], "kv_transfer_params": params}).encode()


def params(body: bytes) -> Any:
    return json.loads(body)["kv_transfer_params"]


@pytest.mark.parametrize("name", ["moriio_read", "moriio_write"])
def test_prefill_receives_the_decode_engines_addresses(name: str) -> None:
    leg = plan(name).prefill_leg()
    assert params(b"".join(leg.body)) == ASKED
    body = body_of(leg)
    assert (body["max_tokens"], body["stream"], body["ignore_eos"]) == (1, False, True)


@pytest.mark.parametrize(("rank", "named"), [(5, 5), (0, 0), (None, 0)])
def test_in_write_mode_decode_receives_prefills_addresses_and_rank_beforehand(rank: int | None, named: int) -> None:
    made = plan("moriio_write", rank)
    assert made.handoff is not None
    assert params(b"".join(made.decode_leg(made.handoff).body)) == {
        "do_remote_decode": False,
        "do_remote_prefill": True,
        "transfer_id": f"tx-{NAME}",
        "remote_engine_id": None,
        "remote_block_ids": None,
        "remote_host": "10.0.0.1",
        "remote_handshake_port": 6301,
        "remote_notify_port": 61005,
        "remote_dp_size": 8,
        "remote_tp_size": 4,
        "remote_dp_rank": named,
        "remote_dp_rank_override": True,
    }
    assert made.take(answer(REPLIED))[0] is made.handoff


def test_in_read_mode_decode_receives_prefills_reply_and_its_ranks() -> None:
    made = plan("moriio_read")
    assert made.handoff is None
    handoff, _ = made.take(answer({**REPLIED, "unknown": [1.0]}))
    assert handoff is not None
    assert params(b"".join(made.decode_leg(handoff).body)) == {**REPLIED, "unknown": [1.0], "remote_tp_size": 4}


def test_ranks_in_prefills_reply_are_not_overwritten() -> None:
    handoff, _ = plan("moriio_read").take(answer({**REPLIED, "remote_tp_size": 3}))
    assert handoff is not None
    assert json.loads(bytes(handoff.members["kv_transfer_params"]))["remote_tp_size"] == 3


HARMFUL = {
    **{f"without {name}": {k: v for k, v in REPLIED.items() if k != name} for name in ASKED if name in REPLIED},
    "no prefill": {**REPLIED, "do_remote_prefill": False},
    "no blocks": {**REPLIED, "remote_block_ids": []},
    "blocks null": {**REPLIED, "remote_block_ids": None},
    "engine null": {**REPLIED, "remote_engine_id": None},
    "host empty": {**REPLIED, "remote_host": ""},
    "port zero": {**REPLIED, "remote_handshake_port": 0},
    "port a word": {**REPLIED, "remote_notify_port": "61005"},
    "transfer a number": {**REPLIED, "transfer_id": 7},
    "no ranks": {**REPLIED, "tp_size": 0},
    "a list": [REPLIED],
}
for harmless in ("do_remote_decode", "remote_dp_size"):
    HARMFUL.pop(f"without {harmless}", None)


@pytest.mark.parametrize("given_", HARMFUL.values(), ids=list(HARMFUL))
def test_in_read_mode_harmful_parameters_are_not_sent(given_: object) -> None:
    with pytest.raises(HandoffInvalid):
        plan("moriio_read").take(answer(given_))


@pytest.mark.parametrize("given_", [None, {}])
def test_no_parameters_are_no_hand_off(given_: object) -> None:
    assert plan("moriio_read").take(answer(given_))[0] is None


@pytest.mark.parametrize("name", ["moriio_read", "moriio_write"])
def test_an_unneeded_hand_off_is_released_by_a_request_that_decode_refuses(name: str) -> None:
    made = plan(name)
    handoff, _ = made.take(answer(REPLIED))
    assert handoff is not None
    leg = made.release_leg(handoff, sent=True)
    assert leg is not None
    body = body_of(leg)
    assert body["min_tokens"] > body["max_tokens"]
    assert body["kv_transfer_params"]["do_remote_prefill"] is True
    assert body["kv_transfer_params"]["transfer_id"] == f"tx-{NAME}"


def test_in_read_mode_decode_gets_no_request_without_a_hand_off() -> None:
    assert not READ.traits.plain_decode
    assert WRITE.traits.plain_decode
    assert not READ.traits.transferable and not WRITE.traits.transferable
    assert (READ.traits.order, WRITE.traits.order) == (Order.SEQUENTIAL, Order.CONCURRENT)


def registration(**said: Any) -> bytes:
    members = {
        "type": "D",
        "http_address": "[fd00::2]:8000",
        "zmq_address": "host:fd00::2,handshake:6401,notify:62005",
        "dp_size": 16,
        "tp_size": 2,
        "transfer_mode": "WRITE",
        **said,
    }
    return msgspec.msgpack.encode(members)


def test_a_registration_is_read() -> None:
    said = WRITE.read_registration(registration(more=1))
    assert (said.role, said.host, said.port, said.coordinates) == ("decode", "fd00::2", 8000, D)


@pytest.mark.parametrize(("connector", "mode"), [(WRITE, "READ"), (READ, "WRITE")])
def test_modes_are_not_mixed(connector: Any, mode: str) -> None:
    with pytest.raises(ValueError, match=f"it transfers in {mode} mode"):
        connector.read_registration(registration(transfer_mode=mode))


@given(text=st.text(max_size=60) | st.from_regex(r"host:[^,]*,handshake:[^,]*,notify:[^,]*"))
def test_an_invalid_address_is_refused(text: str) -> None:
    try:
        coordinates = WRITE.read_registration(registration(zmq_address=text)).coordinates
    except ValueError:
        return
    assert coordinates.host.isascii() and coordinates.host.isprintable() and " " not in coordinates.host
    assert 0 < coordinates.port < 65536 and 0 < coordinates.notify_port < 65536
