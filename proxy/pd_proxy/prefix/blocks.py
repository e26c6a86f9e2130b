"""Where the blocks of a prompt end.

The ends depend on nothing but the distance from the prompt's start, so two prompts that begin alike have the same
blocks as far as they are alike. Blocks grow with that distance: where much is shared already, some more or less of it
decides nothing (an entry for 512 tokens places as well as one for 64), and a prompt of 10^6 tokens has some hundred
blocks and not ten thousand.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate, chain, repeat

import msgspec


class Blocks(msgspec.Struct, frozen=True):
    """One rule of where blocks end. The unit is a byte of text, or a token id.

    Attributes:
        ends: units from the prompt's start to the end of each block.
        sizes: units of each block.
    """

    ends: tuple[int, ...]
    sizes: tuple[int, ...]

    def whole(self, units: int) -> int:
        """How many whole blocks a prompt of so many units has."""
        return bisect_right(self.ends, units)


def growing(steps: tuple[tuple[int, int], ...]) -> Blocks:
    """Blocks of a size up to a distance, then of the next size, and so on; there are none beyond the last distance.

    Arguments:
        steps: pairs of a distance and a size, which divides the distances before and after it.
    """
    sizes: list[int] = []
    start = 0
    for end, size in steps:
        sizes += repeat(size, (end - start) // size)
        start = end
    return Blocks(ends=tuple(accumulate(sizes)), sizes=tuple(sizes))


_KB, _MB = 1024, 1024 * 1024

TEXT = growing(((16 * _KB, 512), (64 * _KB, _KB), (512 * _KB, 4 * _KB), (4 * _MB, 16 * _KB), (64 * _MB, 64 * _KB)))
"""Of text, in bytes. 512 bytes are some 128 tokens: shorter prompts have nothing to be looked for. 4 MB have 416
blocks, and text beyond 64 MB is in none."""

IDS = growing(((2 * _KB, 16), (8 * _KB, 64), (32 * _KB, 256), (256 * _KB, _KB), (16 * _MB, 4 * _KB)))
"""Of token ids. All ends are multiples of 16, vLLM's default block size, and those of the first 2,048 tokens are all
multiples of it, so that what an engine says of its own blocks can be told exactly there."""

assert all(end % 16 == 0 for end in chain(IDS.ends, TEXT.ends))
