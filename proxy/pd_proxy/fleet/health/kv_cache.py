"""What an engine's metrics say of its KV cache: how much it holds, and whether prompts find each other's beginnings in
it."""

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
_MOST = 1 << 40  # tokens; no engine has as many


class Cache(msgspec.Struct, frozen=True):
    """One engine's KV cache.

    Attributes:
        tokens: that it has place for; 0 where it does not say.
        caching: it has a prefix cache; None where it does not say.
        caches: of how many data-parallel ranks the tokens are the sum.
    """

    tokens: int = 0
    caching: bool | None = None
    caches: int = 1


def read_cache(metrics: bytes) -> Cache:
    """What a page of /metrics says.

    vLLM shows a line for each data-parallel engine behind the page, and any of them may get a request: their tokens are
    added up, and there is prefix caching where all have it. SGLang shows one for each rank, most of them of one cache:
    the largest counts.
    """
    tokens = 0
    said: set[bytes] = set()
    lines = _VLLM.findall(metrics)
    for labels in lines:
        size, count = _BLOCK_SIZE.search(labels), _BLOCKS.search(labels)
        if size is not None and count is not None:
            tokens += int(size[1]) * int(count[1])
        caching = _CACHING.search(labels)
        said.add(caching[1] if caching is not None else b"")
    if not said:
        tokens = max((int(digits) * 10 ** int(power or 0) for digits, power in _SGLANG.findall(metrics)), default=0)
    return Cache(
        tokens=tokens if tokens <= _MOST else 0,
        caching=False if b"False" in said else True if said == {b"True"} else None,
        caches=max(1, len(lines)),
    )
