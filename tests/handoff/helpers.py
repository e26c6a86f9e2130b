"""What the tests of hand-offs share: parameters of a hand-off, prefill's answer, and the bodies of legs."""

from __future__ import annotations

import base64
import json
from typing import Any

from pd_proxy.handoff.plan import Leg

PARAMS: dict[str, Any] = {
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "remote_block_ids": [[33, 34]],
    "remote_engine_id": "8c0a1f0e",
    "remote_request_id": "cmpl-1-0-12ab34cd",
    "remote_host": "127.0.0.1",
    "remote_port": 22050,
    "tp_size": 1,
    "dcp_size": 1,
    "pp_size": 1,
    "remote_num_tokens": 20,
    "remote_blocks_expiry_time": None,
    "transfer_mode": "pull",
    "remote_prefill_cached_tokens": 0,
    "remote_handshake_port": 6301,
    "remote_notify_port": 61005,
    "transfer_id": "tx-1",
}
CHOICE = {
    "index": 0,
    "finish_reason": "length",
    "disaggregated_params": {"ctx_request_id": 1, "disagg_request_id": 1, "first_gen_tokens": [7]},
}
"""A choice with the parameters of the engines that hand over in their choices."""
CALL: dict[str, Any] = {
    "token_ids": [],
    "request_id": "cmpl-00112233445566778899aabbccddeeff-0",
    "do_remote_prefill": False,
    "do_remote_decode": True,
    "remote_block_ids": [[4, 5, 6]],
    "remote_block_size": [128],
    "remote_engine_id": "e",
    "remote_host": "10.0.0.9",
    "remote_port": 5000,
    "remote_tp_size": 2,
    "remote_pcp_size": 1,
    "remote_dcp_size": 1,
    "remote_cached_tokens": 0,
}
"""The parameters with which a layerwise decode engine calls the gateway back."""
PNG = "data:image/png;base64," + base64.b64encode(b"a picture").decode()


def body_of(leg: Leg | None) -> dict[str, Any]:
    """The body of a leg that there must be, as JSON."""
    assert leg is not None
    value: dict[str, Any] = json.loads(b"".join(leg.body))
    return value


def answer(params: object) -> bytes:
    """Prefill's answer with these parameters."""
    told = {"id": "a", "choices": [CHOICE], "usage": {"prompt_tokens": 3}, "kv_transfer_params": params}
    return json.dumps(told).encode()


def without(*names: str) -> dict[str, Any]:
    """A copy of `PARAMS` without these members."""
    return {name: value for name, value in PARAMS.items() if name not in names}


def image(url: str = PNG, **more: Any) -> dict[str, Any]:
    """An image as a part of a chat message."""
    return {"type": "image_url", "image_url": {"url": url, "detail": "high"}, **more}


def sound(data: str = "AAAA", **more: Any) -> dict[str, Any]:
    """A sound as a part of a chat message."""
    return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}, **more}
