"""The address to which a hand-off sends decode."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from pd_proxy.handoff.connector import Handoff
from pd_proxy.handoff.side import side_of


def handoff(**members: Any) -> Handoff:
    return Handoff({name: msgspec.Raw(json.dumps(value).encode()) for name, value in members.items()})


@pytest.mark.parametrize(
    ("members", "side"),
    [
        ({"kv_transfer_params": {"remote_host": "10.0.0.1", "remote_port": 5600}}, ("10.0.0.1", 5600)),
        ({"kv_transfer_params": {"remote_host": "::1", "remote_handshake_port": 6301}}, ("::1", 6301)),
        ({"kv_transfer_params": {"remote_bootstrap_addr": "http://p:8998"}}, ("p", 8998)),
        ({"kv_transfer_params": {"remote_bootstrap_addr": "http://[::1]:8998"}}, ("::1", 8998)),
        ({"kv_transfer_params": {"remote_prefiller": {"remote_host": "p", "remote_port": 5710}}}, ("p", 5710)),
        ({"bootstrap_host": "[::1]", "bootstrap_port": 8998, "bootstrap_room": 7}, ("::1", 8998)),
        ({}, None),
        ({"bootstrap_host": "p"}, None),
        ({"bootstrap_host": ["p"], "bootstrap_port": [1]}, None),
        ({"disaggregated_params": {"encoded_opaque_state": "AAAA"}}, None),
        ({"kv_transfer_params": {"remote_host": "", "remote_port": 5600}}, None),
        ({"kv_transfer_params": {"remote_host": "p", "remote_port": True}}, None),
        ({"kv_transfer_params": {"remote_host": "p", "remote_port": 65536}}, None),
        ({"kv_transfer_params": {"remote_bootstrap_addr": "http://p:port"}}, None),
        ({"kv_transfer_params": "p"}, None),
        ({"kv_transfer_params": None}, None),
    ],
)
def test_a_hand_off_has_the_address_of_prefills_side_channel(
    members: dict[str, Any], side: tuple[str, int] | None
) -> None:
    assert side_of(handoff(**members)) == side


def test_invalid_json_has_no_address() -> None:
    assert side_of(Handoff({"kv_transfer_params": msgspec.Raw(b'{"caf\xe9')})) is None
