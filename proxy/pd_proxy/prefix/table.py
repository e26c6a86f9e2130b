"""The block table: which engines hold which blocks.

For each block the table has one number with a bit for each engine. So a prompt is looked up for all engines at about
the cost of looking it up for one.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import compress

from pd_proxy.prefix.chain import Chain
from pd_proxy.prefix.entries import SHIFT, WEIGHT, EngineEntries

_FEW = 32  # engines up to which the bits of a set are read one by one
_MAX_NAMED = 256  # sets of engines whose names are cached
_BITS = bytes.maketrans(b"01", b"\0\1")


class BlockTable:
    """The blocks by their hashes. Each engine has a slot, which is its bit.

    Attributes:
        holders: for each block the engines that hold it, a bit for each.
        urls: the engines' names by slot; empty where the slot is free.
        stamp: the ordinal of the last use of any block.
        share: the most entries that one engine may have.
        evictions: the number of entries that were dropped because an engine or its share was full.
    """

    def __init__(self, share: int) -> None:
        self.holders: dict[int, int] = {}
        self.urls: list[str] = []
        self.stamp = 0
        self.share = share
        self.evictions = 0
        self._free: list[int] = []
        self._named: dict[int, tuple[str, ...]] = {}  # a cache of `_names`

    def add(self, engine: str) -> EngineEntries:
        """Take a slot for an engine. Returns its entries, of which there are none yet."""
        if self._free:
            slot = self._free.pop()
        else:
            slot = len(self.urls)
            self.urls.append("")
        self.urls[slot] = engine
        self._named.clear()
        return EngineEntries(slot)

    def discard(self, one: EngineEntries) -> None:
        """Drop an engine's entries and free its slot."""
        self.drop_all(one)
        self.urls[one.slot] = ""
        self._named.clear()
        self._free.append(one.slot)

    def cached(self, chain: Chain) -> Mapping[str, int]:
        """The tokens of a prompt that each engine is believed to have. Engines that have none are absent."""
        table, named = self.holders, self._named
        held: dict[str, int] = {}
        hashes = chain.hashes
        if not hashes:
            return held
        mask = table.get(hashes[0], 0)
        if not mask:
            return held
        count = 0
        for hashed in hashes:
            still = mask & table.get(hashed, 0)
            if still != mask:
                if count:
                    gone = mask ^ still
                    held.update(dict.fromkeys(named.get(gone) or self._names(gone), chain.tokens_of(count)))
                if not still:
                    return held
                mask = still
            count += 1
        held.update(dict.fromkeys(named.get(mask) or self._names(mask), chain.tokens_of(count)))
        return held

    def _names(self, mask: int) -> tuple[str, ...]:
        """The engines of a set of bits. Cached, since requests whose prompts begin alike have the same sets."""
        urls, names = self.urls, []
        if mask.bit_count() <= _FEW:
            rest = mask
            while rest:
                slot = rest.bit_length() - 1
                names.append(urls[slot])
                rest ^= 1 << slot
        else:
            names = list(compress(urls, f"{mask:b}"[::-1].encode().translate(_BITS)))
        if len(self._named) >= _MAX_NAMED:
            self._named.clear()
        found = self._named[mask] = tuple(names)
        return found

    def use(self, one: EngineEntries, chain: Chain, count: int, flag: int, uses: list[tuple[int, int]] | None) -> int:
        """Enter the first `count` blocks of a chain as the most recently used ones.

        The last block is entered first, and so is dropped first.

        Arguments:
            flag: `ELSEWHERE` where another worker uses them, else 0.
            uses: the values that the entries had are appended to it, in the form of `Pending.uses`.
        Returns:
            How many blocks the engine had from the chain's start on.
        """
        self.stamp += 1
        base = self.stamp << SHIFT | flag
        entries, table, bit = one.entries, self.holders, one.bit
        get, move, holders = entries.get, entries.move_to_end, table.get
        hashes, sizes, scale = chain.hashes, chain.blocks.sizes, chain.scale
        used, depth, size, weight, value, last = one.used, count, 0, 0, 0, -1
        for number in range(count - 1, -1, -1):
            hashed = hashes[number]
            if sizes[number] != size:
                size = sizes[number]
                weight = int(size * scale)
                weight = 1 if weight < 1 else WEIGHT if weight > WEIGHT else weight
                value = base | weight
            old = get(hashed)
            if old is None:
                depth = number
                mask = holders(hashed)
                table[hashed] = bit if mask is None else mask | bit
                entries[hashed] = value
                used += weight
            else:
                entries[hashed] = value
                move(hashed)
                used += weight - (old & WEIGHT)
                if uses is not None and old >> 15 != last:
                    last = old >> 15
                    uses.append((number, old))
        one.used = used
        if used > one.limit or len(entries) > self.share:
            self.fit(one)
        return depth

    def hold(self, one: EngineEntries, hashed: int, value: int) -> None:
        """Enter a block as the most recently used one of an engine."""
        old = one.entries.get(hashed)
        if old is None:
            self.holders[hashed] = self.holders.get(hashed, 0) | one.bit
            one.entries[hashed] = value
            one.used += value & WEIGHT
        else:
            one.entries[hashed] = value
            one.entries.move_to_end(hashed)
            one.used += (value & WEIGHT) - (old & WEIGHT)

    def fit(self, one: EngineEntries) -> None:
        """Drop the oldest entries that exceed an engine's limit, or its share of the index."""
        before = len(one.entries)
        while one.used > one.limit or len(one.entries) > self.share:
            self.drop_oldest(one)
        self.evictions += before - len(one.entries)

    def drop_oldest(self, one: EngineEntries) -> None:
        hashed, value = one.entries.popitem(last=False)
        one.used -= value & WEIGHT
        self._release(one, hashed)

    def drop(self, one: EngineEntries, hashed: int) -> None:
        one.used -= one.entries.pop(hashed) & WEIGHT
        self._release(one, hashed)

    def drop_all(self, one: EngineEntries) -> None:
        for hashed in one.entries:
            self._release(one, hashed)
        one.entries.clear()
        one.used = 0
        one.pending.clear()
        one.computing.clear()

    def _release(self, one: EngineEntries, hashed: int) -> None:
        mask = self.holders[hashed] ^ one.bit
        if mask:
            self.holders[hashed] = mask
        else:
            del self.holders[hashed]
