"""The P2P tier: one name on both legs, each in the sub-dictionary that is named after the other side."""

from __future__ import annotations

import pytest
from pd_proxy.handoff.connectors.offload_p2p import OffloadP2P
from pd_proxy.handoff.coordinates import Coordinates
from pd_proxy.handoff.plan import Plan
from pd_proxy.requests.body import read_body

from tests.handoff.helpers import body_of

P2P = OffloadP2P()
NAME = "0f" * 16
HERE = Coordinates(host="10.0.0.1", port=5710, dp=4)


@pytest.mark.parametrize("rank", [None, 0, 3])
def test_both_legs_have_the_name_and_decode_has_the_port_of_prefills_rank(rank: int | None) -> None:
    body = read_body(b'{"prompt":"a","max_tokens":9}', "completions")
    made = Plan(body, P2P, rendezvous=P2P.negotiate(HERE, Coordinates(), NAME, rank))
    assert not made.together  # decode could come first, but it would wait for blocks that it could compute
    assert body_of(made.prefill_leg())["kv_transfer_params"] == {"remote_decoder": {"kv_request_id": f"kv-{NAME}"}}
    handoff, _ = made.take(b'{"choices":[],"kv_transfer_params":null}')
    assert body_of(made.decode_leg(handoff))["kv_transfer_params"] == {
        "remote_prefiller": {
            "kv_request_id": f"kv-{NAME}",
            "remote_host": "10.0.0.1",
            "remote_port": 5710 + (rank or 0),
        }
    }
    assert handoff is not None
    assert made.release_leg(handoff, sent=False) is None


def test_two_tries_have_two_names() -> None:
    one, two = (P2P.negotiate(HERE, HERE, name * 16, None).prefill["kv_transfer_params"] for name in ("0a", "0b"))
    assert bytes(one) != bytes(two)
