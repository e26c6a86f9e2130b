"""The profile of an engine: how it was started."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pd_proxy.fleet.health.profile import Profile, read_from_elsewhere, read_profile

CACHE = b'vllm:cache_config_info{block_size="32",enable_prefix_caching="%b",engine="0"} 1.0\n'


def vllm(role: str, **config: Any) -> bytes:
    transfer = {"kv_connector": "NixlConnector", "kv_role": role, "kv_connector_extra_config": {}}
    return json.dumps({"vllm_config": {"kv_transfer_config": transfer, **config}}).encode()


def test_vllm_reports_its_role_in_development_mode() -> None:
    page = vllm("kv_producer", parallel_config={"tensor_parallel_size": 4}, model_config={"max_model_len": 8192})
    profile = read_profile(page, CACHE % b"True")
    assert profile == Profile("prefill", ("NixlConnector",), 32, 8192, True, 4)
    assert read_profile(vllm("kv_consumer"), b"").role == "decode"
    assert read_profile(vllm("kv_both"), b"").role == "both"


def test_vllms_metrics_alone_report_its_cache() -> None:
    assert read_profile(b"", CACHE % b"False") == Profile(block_size=32, prefix_caching=False)
    assert read_profile(b"", b"") == Profile()


def test_sglang_always_reports_its_role() -> None:
    page = {"disaggregation_mode": "decode", "tp_size": 2, "page_size": 64, "context_length": None}
    assert read_profile(json.dumps(page).encode(), b"") == Profile("decode", ("sglang",), 64, 0, None, 2)
    assert read_profile(b'{"disaggregation_mode":"null","disable_radix_cache":true}', b"") == Profile(
        "both", prefix_caching=False
    )


@pytest.mark.parametrize(
    "page",
    [
        b"",
        b"<html>",
        b"[]",
        b"[" * 100_000,
        b'"caf\xe9"',
        b'{"vllm_config":[]}',
        b'{"vllm_config":{"kv_transfer_config":{"kv_role":["kv_producer"]}}}',
        b'{"vllm_config":{"parallel_config":{"tensor_parallel_size":-1}}}',
        b'{"vllm_config":{"parallel_config":{"tensor_parallel_size":true}}}',
        b'{"vllm_config":{"model_config":{"max_model_len":1e400}}}',
    ],
)
def test_a_page_of_another_shape_is_an_empty_profile(page: bytes) -> None:
    profile = read_profile(page, b"")
    assert (profile.role, profile.tp, profile.context) == ("", 0, 0)


@pytest.mark.parametrize(
    ("page", "tokens"),
    [
        (b'vllm:prompt_tokens_by_source_total{engine="0",source="external_kv_transfer"} 96.0\n', 96),
        (
            b'vllm:prompt_tokens_by_source_total{engine="0",source="external_kv_transfer"} 1.0\n'
            b'vllm:prompt_tokens_by_source_total{engine="0",source="local_compute"} 50.0\n'
            b'vllm:prompt_tokens_by_source_total{engine="1",source="external_kv_transfer"} 2.0\r\n',
            3,
        ),
        (b'vllm:prompt_tokens_by_source_total{source="external_kv_transfer"} 1.5e+06', 1_500_000),
        (b'vllm:external_prefix_cache_hits_total{engine="0"} 7.0\n', 7),
        (b"vllm:external_prefix_cache_hits_total 8\n", 8),
        (b'vllm:prompt_tokens_by_source_total{source="local_compute"} 50.0\n', None),
        (b'vllm:prompt_tokens_by_source_total{source="external_kv_transfer"} NaN\n', None),
        (b"", None),
    ],
)
def test_tokens_from_other_engines_are_added_up_over_all_engines_of_a_server(page: bytes, tokens: int | None) -> None:
    assert read_from_elsewhere(page) == tokens
