"""The sizes of a prompt's blocks.

Where a block ends depends only on the distance from the prompt's start, so two prompts have the same blocks as far as
they are equal. Blocks grow with that distance. Where two prompts share a long beginning, small differences in its
length do not change the placement, so larger blocks are exact enough. And a prompt of 10^6 tokens has some hundred
blocks instead of ten thousand.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate, chain, repeat

import msgspec


class Blocks(msgspec.Struct, frozen=True):
    """The layout of a prompt's blocks. The unit is a byte of text, or a token id.

    Attributes:
        ends: the units from the prompt's start to the end of each block.
        sizes: the units of each block.
    """

    ends: tuple[int, ...]
    sizes: tuple[int, ...]

    def whole(self, units: int) -> int:
        """The number of whole blocks in a prompt of so many units."""
        return bisect_right(self.ends, units)


def growing(steps: tuple[tuple[int, int], ...]) -> Blocks:
    """Make a layout in which blocks have the first size up to the first distance, then the second size, and so on.
    There are no blocks beyond the last distance.

    Arguments:
        steps: pairs of a distance and a size. The size divides this distance and the one before.
    """
    sizes: list[int] = []
    start = 0
    for end, size in steps:
        sizes += repeat(size, (end - start) // size)
        start = end
    return Blocks(ends=tuple(accumulate(sizes)), sizes=tuple(sizes))


_KB, _MB = 1024, 1024 * 1024

TEXT = growing(((16 * _KB, 512), (64 * _KB, _KB), (512 * _KB, 4 * _KB), (4 * _MB, 16 * _KB), (64 * _MB, 64 * _KB)))
"""The layout of text, in bytes. The first block is 512 bytes or about 128 tokens; shorter prompts have no block, and
are not looked up. 4 MB have 416 blocks. Text beyond 64 MB is in no block."""

IDS = growing(((2 * _KB, 16), (8 * _KB, 64), (32 * _KB, 256), (256 * _KB, _KB), (16 * _MB, 4 * _KB)))
"""The layout of token ids. All ends are multiples of 16, which is vLLM's default block size. Up to 2,048 tokens every
multiple of 16 is an end, so that an engine's own blocks are blocks of the index there."""

assert all(end % 16 == 0 for end in chain(IDS.ends, TEXT.ends))
