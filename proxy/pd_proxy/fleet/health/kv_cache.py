"""Reads from an engine's metrics how much its KV cache holds, and whether it has a prefix cache."""

from __future__ import annotations

import re

import msgspec

_VLLM = re.compile(rb"^vllm:cache_config_info\{[^\n]*", re.MULTILINE)
_BLOCK_SIZE = re.compile(rb'[{,]block_size="(\d{1,6})"')
_BLOCKS = re.compile(rb'[{,]num_gpu_blocks="(\d{1,10})"')
_CACHING = re.compile(rb'[{,]enable_prefix_caching="(True|False)"')
_SGLANG = re.compile(
    rb"^sglang:max_total_num_tokens(?:\{[^\n}]*\})? (\d{1,12})(?:\.0*)?(?:e\+?(\d{1,2}))?\s*$", re.MULTILINE
)
_MOST = 1 << 40  # tokens; no engine has room for so many


class Cache(msgspec.Struct, frozen=True):
    """One engine's KV cache.

    Attributes:
        tokens: that it has room for; 0 if the engine does not report it.
        caching: whether it has a prefix cache; None if the engine does not report it.
        caches: the number of data-parallel ranks whose tokens are added up.
    """

    tokens: int = 0
    caching: bool | None = None
    caches: int = 1


def read_cache(metrics: bytes) -> Cache:
    """The KV cache on a page of /metrics.

    vLLM has a line for each data-parallel engine behind the page, and any of them may get a request: their tokens are
    added up, and there is prefix caching if all have it. SGLang has a line for each rank, and most ranks share a cache:
    the largest number counts.
    """
    tokens = 0
    flags: set[bytes] = set()
    lines = _VLLM.findall(metrics)
    for labels in lines:
        size, count = _BLOCK_SIZE.search(labels), _BLOCKS.search(labels)
        if size is not None and count is not None:
            tokens += int(size[1]) * int(count[1])
        caching = _CACHING.search(labels)
        flags.add(caching[1] if caching is not None else b"")
    if not flags:
        tokens = max((int(digits) * 10 ** int(power or 0) for digits, power in _SGLANG.findall(metrics)), default=0)
    return Cache(
        tokens=tokens if tokens <= _MOST else 0,
        caching=False if b"False" in flags else True if flags == {b"True"} else None,
        caches=max(1, len(lines)),
    )
