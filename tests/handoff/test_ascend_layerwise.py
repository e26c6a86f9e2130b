"""The legs' bodies where decode calls the gateway back, and which calls are accepted."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pd_proxy.errors import HandoffInvalid
from pd_proxy.handoff.connectors.registry import CONNECTORS
from pd_proxy.handoff.plan import Plan
from pd_proxy.requests.body import read_body

from tests.handoff.helpers import CALL, body_of

LAYERWISE = CONNECTORS["ascend_layerwise"]
URL = "http://10.0.0.1:8000/v1/metaserver"


def plan() -> Plan:
    body = read_body(b'{"prompt": "a", "max_tokens": 9, "stop": ["x"]}', "completions")
    return Plan(body, LAYERWISE, rendezvous=LAYERWISE.callback_params(URL))


def heard(**changes: Any) -> Any:
    said = {name: value for name, value in {**CALL, **changes}.items() if value is not ...}
    return LAYERWISE.read_callback(json.dumps(said).encode())


def test_decode_receives_the_callback_address_and_nothing_about_prefill() -> None:
    leg = body_of(plan().decode_leg(plan().handoff))
    assert leg["kv_transfer_params"] == {"do_remote_decode": False, "do_remote_prefill": True, "metaserver": URL}
    assert (leg["max_tokens"], leg["stop"]) == (9, ["x"])


def test_prefill_receives_decodes_callback_parameters_unchanged() -> None:
    leg = body_of(plan().prefill_leg(heard()))
    assert leg["kv_transfer_params"] == CALL
    assert (leg["max_tokens"], leg["min_tokens"], leg["stream"]) == (1, 1, False)
    assert "stop" not in leg


def test_members_that_only_newer_engines_send_are_passed_on() -> None:
    params = json.loads(bytes(heard(remote_pp_size=2, remote_topology_id="t")["kv_transfer_params"]))
    assert (params["remote_pp_size"], params["remote_topology_id"]) == (2, "t")


@pytest.mark.parametrize(
    "changes",
    [
        {"remote_cached_tokens": ...},
        {"remote_cached_tokens": -1},
        {"remote_host": ...},
        {"remote_host": ""},
        {"remote_port": "5000"},
        {"remote_port": 0},
        {"remote_engine_id": None},
        {"remote_block_ids": []},
        {"remote_block_ids": [[]]},
        {"remote_block_ids": [["4"]]},
        {"remote_tp_size": 0},
        {"do_remote_decode": False},
        {"do_remote_prefill": True},
        {"do_remote_decode": ...},
        {"token_ids": ["1"]},
        {"prompt_token_ids": [1, 2, 3]},
        {"metaserver": "http://10.6.6.6"},
    ],
    ids=str,
)
def test_a_call_with_harmful_or_further_members_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(HandoffInvalid):
        heard(**changes)


@pytest.mark.parametrize("call", [b"", b"[]", b"null", b"{", b"\xff", b"[" * 100_000])
def test_an_invalid_call_is_refused(call: bytes) -> None:
    with pytest.raises(HandoffInvalid):
        LAYERWISE.read_callback(call)
