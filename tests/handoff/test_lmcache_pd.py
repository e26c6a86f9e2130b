"""LMCache's prefill-decode mode: the legs' bodies."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pd_proxy.handoff.connectors.registry import CONNECTORS
from pd_proxy.handoff.coordinates import Coordinates
from pd_proxy.handoff.plan import Plan
from pd_proxy.requests.body import read_body

from tests.handoff.helpers import body_of

LMCACHE = CONNECTORS["lmcache_pd"]
DECODE = Coordinates(host="10.0.0.2", init_ports=(7300, 7301), alloc_ports=(7400, 7401), tp=2)


def plan(decode: Coordinates = DECODE, **members: Any) -> Plan:
    rendezvous = LMCACHE.negotiate(Coordinates(host="10.0.0.1"), decode, "ab" * 16, None)
    return Plan(read_body(json.dumps(members).encode(), "chat"), LMCACHE, rendezvous=rendezvous)


def test_prefill_receives_the_address_of_decodes_receiver() -> None:
    body = body_of(plan(messages=[], max_tokens=9).prefill_leg())
    assert body["kv_transfer_params"] == {
        "disagg_spec": {
            "req_id": "ab" * 16,
            "receiver_host": "10.0.0.2",
            "receiver_init_port": [7300, 7301],
            "receiver_alloc_port": [7400, 7401],
        }
    }
    assert (body["max_tokens"], body["stream"]) == (1, False)


def test_query_ports_are_named_where_they_are_set() -> None:
    decode = Coordinates(host="d", init_ports=(1,), alloc_ports=(2,), query_ports=(3,))
    body = body_of(plan(decode, messages=[]).prefill_leg())
    assert body["kv_transfer_params"]["disagg_spec"]["receiver_query_port"] == [3]


@pytest.mark.parametrize("answer", [b'{"choices":[]}', b'{"choices":[],"kv_transfer_params":{"first_tok":7}}'])
def test_decode_receives_no_parameters_and_samples_every_token_itself(answer: bytes) -> None:
    made = plan(messages=[], max_tokens=9)
    handoff, _ = made.take(answer)
    assert handoff is not None
    assert body_of(made.decode_leg(handoff)) == {"messages": [], "max_tokens": 9}


def test_the_notification_of_each_rank_is_waited_for() -> None:
    assert plan(messages=[]).notices == 2
    assert Plan(read_body(b'{"messages":[]}', "chat"), LMCACHE).notices == 0


def test_a_hand_off_to_one_decode_engine_cannot_go_to_another() -> None:
    made = plan(messages=[])
    assert not LMCACHE.traits.transferable
    assert made.handoff is not None
    assert made.release_leg(made.handoff, sent=False) is None
