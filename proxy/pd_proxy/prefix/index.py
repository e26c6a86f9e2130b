"""What each engine is believed to have in its prefix cache.

A prompt is entered when it is sent to an engine, before the engine has computed it, so that a burst of one new prefix
goes to one engine. For each engine the entries are in the order of their last use, as the engine's own cache is, and
the oldest are dropped when they come to more tokens than that cache has. What an engine reports of its cache corrects
this: one that finds less than was believed has dropped what it lost and all that it had used before that.

One table has a bit for each engine that holds a block, so a look for all engines at once costs about what a look for
one does.

Invariant: of the blocks of a chain an engine holds the first few, and the last of these is dropped first; `remove` and
`withdraw` alone may leave a gap, and what is behind a gap counts for nothing.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Iterable, KeysView, Mapping, Sequence
from enum import Enum
from itertools import compress
from math import inf
from typing import Protocol

import msgspec

from pd_proxy.prefix.chain import Chain

DEFAULT_CAPACITY = 1 << 18
"""Tokens of the KV cache of an engine that does not say: a small one, since to believe too little costs less than to
believe what is not so."""

MOST_CAPACITY = 1 << 32  # tokens; more is not believed
MOST_ENTRIES = 1 << 19
"""Entries of all engines together. 64 engines of 10^6 tokens each have as many if all prompts are short."""

_MOST_PENDING = 4096  # requests at one engine whose answers are awaited; of the oldest beyond that nothing is learnt
_MOST_BLIND = 8  # answers in succession that found nothing, where something was believed: it has no prefix cache
_SLACK = 0.25  # of what was believed: by so much bytes may mislead about tokens before a loss is one
_FEW = 32  # engines that are named one by one
_MOST_NAMED = 256  # sets of engines whose names are kept
_MOST_MARKS = 512  # instants that are remembered, for the age of entries

_MANY = 1 << 17  # estimated tokens of prompts after which it is looked at how many there really were
_LEAST_PART = 0.25  # of an engine's cache that is believed to keep prompts, whatever it loses
_LOSS = 0.8  # of that part is left at the most by one loss, which may have been a restart
_SURPLUS, _FINE = (
    1 / 16,
    1 / 256,
)  # of what is missing from the whole comes back when more is found than believed, or as much
_MOST_RATIO = 4  # reported for each estimated token, and the other way round

# An entry's value: the ordinal of its last use, whether another worker used it, its tokens.
_SHIFT = 16
_ELSEWHERE = 1 << 15
_WEIGHT = _ELSEWHERE - 1


def rank_name(engine: str, rank: int) -> str:
    """What one of an engine's data-parallel ranks is called in the index. Each has a cache of its own, and so is an
    engine of its own there, where the gateway chooses the rank."""
    return f"{engine}#{rank}"


class Caching(Enum):
    """Whether an engine has a prefix cache."""

    ON = "on"
    ABSENT = "absent"  # it says so
    BLIND = "blind"  # it never finds anything


_ON = Caching.ON


class Journal(Protocol):
    """What is told of changes that other workers should know of (`workers/prefix_ring.py`)."""

    def entered(self, engine: str, chain: Chain) -> None: ...

    def trimmed(self, engine: str, tokens: int) -> None:
        """An engine has lost what it had used least lately, but for so many tokens."""


class Figures(msgspec.Struct, frozen=True):
    """The index in numbers, for metrics.

    Attributes:
        entries: blocks held, over all engines.
        blocks: different ones among them.
        bytes: of memory, estimated.
        oldest: seconds since the entry was used that has not been used for longest; 0 where there is none.
        evictions: entries dropped for want of room, since the start.
        forgotten: entries dropped because an engine had lost them.
        refused: reports that could not be true.
    """

    entries: int
    blocks: int
    bytes: int
    oldest: float
    evictions: int
    forgotten: int
    refused: int


_ENTRY_BYTES = 100  # of one entry of an engine: a node and a slot of its ordered dictionary
_BLOCK_BYTES = 90  # of one block: a slot of the table, the hash, some of the bits


class _Pending(msgspec.Struct, gc=False):
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


class _Engine:
    """One engine's part of the index.

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
        self.pending: dict[int, _Pending] = {}
        self.computing: dict[int, int] = {}

    def bound(self) -> None:
        """Set the limit, by what is known of the engine."""
        self.limit = int(self.capacity * self.part / self.ratio)


