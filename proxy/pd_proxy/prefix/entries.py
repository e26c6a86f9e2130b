"""What the prefix index holds of one engine, and of each request whose answer is awaited there.

The entries of an engine are its blocks in the order of their last use. An entry's value is one number: the ordinal of
its last use, whether another worker used it, and its tokens.
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
    ABSENT = "absent"  # it says so
    BLIND = "blind"  # it never finds anything


class Pending(msgspec.Struct, gc=False):
    """One request at an engine, until its answer.

    Attributes:
        stamp: its ordinal.
        settled: ordinals below this had been computed when it was sent.
        depth: blocks that the engine was believed to have.
        uses: when they had last been used: pairs of a block's number and an ordinal, the last block first; an ordinal
            holds for the blocks before it too, down to the next pair's.
    """

    chain: Chain
    stamp: int
    settled: int
    depth: int
    uses: list[tuple[int, int]]

    def last_use(self, block: int) -> int:
        """The ordinal of a block's last use before this request."""
        found = 0
        for number, value in self.uses:
            if number < block:
                break
            found = value
        return found


class EngineEntries:
    """What the index holds of one engine.

    Attributes:
        capacity: tokens of its KV cache.
        limit: how many of them, as they are estimated here, it is believed to keep prompts in.
        part: the part of its cache that does so; running requests take the rest.
        estimated, reported: tokens of its prompts of late, here and by itself.
        ratio: the second for each of the first.
        used: estimated tokens of all entries.
        misses: answers in succession that found nothing, where something was believed.
        pending: requests whose answers are awaited.
        computing: ordinals of those that have not been computed yet.
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
        """Set the limit, by what is known of the engine."""
        self.limit = int(self.capacity * self.part / self.ratio)
