"""The identity of an engine, read from its pages."""

from __future__ import annotations

import json

import pytest
from pd_proxy.fleet.health.identity import EngineIdentity, read_block_size, read_identity

LINE = 'vllm:cache_config_info{_block_size_resolved="True",block_size="%s",cache_dtype="auto",engine="%d"} 1.0\n'
METRICS = b"# HELP x\nvllm:num_requests_running 0.0\n" + (LINE % (32, 0)).encode()
MODELS = json.dumps({"object": "list", "data": [{"id": "m", "max_model_len": 2048}, {"id": "adapter"}]}).encode()
VERSION = b'{"version":"0.32.0"}'


def test_an_identity_is_read_from_three_pages() -> None:
    identity = read_identity(METRICS, MODELS, VERSION)
    assert identity is not None
    assert (identity.block_size, identity.version, identity.context) == (32, "0.32.0", 2048)


@pytest.mark.parametrize(
    "pages",
    [
        (b"", MODELS, VERSION),
        (METRICS, b"", VERSION),
        (METRICS, MODELS, b""),
        (METRICS, MODELS, b'{"version":""}'),
        (METRICS, b'{"data":[{"id":"m"}]}', VERSION),
        (METRICS, b'{"data":[{"max_model_len":"long"}]}', VERSION),
    ],
)
def test_pages_that_lack_a_part_are_no_identity(pages: tuple[bytes, bytes, bytes]) -> None:
    assert read_identity(*pages) is None


@pytest.mark.parametrize(
    ("page", "size"),
    [
        (LINE % (16, 0) + LINE % (16, 1), 16),
        (LINE % (16, 0) + LINE % (32, 1), 0),  # either of the two may get a request
        (LINE % (0, 0), 0),
        (LINE % ("None", 0), 0),
        ('vllm:cache_config_info{mamba_block_size="16"} 1.0\n', 0),
        ('vllm:cache_config_info{block_size="64"}', 64),
        ('other{block_size="64"} 1.0\n', 0),
    ],
)
def test_a_block_size_is_that_of_every_engine_behind_the_page(page: str, size: int) -> None:
    assert read_block_size(page.encode()) == size


def test_identities_with_equal_values_are_not_equal() -> None:
    """An identity that was read again may be of another process."""
    assert EngineIdentity(16, "1", 100) != EngineIdentity(16, "1", 100)
    assert EngineIdentity(16, "1", 100).fits(EngineIdentity(16, "1", 100))
    assert not EngineIdentity(16, "1", 99).fits(EngineIdentity(16, "1", 100))
    assert not EngineIdentity(32, "1", 100).fits(EngineIdentity(16, "1", 100))
    assert not EngineIdentity(16, "2", 100).fits(EngineIdentity(16, "1", 100))
