"""LMCache's prefill-decode mode: what the legs say."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pd_proxy.handoff.connectors.registry import CONNECTORS
from pd_proxy.handoff.coordinates import Coordinates
from pd_proxy.handoff.plan import Plan
from pd_proxy.requests.body import read_body

LMCACHE = CONNECTORS["lmcache_pd"]
DECODE = Coordinates(host="10.0.0.2", init_ports=(7300, 7301), alloc_ports=(7400, 7401), tp=2)


def plan(decode: Coordinates = DECODE, **members: Any) -> Plan:
    rendezvous = LMCACHE.negotiate(Coordinates(host="10.0.0.1"), decode, "ab" * 16, None)
    return Plan(read_body(json.dumps(members).encode(), "chat"), LMCACHE, rendezvous=rendezvous)


def test_prefill_is_told_where_decodes_receiver_is() -> None:
    body = json.loads(b"".join(plan(messages=[], max_tokens=9).prefill_leg().body))
    assert body["kv_transfer_params"] == {
        "disagg_spec": {
            "req_id": "ab" * 16,
            "receiver_host": "10.0.0.2",
            "receiver_init_port": [7300, 7301],
            "receiver_alloc_port": [7400, 7401],
        }
    }
    assert (body["max_tokens"], body["stream"]) == (1, False)


def test_ports_for_queries_are_named_where_there_are_some() -> None:
    decode = Coordinates(host="d", init_ports=(1,), alloc_ports=(2,), query_ports=(3,))
    body = json.loads(b"".join(plan(decode, messages=[]).prefill_leg().body))
    assert body["kv_transfer_params"]["disagg_spec"]["receiver_query_port"] == [3]


@pytest.mark.parametrize("answer", [b'{"choices":[]}', b'{"choices":[],"kv_transfer_params":{"first_tok":7}}'])
def test_decode_is_told_nothing_and_samples_every_token_itself(answer: bytes) -> None:
    made = plan(messages=[], max_tokens=9)
    handoff, _ = made.take(answer)
    assert handoff is not None
    assert json.loads(b"".join(made.decode_leg(handoff).body)) == {"messages": [], "max_tokens": 9}


def test_a_notice_of_each_rank_is_waited_for() -> None:
    assert plan(messages=[]).notices == 2
    assert Plan(read_body(b'{"messages":[]}', "chat"), LMCACHE).notices == 0


def test_what_was_written_to_one_decode_engine_goes_to_no_other() -> None:
    made = plan(messages=[])
    assert not LMCACHE.traits.transferable
    assert made.handoff is not None
    assert made.release_leg(made.handoff, sent=False) is None