class PrefixIndex:
    """The index of all engines of one gateway worker.

    Engines are named by their URLs, their data-parallel ranks by `rank_name`. One that has not joined is nobody's: it
    holds nothing, and nothing is entered.

    Arguments:
        most_entries: bound of the entries of all engines together, which have equal shares of it.
    Attributes:
        journal: is told what is entered and lost here.
        joins: how often an engine has come or gone.
    """

    def __init__(self, most_entries: int = MOST_ENTRIES) -> None:
        self.journal: Journal | None = None
        self.joins = 0
        self._most = most_entries
        self._share = most_entries
        self._table: dict[int, int] = {}
        self._engines: dict[str, _Engine] = {}
        self._urls: list[str] = []  # by slot; empty where the slot is free
        self._free: list[int] = []
        self._named: dict[int, tuple[str, ...]] = {}  # the engines of sets of bits, as they were asked for of late
        self._stamp = 0
        self._marks: deque[tuple[float, int]] = deque()  # instants, and the first ordinal that was given after each
        self._mark_step = 1.0
        self._next_mark = -inf
        self._evictions = self._forgotten = self._refused = 0

    @property
    def engines(self) -> KeysView[str]:
        """The engines that are there."""
        return self._engines.keys()

    def join(self, engine: str, capacity_tokens: int = 0, caching: bool = True) -> None:
        """An engine is there. For one that has been there already: its capacity may be another.

        Arguments:
            capacity_tokens: of its KV cache; 0 where it does not say.
            caching: it has a prefix cache.
        """
        one = self._engines.get(engine)
        if one is None:
            if self._free:
                slot = self._free.pop()
            else:
                slot = len(self._urls)
                self._urls.append("")
            self._urls[slot] = engine
            self._named.clear()
            self.joins += 1
            one = self._engines[engine] = _Engine(slot)
            self._share = max(1, self._most // len(self._engines))
        one.capacity = min(capacity_tokens, MOST_CAPACITY) if capacity_tokens > 0 else DEFAULT_CAPACITY
        one.bound()
        if not caching:
            self.disable(engine)
        elif one.caching is Caching.ABSENT:
            one.caching = Caching.ON
        self._fit(one)

    def leave(self, engine: str) -> None:
        """An engine has gone for good."""
        one = self._engines.pop(engine, None)
        if one is not None:
            self.joins += 1
            self._drop_all(one)
            self._urls[one.slot] = ""
            self._named.clear()
            self._free.append(one.slot)
            self._share = max(1, self._most // max(1, len(self._engines)))

    def clear(self, engine: str) -> None:
        """An engine's cache is empty: it was started anew, reset, or put to sleep."""
        one = self._engines.get(engine)
        if one is not None:
            self._drop_all(one)
            one.misses = 0
            if one.caching is Caching.BLIND:
                one.caching = Caching.ON
            if self.journal is not None:
                self.journal.trimmed(engine, 0)

    def disable(self, engine: str) -> None:
        """An engine has no prefix cache. `join` takes that back."""
        one = self._engines.get(engine)
        if one is not None:
            self._drop_all(one)
            one.caching = Caching.ABSENT

    def cached(self, chain: Chain) -> Mapping[str, int]:
        """Tokens of a prompt that each engine is believed to have; those that have none are absent."""
        table, named = self._table, self._named
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
        """The engines of a set of bits. Prompts that begin alike have the same, request after request."""
        urls, names = self._urls, []
        if mask.bit_count() <= _FEW:
            rest = mask
            while rest:
                slot = rest.bit_length() - 1
                names.append(urls[slot])
                rest ^= 1 << slot
        else:
            names = list(compress(urls, f"{mask:b}"[::-1].encode().translate(_BITS)))
        if len(self._named) >= _MOST_NAMED:
            self._named.clear()
        found = self._named[mask] = tuple(names)
        return found

    def enter(self, engine: str, chain: Chain, now: float = 0.0) -> None:
        """A prompt is sent to an engine. What comes of it is told by `correct`, `settle` or `withdraw` with this very
        chain.

        Arguments:
            now: seconds, never going back; for the age of entries.
        """
        one = self._engines.get(engine)
        if one is None or one.caching is not _ON or not chain.hashes:
            return
        if now >= self._next_mark:
            self._mark(now)
        stamp = self._stamp + 1
        pending = one.pending
        computing = one.computing
        settled = next(iter(computing.values())) if computing else stamp
        uses: list[tuple[int, int]] = []
        depth = self._use(one, chain, len(chain.hashes), 0, uses)
        name = id(chain)
        if name in pending:  # it was sent there before
            del pending[name]
            computing.pop(name, None)
        elif len(pending) >= _MOST_PENDING:
            oldest = next(iter(pending))
            del pending[oldest]
            computing.pop(oldest, None)
        pending[name] = _Pending(chain, stamp, settled, depth, uses)
        computing[name] = stamp
        if self.journal is not None:
            self.journal.entered(engine, chain)

    def computed(self, engine: str, chain: Chain) -> None:
        """An engine has computed a prompt, though its answer goes on: its first token has come.

        It is not needed where the answer ends soon after. A stream may last for minutes, and a loss of what was sent
        since it began would not be told from what is still on its way.
        """
        one = self._engines.get(engine)
        if one is not None:
            one.computing.pop(id(chain), None)

    def entered_elsewhere(self, engine: str, chain: Chain) -> None:
        """Another worker has sent a prompt to an engine."""
        one = self._engines.get(engine)
        if one is not None and one.caching is Caching.ON:
            self._use(one, chain, len(chain.hashes), _ELSEWHERE, None)

    def trimmed_elsewhere(self, engine: str, tokens: int) -> None:
        """Another worker has learnt that an engine has lost what it had used least lately, but for so many tokens."""
        one = self._engines.get(engine)
        if one is not None:
            before = len(one.entries)
            while one.used > tokens and one.entries:
                self._drop_oldest(one)
            self._forgotten += before - len(one.entries)

    def correct(self, engine: str, chain: Chain, cached_tokens: int, prompt_tokens: int) -> None:
        """An engine has answered, and says what it had found in its own cache.

        A block that was lost tells something only if whoever had used it last was computed before this prompt was sent.

        Arguments:
            chain: the very one that was entered.
            cached_tokens, prompt_tokens: as the engine reports them. What cannot be true is refused.
        """
        one = self._engines.get(engine)
        if one is None or not chain.hashes:
            return
        pending = one.pending.pop(id(chain), None)
        one.computing.pop(id(chain), None)
        if not 0 <= cached_tokens <= prompt_tokens or prompt_tokens <= 0:
            self._refused += 1
            return
        tokens = chain.tokens
        one.estimated += tokens
        one.reported += max(tokens // _MOST_RATIO, min(tokens * _MOST_RATIO, prompt_tokens))
        if one.estimated > _MANY:
            self._learn_size(one)
        if cached_tokens and one.caching is Caching.BLIND:
            one.caching = Caching.ON
            one.misses = 0
        found = cached_tokens / prompt_tokens * chain.units
        if pending is None:  # sent before it was cleared, or by nobody here
            if one.caching is Caching.ON:
                self._use(one, chain, min(chain.blocks.whole(int(found)), len(chain.hashes)), 0, None)
            return
        depth = pending.depth
        if one.caching is not Caching.ON:
            return
        blocks = chain.blocks
        believed = blocks.ends[depth - 1] if depth else 0
        slack = blocks.sizes[max(0, depth - 1)] + (0 if chain.exact else believed * _SLACK)
        if found + slack >= believed:
            one.misses = 0
            if one.part < 1:
                one.part += (1 - one.part) * (_SURPLUS if found > believed + slack else _FINE)
                one.bound()
            return
        lost = pending.last_use(min(bisect_right(blocks.ends, found + slack), depth - 1))
        if lost & _ELSEWHERE or lost >> _SHIFT >= pending.settled:
            return
        before = len(one.entries)
        while one.entries and next(iter(one.entries.values())) >> _SHIFT <= lost >> _SHIFT:
            self._drop_oldest(one)
        self._forgotten += before - len(one.entries)
        kept = one.used * one.ratio / one.capacity
        one.part = max(_LEAST_PART, min(one.part, max(one.part * _LOSS, kept)))
        one.bound()
        one.misses = 0 if cached_tokens else one.misses + 1
        if one.misses >= _MOST_BLIND:
            self._drop_all(one)
            one.caching = Caching.BLIND
        if self.journal is not None:
            self.journal.trimmed(engine, one.used)

    def settle(self, engine: str, chain: Chain) -> None:
        """An engine has answered, and says nothing of its cache."""
        one = self._engines.get(engine)
        if one is not None:
            one.pending.pop(id(chain), None)
            one.computing.pop(id(chain), None)

    def withdraw(self, engine: str, chain: Chain) -> None:
        """An engine has not computed a prompt that it was sent: what nobody else has used since is dropped."""
        one = self._engines.get(engine)
        if one is None or (pending := one.pending.pop(id(chain), None)) is None:
            return
        one.computing.pop(id(chain), None)
        get = one.entries.get
        for hashed in chain.hashes[pending.depth :]:
            if get(hashed, 0) >> _SHIFT == pending.stamp:
                self._drop(one, hashed)

    def store(self, engine: str, hashes: Sequence[int], sizes: Sequence[int]) -> None:
        """An engine says that it has stored blocks.

        Arguments:
            hashes: of blocks that follow one another, the first one first.
            sizes: tokens of each.
        """
        one = self._engines.get(engine)
        if one is None or one.caching is Caching.ABSENT:
            return
        one.caching = Caching.ON
        self._stamp += 1
        for hashed, size in zip(reversed(hashes), reversed(sizes), strict=True):
            self._hold(one, hashed, self._stamp << _SHIFT | max(1, min(size, _WEIGHT)))
        self._fit(one)

    def remove(self, engine: str, hashes: Iterable[int]) -> None:
        """An engine says that it has dropped blocks."""
        one = self._engines.get(engine)
        if one is not None:
            for hashed in hashes:
                if hashed in one.entries:
                    self._drop(one, hashed)

    def figures(self, now: float) -> Figures:
        """The index in numbers; costs a step for each engine."""
        engines = self._engines.values()
        entries = sum(len(one.entries) for one in engines)
        oldest = min((next(iter(one.entries.values())) >> _SHIFT for one in engines if one.entries), default=0)
        since = now
        if oldest:
            place = bisect_right(self._marks, oldest, key=lambda mark: mark[1])
            since = self._marks[place - 1][0] if place else now
        return Figures(
            entries=entries,
            blocks=len(self._table),
            bytes=entries * _ENTRY_BYTES + len(self._table) * _BLOCK_BYTES,
            oldest=max(0.0, now - since),
            evictions=self._evictions,
            forgotten=self._forgotten,
            refused=self._refused,
        )

    def tokens(self, engine: str) -> int:
        """Tokens that an engine is believed to hold."""
        one = self._engines.get(engine)
        return one.used if one is not None else 0

    def caching(self, engine: str) -> Caching | None:
        """Whether an engine has a prefix cache; None where it has not joined."""
        one = self._engines.get(engine)
        return one.caching if one is not None else None

    def _use(self, one: _Engine, chain: Chain, count: int, flag: int, uses: list[tuple[int, int]] | None) -> int:
        """Use the first `count` blocks of a chain, the last one first, so that it will be the first to be dropped.

        Arguments:
            uses: gets the values that there were, as `_Pending` has them.
        Returns:
            How many of the first blocks there were.
        """
        self._stamp += 1
        base = self._stamp << _SHIFT | flag
        entries, table, bit = one.entries, self._table, one.bit
        get, move, holders = entries.get, entries.move_to_end, table.get
        hashes, sizes, scale = chain.hashes, chain.blocks.sizes, chain.scale
        used, depth, size, weight, value, last = one.used, count, 0, 0, 0, -1
        for number in range(count - 1, -1, -1):
            hashed = hashes[number]
            if sizes[number] != size:
                size = sizes[number]
                weight = int(size * scale)
                weight = 1 if weight < 1 else _WEIGHT if weight > _WEIGHT else weight
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
                used += weight - (old & _WEIGHT)
                if uses is not None and old >> 15 != last:
                    last = old >> 15
                    uses.append((number, old))
        one.used = used
        if used > one.limit or len(entries) > self._share:
            self._fit(one)
        return depth

    def _learn_size(self, one: _Engine) -> None:
        """Learn how many tokens there are in one that was estimated, since an engine's cache is full of the former.
        What this makes too much is dropped at the next use."""
        one.ratio = one.reported / one.estimated
        one.bound()
        one.estimated /= 2
        one.reported /= 2

    def _hold(self, one: _Engine, hashed: int, value: int) -> None:
        """One engine holds one block."""
        old = one.entries.get(hashed)
        if old is None:
            self._table[hashed] = self._table.get(hashed, 0) | one.bit
            one.entries[hashed] = value
            one.used += value & _WEIGHT
        else:
            one.entries[hashed] = value
            one.entries.move_to_end(hashed)
            one.used += (value & _WEIGHT) - (old & _WEIGHT)

    def _fit(self, one: _Engine) -> None:
        """Drop what is more than an engine can hold, or than its share of the index."""
        before = len(one.entries)
        while one.used > one.limit or len(one.entries) > self._share:
            self._drop_oldest(one)
        self._evictions += before - len(one.entries)

    def _drop_oldest(self, one: _Engine) -> None:
        hashed, value = one.entries.popitem(last=False)
        one.used -= value & _WEIGHT
        self._release(one, hashed)

    def _drop(self, one: _Engine, hashed: int) -> None:
        one.used -= one.entries.pop(hashed) & _WEIGHT
        self._release(one, hashed)

    def _drop_all(self, one: _Engine) -> None:
        for hashed in one.entries:
            self._release(one, hashed)
        one.entries.clear()
        one.used = 0
        one.pending.clear()
        one.computing.clear()

    def _release(self, one: _Engine, hashed: int) -> None:
        mask = self._table[hashed] ^ one.bit
        if mask:
            self._table[hashed] = mask
        else:
            del self._table[hashed]

    def _mark(self, now: float) -> None:
        """Remember an instant. When there are many, every second one is forgotten, and they are rarer from then on."""
        self._marks.append((now, self._stamp + 1))
        self._next_mark = now + self._mark_step
        if len(self._marks) > _MOST_MARKS:
            self._marks = deque([mark for number, mark in enumerate(self._marks) if number % 2 == 0])
            self._mark_step *= 2


_BITS = bytes.maketrans(b"01", b"\0\1")
