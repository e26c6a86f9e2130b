"""The size of KV caches and prefix caching, read from engines' metrics."""

from __future__ import annotations

import pytest
from pd_proxy.fleet.health.kv_cache import Cache, read_cache

VLLM = (
    'vllm:cache_config_info{_block_size_resolved="True",block_size="16",cache_dtype="auto",cpu_kvcache_space_bytes="None",'
    'enable_prefix_caching="%s",engine="0",mamba_block_size="None",num_cpu_blocks="None",num_gpu_blocks="%s",'
    'num_gpu_blocks_override="None"} 1.0\n'
)


@pytest.mark.parametrize(
    ("page", "cache"),
    [
        (VLLM % ("True", 27_000), Cache(432_000, True)),
        (VLLM % ("False", 100), Cache(1_600, False)),
        (VLLM % ("True", 100) + VLLM % ("True", 50), Cache(2_400, True, 2)),
        (VLLM % ("True", 100) + VLLM % ("False", 50), Cache(2_400, False, 2)),
        (VLLM % ("None", "None"), Cache(0, None)),
        ('# HELP x\nvllm:cache_config_info{block_size="16"} 1.0\n', Cache()),
        ('vllm:cache_config_info{num_gpu_blocks="16"} 1.0\n', Cache()),
        (VLLM % ("True", 9_999_999_999) * 2, Cache(2 * 16 * 9_999_999_999, True, 2)),
        (VLLM % ("True", 9_999_999_999) * 90, Cache(0, True, 90)),
        (VLLM % ("True", 10**40), Cache(0, True)),
        ('x vllm:cache_config_info{block_size="16",num_gpu_blocks="16"} 1.0\n', Cache()),
        ('sglang:max_total_num_tokens{model_name="m",tp_rank="0"} 471258.0\n' * 2, Cache(471_258, None)),
        ("sglang:max_total_num_tokens 2e+06\n", Cache(2_000_000, None)),
        ("sglang:max_total_num_tokens NaN\n", Cache()),
        ("sglang:max_total_num_tokens 1e+99\n", Cache()),
        ("", Cache()),
    ],
)
def test_tokens_and_caching_are_read(page: str, cache: Cache) -> None:
    assert read_cache(page.encode()) == cache
