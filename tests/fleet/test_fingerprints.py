"""The fingerprints by which engines show which hand-off protocol they speak."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pd_proxy.fleet.health.fingerprints import configured, counted, speaker
from pd_proxy.handoff.connectors.registry import CONNECTORS

FINGERPRINTS = {name: connector.traits.fingerprints for name, connector in CONNECTORS.items()}


def vllm(connector: Any, **extra: Any) -> dict[str, Any]:
    transfer = {"kv_connector": connector, "kv_role": "kv_both", "kv_connector_extra_config": extra}
    return {"vllm_config": {"model_config": {"model": "/m"}, "kv_transfer_config": transfer}, "vllm_env": {}}


@pytest.mark.parametrize(
    ("page", "fingerprints"),
    [
        (vllm("NixlConnector"), ["NixlConnector"]),
        (vllm("NixlPushConnector"), ["NixlPushConnector"]),
        (
            vllm("MultiConnector", connectors=[{"kv_connector": "NixlConnector"}, {"kv_connector": "Offloading"}]),
            ["NixlConnector", "Offloading"],
        ),
        ({"vllm_config": {"kv_transfer_config": None}}, []),
        ({"vllm_config": "kv_connector='NixlConnector'"}, []),
        ({"disaggregation_mode": "prefill", "disaggregation_bootstrap_port": 8998}, ["sglang"]),
        ({"disaggregation_mode": "null"}, []),
        ({"disaggregated_params": {"ctx_info_endpoint": ["x"]}}, ["tensorrt_llm"]),
        ({"disaggregated_params": None}, []),
        (vllm(None), []),
        (vllm("X", connectors={"a": 1}), ["X"]),
        ({"detail": "Not Found"}, []),
        ([], []),
    ],
)
def test_fingerprints_of_a_configuration(page: Any, fingerprints: list[str]) -> None:
    assert configured(json.dumps(page).encode()) == fingerprints


@pytest.mark.parametrize("page", [b"", b"<html>", b"\xff\xfe", b'{"vllm_config":', b"[" * 100_000])
def test_a_page_that_is_no_configuration_has_no_fingerprints(page: bytes) -> None:
    assert configured(page) == []


def test_fingerprints_of_metric_series() -> None:
    page = (
        b"# HELP vllm:nixl_xfer_time_seconds Of vllm:else_what\n# TYPE vllm:nixl_xfer_time_seconds histogram\n"
        b'vllm:nixl_xfer_time_seconds_bucket{le="1"} 0.0\nvllm:num_requests_running 0.0\n'
    )
    assert counted(page) == ["vllm:nixl_", "vllm:num_"]
    assert speaker(counted(page), FINGERPRINTS) == "nixl"
    assert speaker(counted(b"vllm:num_requests_running 0.0\n"), FINGERPRINTS) == ""


def test_fingerprints_of_several_connectors_name_none() -> None:
    known = {"a": frozenset({"A"}), "b": frozenset({"B"})}
    assert speaker(["A"], known) == "a"
    assert speaker(["A", "C"], known) == "a"
    assert speaker(["A", "B"], known) == ""
    assert speaker([], known) == ""


def test_no_two_connectors_have_a_fingerprint_in_common() -> None:
    fingerprints = [fingerprint for its in FINGERPRINTS.values() for fingerprint in its]
    assert len(fingerprints) == len(set(fingerprints))
