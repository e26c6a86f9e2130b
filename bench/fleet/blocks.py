"""An engine's prefix cache: hash-chained blocks, the least recently used one evicted first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

BLOCK = 128
"""Tokens of one simulated block. vLLM's have 16. Larger blocks cost less time, and lose at most 127 tokens of a
match."""


class BlockCache:
    """Which blocks an engine holds.

    Arguments:
        capacity: tokens that fit into the engine's KV cache; 0 where prefix caching is off.
    """

    __slots__ = ("_blocks", "capacity")

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity // BLOCK
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def matched(self, chain: Sequence[int]) -> int:
        """Tokens of the longest prefix of `chain` that is held."""
        # The cache holds the start of a chain: a request that uses a block uses all blocks before it, and `touch` makes
        # these newer.
        held, low, high = self._blocks, 0, len(chain)
        while low < high:
            middle = (low + high + 1) // 2
            if chain[middle - 1] in held:
                low = middle
            else:
                high = middle - 1
        return low * BLOCK

    def touch(self, chain: Sequence[int], taken: int = 0) -> None:
        """Mark the whole chain as used last. Its end is evicted before its start, in the order in which vLLM frees
        blocks.

        Arguments:
            taken: tokens of the KV cache that are held outside of any chain, and so cannot hold blocks.
        """
        held = self._blocks
        move = held.move_to_end
        for block in reversed(chain):
            held[block] = None
            move(block)
        surplus = len(held) + taken // BLOCK - self.capacity
        while surplus > 0 and held:
            held.popitem(last=False)
            surplus -= 1

    def clear(self) -> None:
        """Drop all blocks, as a restarted engine does."""
        self._blocks.clear()
