"""What each engine is believed to have in its prefix cache.

A prompt is entered when it is sent to an engine, before the engine has computed it, so that a burst of one new prefix
goes to one engine. For each engine the entries are in the order of their last use, as the engine's own cache is, and
the oldest are dropped when they come to more tokens than that cache has. What an engine reports of its cache corrects
this: one that finds less than was believed has dropped what it lost and all that it had used before that.

Invariant: of the blocks of a chain an engine holds the first few, and the last of these is dropped first; `remove` and
`withdraw` alone may leave a gap, and what is behind a gap counts for nothing.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, KeysView, Sequence
from math import inf
from typing import Protocol

import msgspec

from pd_proxy.prefix.chain import Chain
from pd_proxy.prefix.entries import ELSEWHERE, SHIFT, WEIGHT, Caching, EngineEntries, Pending
from pd_proxy.prefix.table import BlockTable

DEFAULT_CAPACITY = 1 << 18
"""Tokens of the KV cache of an engine that does not say: a small one, since to believe too little costs less than to
believe what is not so."""

MOST_CAPACITY = 1 << 32  # tokens; more is not believed
MOST_ENTRIES = 1 << 19
"""Entries of all engines together. 64 engines of 10^6 tokens each have as many if all prompts are short."""

_MOST_PENDING = 4096  # requests at one engine whose answers are awaited; of the oldest beyond that nothing is learnt
_MOST_BLIND = 8  # answers in succession that found nothing, where something was believed: it has no prefix cache
_SLACK = 0.25  # of what was believed: by so much bytes may mislead about tokens before a loss is one
_MOST_MARKS = 512  # instants that are remembered, for the age of entries

_MANY = 1 << 17  # estimated tokens of prompts after which it is looked at how many there really were
_LEAST_PART = 0.25  # of an engine's cache that is believed to keep prompts, whatever it loses
_LOSS = 0.8  # of that part is left at the most by one loss, which may have been a restart
_SURPLUS, _FINE = (
    1 / 16,
    1 / 256,
)  # of what is missing from the whole comes back when more is found than believed, or as much
_MOST_RATIO = 4  # reported for each estimated token, and the other way round


def rank_name(engine: str, rank: int) -> str:
    """What one of an engine's data-parallel ranks is called in the index. Each has a cache of its own, and so is an
    engine of its own there, where the gateway chooses the rank."""
    return f"{engine}#{rank}"


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


class PrefixIndex:
    """The index of all engines of one gateway worker.

    Engines are named by their URLs, their data-parallel ranks by `rank_name`. One that has not joined is nobody's: it
    holds nothing, and nothing is entered.

    Arguments:
        most_entries: bound of the entries of all engines together, which have equal shares of it.
    Attributes:
        journal: is told what is entered and lost here.
        cached: tokens of a prompt that each engine is believed to have (`BlockTable.cached`).
        joins: how often an engine has come or gone.
    """

    def __init__(self, most_entries: int = MOST_ENTRIES) -> None:
        self.journal: Journal | None = None
        self.joins = 0
        self._most = most_entries
        self._blocks = BlockTable(most_entries)
        self.cached = self._blocks.cached
        self._engines: dict[str, EngineEntries] = {}
        self._marks: deque[tuple[float, int]] = deque()  # instants, and the first ordinal that was given after each
        self._mark_step = 1.0
        self._next_mark = -inf
        self._forgotten = self._refused = 0

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
            self.joins += 1
            one = self._engines[engine] = self._blocks.add(engine)
            self._blocks.share = max(1, self._most // len(self._engines))
        one.capacity = min(capacity_tokens, MOST_CAPACITY) if capacity_tokens > 0 else DEFAULT_CAPACITY
        one.bound()
        if not caching:
            self.disable(engine)
        elif one.caching is Caching.ABSENT:
            one.caching = Caching.ON
        self._blocks.fit(one)

    def leave(self, engine: str) -> None:
        """An engine has gone for good."""
        one = self._engines.pop(engine, None)
        if one is not None:
            self.joins += 1
            self._blocks.discard(one)
            self._blocks.share = max(1, self._most // max(1, len(self._engines)))

    def clear(self, engine: str) -> None:
        """An engine's cache is empty: it was started anew, reset, or put to sleep."""
        one = self._engines.get(engine)
        if one is not None:
            self._blocks.drop_all(one)
            one.misses = 0
            if one.caching is Caching.BLIND:
                one.caching = Caching.ON
            if self.journal is not None:
                self.journal.trimmed(engine, 0)

    def disable(self, engine: str) -> None:
        """An engine has no prefix cache. `join` takes that back."""
        one = self._engines.get(engine)
        if one is not None:
            self._blocks.drop_all(one)
            one.caching = Caching.ABSENT

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
        stamp = self._blocks.stamp + 1
        pending = one.pending
        computing = one.computing
        settled = next(iter(computing.values())) if computing else stamp
        uses: list[tuple[int, int]] = []
        depth = self._blocks.use(one, chain, len(chain.hashes), 0, uses)
        name = id(chain)
        if name in pending:  # it was sent there before
            del pending[name]
            computing.pop(name, None)
        elif len(pending) >= _MOST_PENDING:
            oldest = next(iter(pending))
            del pending[oldest]
            computing.pop(oldest, None)
        pending[name] = Pending(chain, stamp, settled, depth, uses)
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
            self._blocks.use(one, chain, len(chain.hashes), ELSEWHERE, None)

    def trimmed_elsewhere(self, engine: str, tokens: int) -> None:
        """Another worker has learnt that an engine has lost what it had used least lately, but for so many tokens."""
        one = self._engines.get(engine)
        if one is not None:
            before = len(one.entries)
            while one.used > tokens and one.entries:
                self._blocks.drop_oldest(one)
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
                self._blocks.use(one, chain, min(chain.blocks.whole(int(found)), len(chain.hashes)), 0, None)
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
        if not lost & ELSEWHERE and lost >> SHIFT < pending.settled:
            self._lose(engine, one, lost >> SHIFT, nothing_found=not cached_tokens)

    def _lose(self, engine: str, one: EngineEntries, last_use: int, *, nothing_found: bool) -> None:
        """An engine has lost a block: what it had used before that block's last use is lost too.

        Arguments:
            last_use: the ordinal of that use.
            nothing_found: the engine found no block of the prompt at all.
        """
        before = len(one.entries)
        while one.entries and next(iter(one.entries.values())) >> SHIFT <= last_use:
            self._blocks.drop_oldest(one)
        self._forgotten += before - len(one.entries)
        kept = one.used * one.ratio / one.capacity
        one.part = max(_LEAST_PART, min(one.part, max(one.part * _LOSS, kept)))
        one.bound()
        one.misses = one.misses + 1 if nothing_found else 0
        if one.misses >= _MOST_BLIND:
            self._blocks.drop_all(one)
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
            if get(hashed, 0) >> SHIFT == pending.stamp:
                self._blocks.drop(one, hashed)

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
        self._blocks.stamp += 1
        for hashed, size in zip(reversed(hashes), reversed(sizes), strict=True):
            self._blocks.hold(one, hashed, self._blocks.stamp << SHIFT | max(1, min(size, WEIGHT)))
        self._blocks.fit(one)

    def remove(self, engine: str, hashes: Iterable[int]) -> None:
        """An engine says that it has dropped blocks."""
        one = self._engines.get(engine)
        if one is not None:
            for hashed in hashes:
                if hashed in one.entries:
                    self._blocks.drop(one, hashed)

    def figures(self, now: float) -> Figures:
        """The index in numbers; costs a step for each engine."""
        engines = self._engines.values()
        entries = sum(len(one.entries) for one in engines)
        oldest = min((next(iter(one.entries.values())) >> SHIFT for one in engines if one.entries), default=0)
        since = now
        if oldest:
            place = bisect_right(self._marks, oldest, key=lambda mark: mark[1])
            since = self._marks[place - 1][0] if place else now
        return Figures(
            entries=entries,
            blocks=len(self._blocks.holders),
            bytes=entries * _ENTRY_BYTES + len(self._blocks.holders) * _BLOCK_BYTES,
            oldest=max(0.0, now - since),
            evictions=self._blocks.evictions,
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

    def _learn_size(self, one: EngineEntries) -> None:
        """Learn how many tokens there are in one that was estimated, since an engine's cache is full of the former.
        What this makes too much is dropped at the next use."""
        one.ratio = one.reported / one.estimated
        one.bound()
        one.estimated /= 2
        one.reported /= 2

    def _mark(self, now: float) -> None:
        """Remember an instant. When there are many, every second one is forgotten, and they are rarer from then on."""
        self._marks.append((now, self._blocks.stamp + 1))
        self._next_mark = now + self._mark_step
        if len(self._marks) > _MOST_MARKS:
            self._marks = deque([mark for number, mark in enumerate(self._marks) if number % 2 == 0])
            self._mark_step *= 2
