"""The state of the prefix index for one engine, and for each request that the engine has not answered yet.

An engine's entries are its blocks in the order of their last use. The value of an entry packs three things into one
number: the ordinal of its last use, whether that was by another worker, and its tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from enum import Enum

import msgspec

from pd_proxy.prefix.chain import Chain

SHIFT = 16
"""An entry's value, shifted right by this, is the ordinal of its last use."""
ELSEWHERE = 1 << 15
"""The bit of an entry's value that says that another worker used it last."""
WEIGHT = ELSEWHERE - 1
"""The bits of an entry's value that are its tokens."""


class Caching(Enum):
    """Whether an engine has a prefix cache."""

    ON = "on"
    ABSENT = "absent"  # the engine says that it has none
    BLIND = "blind"  # it has found nothing several times in a row where something was believed to be cached


class Pending(msgspec.Struct, gc=False):
    """A request at an engine that has not answered yet.

    Attributes:
        chain: the chain of its prompt.
        stamp: the ordinal that its entries got.
        settled: the engine had computed all requests of lower ordinals when this one was sent.
        depth: how many of its blocks the engine was believed to have.
        uses: when these were last used: pairs of a block's number and an entry's value, the last block first. A value
            also holds for the blocks before it, down to the block of the next pair.
    """

    chain: Chain
    stamp: int
    settled: int
    depth: int
    uses: list[tuple[int, int]]

    def last_use(self, block: int) -> int:
        """The value that a block's entry had before this request."""
        found = 0
        for number, value in self.uses:
            if number < block:
                break
            found = value
        return found


class EngineEntries:
    """The entries of one engine, and what was learnt of its cache.

    Attributes:
        capacity: the tokens of its KV cache.
        limit: the estimated tokens of prompts that it is believed to keep in its prefix cache.
        part: the part of its KV cache that keeps prompts; running requests take the rest.
        estimated, reported: the tokens of its recent prompts, as estimated by the gateway and as reported by the
            engine.
        ratio: reported tokens per estimated token.
        used: the estimated tokens of all entries.
        misses: answers in a row that found nothing in the cache where something was believed to be there.
        pending: the requests that it has not answered, by the `id` of their chains.
        computing: the ordinals of those whose prompts it has not computed, likewise.
    """

    __slots__ = (
        *("bit", "caching", "capacity", "computing", "entries", "estimated", "limit", "misses", "part", "pending"),
        *("ratio", "reported", "slot", "used"),
    )

    def __init__(self, slot: int) -> None:
        self.slot = slot
        self.bit = 1 << slot
        self.capacity = self.limit = 0
        self.estimated = self.reported = 0.0
        self.ratio = self.part = 1.0
        self.caching = Caching.ON
        self.entries: OrderedDict[int, int] = OrderedDict()
        self.used = 0
        self.misses = 0
        self.pending: dict[int, Pending] = {}
        self.computing: dict[int, int] = {}

    def bound(self) -> None:
        """Compute the limit anew from the capacity, the part and the ratio."""
        self.limit = int(self.capacity * self.part / self.ratio)
