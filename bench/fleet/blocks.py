"""An engine's prefix cache: hash-chained blocks, the least recently used one evicted first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

BLOCK = 128
"""Tokens of one simulated block. vLLM's have 16; coarser ones cost less and lose at most 127 tokens of a match."""


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
        # What is held of a chain is its start: whoever uses a block uses all before it, and `touch` makes these newer.
        held, low, high = self._blocks, 0, len(chain)
        while low < high:
            middle = (low + high + 1) // 2
            if chain[middle - 1] in held:
                low = middle
            else:
                high = middle - 1
        return low * BLOCK

    def touch(self, chain: Sequence[int], taken: int = 0) -> None:
        """Hold the whole chain as used last, its end as the first part of it to be evicted, as vLLM frees blocks.

        Arguments:
            taken: tokens of the KV cache that are held by what is not in any chain, and so cannot hold blocks.
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
        """Forget everything, as a restarted engine has."""
        self._blocks.clear()
