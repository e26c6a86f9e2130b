"""The profile of an engine: how it was started, for people.

Unlike the identity (`identity.py`) it decides nothing: it explains why a hand-off failed, and fills a line of
`pd-proxy doctor`.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from pd_proxy.decoding import Undecodable, decode_json
from pd_proxy.fleet.health.fingerprints import configured
from pd_proxy.fleet.health.identity import read_block_size

_VLLM_ROLES = {"kv_producer": "prefill", "kv_consumer": "decode", "kv_both": "both"}
_CACHE = re.compile(rb"^vllm:cache_config_info\{.*$", re.MULTILINE)
_CACHING = re.compile(rb'enable_prefix_caching="(True|False)"')
_VALUE = rb" ([0-9]{1,15}(?:\.[0-9]{1,9})?(?:e\+?[0-9]{1,2})?)\s*$"
_BY_SOURCE = re.compile(
    rb'^vllm:prompt_tokens_by_source_total\{[^}\n]*source="external_kv_transfer"[^}\n]*\}' + _VALUE, re.MULTILINE
)
_EXTERNAL_HITS = re.compile(rb"^vllm:external_prefix_cache_hits_total(?:\{[^}\n]*\})?" + _VALUE, re.MULTILINE)


class Profile(msgspec.Struct, frozen=True):
    """How one engine was started; a value that it does not report is empty.

    Attributes:
        role: `prefill`, `decode` or `both`.
        connectors: the fingerprints of the connectors that it was started with (`fingerprints.configured`).
        block_size: tokens in a block of its KV cache.
        context: tokens that a prompt and its answer may have together.
        tp: the number of tensor-parallel ranks.
    """

    role: str = ""
    connectors: tuple[str, ...] = ()
    block_size: int = 0
    context: int = 0
    prefix_caching: bool | None = None
    tp: int = 0


def read_profile(configuration: bytes, metrics: bytes) -> Profile:
    """The profile on an engine's pages.

    Arguments:
        configuration: the page of its configuration. It may be empty, since few engines have one: vLLM only with
            `VLLM_SERVER_DEV_MODE=1`.
        metrics: the page of its metrics.
    """
    report = _object(configuration)
    labels = _CACHE.search(metrics)
    caching = _CACHING.search(labels[0]) if labels else None
    profile = Profile(
        connectors=tuple(configured(configuration)),
        block_size=read_block_size(metrics),
        prefix_caching=None if caching is None else caching[1] == b"True",
    )
    if "disaggregation_mode" in report:  # SGLang's
        mode = report["disaggregation_mode"]
        return msgspec.structs.replace(
            profile,
            role=mode if mode in ("prefill", "decode") else "both",
            block_size=_count(report, "page_size") or profile.block_size,
            context=_count(report, "context_length"),
            tp=_count(report, "tp_size"),
            prefix_caching=not report["disable_radix_cache"] if "disable_radix_cache" in report else None,
        )
    config = _member(report, "vllm_config")
    role = _member(config, "kv_transfer_config").get("kv_role")
    return msgspec.structs.replace(
        profile,
        role=_VLLM_ROLES.get(role, "") if isinstance(role, str) else "",
        context=_count(_member(config, "model_config"), "max_model_len"),
        tp=_count(_member(config, "parallel_config"), "tensor_parallel_size"),
    )


def read_from_elsewhere(metrics: bytes) -> int | None:
    """How many prompt tokens a vLLM engine has loaded from other engines' KV caches since its start; None if it does
    not count them."""
    for series in (_BY_SOURCE, _EXTERNAL_HITS):
        if counts := series.findall(metrics):
            return int(sum(map(float, counts)))
    return None


def _object(page: bytes) -> dict[str, Any]:
    """The JSON object of a page; empty if the page is none."""
    try:
        value = decode_json(page)
    except Undecodable:
        return {}
    return value if isinstance(value, dict) else {}


def _member(page: dict[str, Any], name: str) -> dict[str, Any]:
    """A member that is an object; empty if it is none."""
    value = page.get(name)
    return value if isinstance(value, dict) else {}


def _count(page: dict[str, Any], name: str) -> int:
    """A member that is a positive number; 0 if it is none."""
    value = page.get(name)
    return value if type(value) is int and 0 < value < 1 << 53 else 0
