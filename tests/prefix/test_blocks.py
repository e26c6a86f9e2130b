"""Where blocks end."""

from __future__ import annotations

import pytest
from pd_proxy.prefix.blocks import IDS, TEXT, Blocks, growing


def test_blocks_grow_with_the_distance_from_the_start() -> None:
    blocks = growing(((8, 2), (16, 4)))
    assert blocks == Blocks(ends=(2, 4, 6, 8, 12, 16), sizes=(2, 2, 2, 2, 4, 4))
    assert [blocks.whole(units) for units in (0, 1, 2, 7, 8, 11, 16, 1000)] == [0, 0, 1, 3, 4, 4, 6, 6]


@pytest.mark.parametrize("blocks", [TEXT, IDS])
def test_a_block_is_small_compared_with_the_prompt_before_it_and_a_long_prompt_has_few_blocks(blocks: Blocks) -> None:
    relative = [size / end for size, end in zip(blocks.sizes, blocks.ends, strict=True)]
    assert max(relative[32:]) <= 1 / 16
    assert blocks.whole(4_000_000) < 1500
    assert all(end % size == 0 for size, end in zip(blocks.sizes, blocks.ends, strict=True))


def test_prompts_of_ids_begin_with_the_engines_own_blocks() -> None:
    assert set(IDS.sizes[:128]) == {16}
    assert IDS.ends[127] == 2048
