"""NixlPushConnector: the parameters of both legs, and what is remembered of a first answer."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from pd_proxy.errors import HandoffInvalid
from pd_proxy.handoff.connector import Handoff, Rendezvous
from pd_proxy.handoff.connectors.nixl_push import NixlPush
from pd_proxy.handoff.coordinates import Coordinates
from pd_proxy.handoff.plan import Plan
from pd_proxy.requests.body import read_body

from tests.handoff.helpers import PARAMS, answer, body_of, without

PUSH = NixlPush()
NAME = "0f" * 16
HERE = Coordinates(host="10.0.0.1", port=5600, engine_ids=("e_dp0", "e_dp1"), tp=4, pp=2, dp=2)


def params_of(members: dict[str, msgspec.Raw]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(bytes(members["kv_transfer_params"]))
    return found


def plan(rendezvous: Rendezvous) -> Plan:
    return Plan(read_body(b'{"prompt":"a","max_tokens":9,"stop":["x"]}', "completions"), PUSH, rendezvous=rendezvous)


@pytest.mark.parametrize("rank", [None, 0, 1])
def test_decode_receives_the_address_at_which_prefills_rank_takes_registrations(rank: int | None) -> None:
    rendezvous = PUSH.negotiate(HERE, Coordinates(), NAME, rank)
    made = plan(rendezvous)
    assert made.together
    asked = body_of(made.prefill_leg())
    assert asked["kv_transfer_params"] == {
        "do_remote_decode": True,
        "do_remote_prefill": False,
        "transfer_id": f"xfer-{NAME}",
    }
    assert (asked["max_tokens"], asked["ignore_eos"], "stop" in asked) == (1, True, False)
    told = body_of(made.decode_leg(made.handoff))
    assert told["kv_transfer_params"] == {
        "do_remote_decode": False,
        "do_remote_prefill": True,
        "remote_engine_id": f"e_dp{rank or 0}",
        "remote_request_id": NAME,
        "remote_host": "10.0.0.1",
        "remote_port": 5600 + (rank or 0),
        "tp_size": 4,
        "pp_size": 2,
        "transfer_id": f"xfer-{NAME}",
    }
    assert told["max_tokens"] == 9


@pytest.mark.parametrize("ids", [(), ("",), ("", "e_dp1")])
def test_an_unknown_engine_has_a_sequential_try(ids: tuple[str, ...]) -> None:
    rendezvous = PUSH.negotiate(msgspec.structs.replace(HERE, engine_ids=ids), Coordinates(), NAME, 0)
    made = plan(rendezvous)
    assert made.handoff is None
    assert not made.together
    handoff, _ = made.take(answer({**PARAMS, "transfer_mode": "push"}))
    assert body_of(made.decode_leg(handoff))["kv_transfer_params"] == {**PARAMS, "transfer_mode": "push"}


@pytest.mark.parametrize("missing", ["remote_engine_id", "remote_request_id", "remote_host", "remote_port", "tp_size"])
def test_parameters_that_would_kill_decode_are_not_sent(missing: str) -> None:
    with pytest.raises(HandoffInvalid):
        plan(PUSH.negotiate(Coordinates(), Coordinates(), NAME, None)).take(answer(without(missing)))


def handed(**more: Any) -> Handoff:
    return Handoff({"kv_transfer_params": msgspec.Raw(json.dumps({**PARAMS, **more}).encode())})


def test_the_parameters_of_a_first_answer_make_the_next_try_concurrent() -> None:
    start = Coordinates(host="url-host", port=5600)
    known = PUSH.remember(start, handed(tp_size=2, pp_size=3), None)
    assert known == Coordinates(host="127.0.0.1", port=22050, engine_ids=("8c0a1f0e",), tp=2, pp=3)
    told = PUSH.negotiate(known, Coordinates(), NAME, None).handoff
    assert told is not None
    assert params_of(told.members)["remote_port"] == 22050


def test_ranks_are_learnt_one_by_one() -> None:
    start = Coordinates(host="url-host", port=5600, dp=3)
    one = PUSH.remember(start, handed(remote_engine_id="e_dp2", remote_port=7002), 2)
    assert (one.engine_ids, one.port) == (("", "", "e_dp2"), 7000)
    assert PUSH.negotiate(one, Coordinates(), NAME, 0).handoff is None
    two = PUSH.remember(one, handed(remote_engine_id="e_dp0", remote_port=7000), 0)
    assert two.engine_ids == ("e_dp0", "", "e_dp2")
    again = PUSH.remember(two, handed(remote_engine_id="new_dp0", remote_port=7000), 0)
    assert again.engine_ids == ("new_dp0", "", "e_dp2")


def test_of_ranks_on_several_hosts_only_the_last_is_known() -> None:
    one = PUSH.remember(Coordinates(dp=2), handed(remote_engine_id="e_dp0", remote_host="a", remote_port=7000), 0)
    two = PUSH.remember(one, handed(remote_engine_id="e_dp1", remote_host="b", remote_port=7001), 1)
    assert (two.host, two.engine_ids) == ("b", ("", "e_dp1"))


@pytest.mark.parametrize("odd", [{"pp_size": 0}, {"pp_size": "1"}])
def test_an_answer_without_an_address_is_not_remembered(odd: dict[str, Any]) -> None:
    assert PUSH.remember(HERE, handed(**odd), None) == HERE


def test_blocks_that_decode_has_not_registered_for_cannot_be_released() -> None:
    assert plan(PUSH.negotiate(HERE, HERE, NAME, None)).release_leg(handed(), sent=False) is None
