"""The prefix index: what each engine is believed to have in its prefix cache.

A prompt is entered when it is sent to an engine, before the engine has computed it, so that a burst of requests with
one new prefix goes to one engine. Like in the engine's own cache, the entries of an engine are in the order of their
last use, and the oldest are dropped when they exceed the tokens that the cache holds. The engine's answers correct
this: where an engine has found less of a prompt than was believed, it must have dropped the missing blocks, and so also
all blocks that were last used before these.

Invariant: of a chain's blocks an engine holds the first ones, and the last of these is dropped first. Only `remove` and
`withdraw` can leave a gap. Blocks behind a gap are ignored.
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
"""Tokens of the KV cache of an engine that does not report its size. The value is small, since it costs less to believe
that too little is cached than to believe that too much is."""

MAX_CAPACITY = 1 << 32  # tokens; an engine that reports more is believed to have this
MOST_ENTRIES = 1 << 19
"""Entries of all engines together. 64 engines of 10^6 tokens each have as many if all prompts are short."""

_MAX_PENDING = 4096  # unanswered requests that are kept of one engine; the oldest are dropped, and correct nothing
_MAX_BLIND = 8  # answers in a row that found nothing against expectation, after which an engine counts as `BLIND`
_SLACK = 0.25  # part of what was believed that may be missing without a loss, since bytes only estimate tokens
_MAX_SAMPLES = 512  # instants that are kept to compute the age of entries

_MANY = 1 << 17  # estimated tokens of prompts after which the ratio of reported to estimated tokens is computed anew
_LEAST_PART = 0.25  # the part of an engine's cache that is always believed to keep prompts
_LOSS = 0.8  # one loss lowers the part by at most this factor, since it may have been a restart
# The part grows back towards 1 by this share of the difference: when more is found than was believed, and when as much.
_SURPLUS, _FINE = 1 / 16, 1 / 256
_MAX_RATIO = 4  # the bound of reported tokens per estimated token, and of the inverse


def rank_name(engine: str, rank: int) -> str:
    """The name of a data-parallel rank in the index. Where the gateway chooses the rank, each rank is an engine of its
    own there, since each has a cache of its own."""
    return f"{engine}#{rank}"


_ON = Caching.ON


class Journal(Protocol):
    """Receives the changes of an index that other workers have to make too (`workers/prefix_ring.py`)."""

    def entered(self, engine: str, chain: Chain) -> None:
        """A prompt was sent to an engine."""

    def trimmed(self, engine: str, tokens: int) -> None:
        """The oldest entries of an engine were dropped, until so many tokens were left."""


class Figures(msgspec.Struct, frozen=True):
    """The index in numbers, for metrics.

    Attributes:
        entries: the number of entries of all engines.
        blocks: the number of different blocks among them.
        bytes: the estimated memory.
        oldest: the seconds since the last use of the least recently used entry; 0 where there is none.
        evictions: the entries that were dropped because an engine or its share was full, since the start.
        forgotten: the entries that were dropped because an engine had lost them.
        refused: the reports of engines that could not be true.
    """

    entries: int
    blocks: int
    bytes: int
    oldest: float
    evictions: int
    forgotten: int
    refused: int


_ENTRY_BYTES = 100  # memory of an engine's entry: a node and a slot of its ordered dictionary
_BLOCK_BYTES = 90  # memory of a block: a slot of the table, the hash, some of the bits


class PrefixIndex:
    """The index of all engines of one gateway worker.

    Engines are named by their URLs, and their data-parallel ranks by `rank_name`. Calls for an engine that has not
    joined do nothing.

    Arguments:
        most_entries: the bound of the entries of all engines together. Each engine has an equal share of it.
    Attributes:
        journal: receives what is entered and dropped here.
        cached: returns the tokens of a prompt that each engine is believed to have (`BlockTable.cached`).
        joins: how often an engine has joined or left.
    """

    def __init__(self, most_entries: int = MOST_ENTRIES) -> None:
        self.journal: Journal | None = None
        self.joins = 0
        self._most = most_entries
        self._blocks = BlockTable(most_entries)
        self.cached = self._blocks.cached
        self._engines: dict[str, EngineEntries] = {}
        self._samples: deque[tuple[float, int]] = deque()  # instants, and the first ordinal after each
        self._sample_step = 1.0
        self._next_sample = -inf
        self._forgotten = self._refused = 0

    @property
    def engines(self) -> KeysView[str]:
        """The engines that have joined."""
        return self._engines.keys()

    def join(self, engine: str, capacity_tokens: int = 0, caching: bool = True) -> None:
        """Add an engine, or update one that has joined already.

        Arguments:
            capacity_tokens: the tokens of its KV cache; 0 where the engine does not report it.
            caching: whether it has a prefix cache.
        """
        one = self._engines.get(engine)
        if one is None:
            self.joins += 1
            one = self._engines[engine] = self._blocks.add(engine)
            self._blocks.share = max(1, self._most // len(self._engines))
        one.capacity = min(capacity_tokens, MAX_CAPACITY) if capacity_tokens > 0 else DEFAULT_CAPACITY
        one.bound()
        if not caching:
            self.disable(engine)
        elif one.caching is Caching.ABSENT:
            one.caching = Caching.ON
        self._blocks.fit(one)

    def leave(self, engine: str) -> None:
        """Remove an engine with its entries."""
        one = self._engines.pop(engine, None)
        if one is not None:
            self.joins += 1
            self._blocks.discard(one)
            self._blocks.share = max(1, self._most // max(1, len(self._engines)))

    def clear(self, engine: str) -> None:
        """Drop an engine's entries, since its cache is empty: it was restarted, reset, or put to sleep."""
        one = self._engines.get(engine)
        if one is not None:
            self._blocks.drop_all(one)
            one.misses = 0
            if one.caching is Caching.BLIND:
                one.caching = Caching.ON
            if self.journal is not None:
                self.journal.trimmed(engine, 0)

    def disable(self, engine: str) -> None:
        """Note that an engine has no prefix cache, until `join` says otherwise."""
        one = self._engines.get(engine)
        if one is not None:
            self._blocks.drop_all(one)
            one.caching = Caching.ABSENT

    def enter(self, engine: str, chain: Chain, now: float = 0.0) -> None:
        """Enter a prompt that is sent to an engine. `correct`, `settle` or `withdraw` is called later with the same
        chain.

        Arguments:
            now: the time of a monotonic clock, in seconds, for the age of entries.
        """
        one = self._engines.get(engine)
        if one is None or one.caching is not _ON or not chain.hashes:
            return
        if now >= self._next_sample:
            self._sample(now)
        stamp = self._blocks.stamp + 1
        pending = one.pending
        computing = one.computing
        settled = next(iter(computing.values())) if computing else stamp
        uses: list[tuple[int, int]] = []
        depth = self._blocks.use(one, chain, len(chain.hashes), 0, uses)
        name = id(chain)
        if name in pending:  # the same request was sent there before
            del pending[name]
            computing.pop(name, None)
        elif len(pending) >= _MAX_PENDING:
            oldest = next(iter(pending))
            del pending[oldest]
            computing.pop(oldest, None)
        pending[name] = Pending(chain, stamp, settled, depth, uses)
        computing[name] = stamp
        if self.journal is not None:
            self.journal.entered(engine, chain)

    def computed(self, engine: str, chain: Chain) -> None:
        """Note that an engine has computed a prompt, since its first token has come.

        The call may be left out where the answer ends soon after. But a stream may last for minutes. Without this call
        a prompt that the engine has lost could not be told from one that it has not computed yet.
        """
        one = self._engines.get(engine)
        if one is not None:
            one.computing.pop(id(chain), None)

    def entered_elsewhere(self, engine: str, chain: Chain) -> None:
        """Enter a prompt that another worker has sent to an engine."""
        one = self._engines.get(engine)
        if one is not None and one.caching is Caching.ON:
            self._blocks.use(one, chain, len(chain.hashes), ELSEWHERE, None)

    def trimmed_elsewhere(self, engine: str, tokens: int) -> None:
        """Drop the oldest entries of an engine until so many tokens are left, as another worker has done."""
        one = self._engines.get(engine)
        if one is not None:
            before = len(one.entries)
            while one.used > tokens and one.entries:
                self._blocks.drop_oldest(one)
            self._forgotten += before - len(one.entries)

    def correct(self, engine: str, chain: Chain, cached_tokens: int, prompt_tokens: int) -> None:
        """Correct the entries of an engine by its answer, which says how much of the prompt was cached.

        A missing block was lost only where the request that used it last had been computed before this prompt was sent.

        Arguments:
            chain: the same object that was entered.
            cached_tokens, prompt_tokens: as the engine reports them. Impossible values are counted and ignored.
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
        one.reported += max(tokens // _MAX_RATIO, min(tokens * _MAX_RATIO, prompt_tokens))
        if one.estimated > _MANY:
            self._learn_size(one)
        if cached_tokens and one.caching is Caching.BLIND:
            one.caching = Caching.ON
            one.misses = 0
        found = cached_tokens / prompt_tokens * chain.units
        if pending is None:  # its entries have been dropped since, or it was never entered
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
        """Drop a lost block, and all blocks that the engine had last used before it.

        Arguments:
            last_use: the ordinal of the lost block's last use.
            nothing_found: whether the engine found no block of the prompt.
        """
        before = len(one.entries)
        while one.entries and next(iter(one.entries.values())) >> SHIFT <= last_use:
            self._blocks.drop_oldest(one)
        self._forgotten += before - len(one.entries)
        kept = one.used * one.ratio / one.capacity
        one.part = max(_LEAST_PART, min(one.part, max(one.part * _LOSS, kept)))
        one.bound()
        one.misses = one.misses + 1 if nothing_found else 0
        if one.misses >= _MAX_BLIND:
            self._blocks.drop_all(one)
            one.caching = Caching.BLIND
        if self.journal is not None:
            self.journal.trimmed(engine, one.used)

    def settle(self, engine: str, chain: Chain) -> None:
        """Note that an engine has answered without saying how much of the prompt was cached."""
        one = self._engines.get(engine)
        if one is not None:
            one.pending.pop(id(chain), None)
            one.computing.pop(id(chain), None)

    def withdraw(self, engine: str, chain: Chain) -> None:
        """Drop the entries of a prompt that an engine has not computed, except those that were used again since."""
        one = self._engines.get(engine)
        if one is None or (pending := one.pending.pop(id(chain), None)) is None:
            return
        one.computing.pop(id(chain), None)
        get = one.entries.get
        for hashed in chain.hashes[pending.depth :]:
            if get(hashed, 0) >> SHIFT == pending.stamp:
                self._blocks.drop(one, hashed)

    def store(self, engine: str, hashes: Sequence[int], sizes: Sequence[int]) -> None:
        """Enter blocks that an engine has stored, by its KV events.

        Arguments:
            hashes: the hashes of blocks that follow one another, in order.
            sizes: the tokens of each block.
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
        """Drop blocks that an engine has removed, by its KV events."""
        one = self._engines.get(engine)
        if one is not None:
            for hashed in hashes:
                if hashed in one.entries:
                    self._blocks.drop(one, hashed)

    def figures(self, now: float) -> Figures:
        """The index in numbers. The cost grows with the number of engines."""
        engines = self._engines.values()
        entries = sum(len(one.entries) for one in engines)
        oldest = min((next(iter(one.entries.values())) >> SHIFT for one in engines if one.entries), default=0)
        since = now
        if oldest:
            place = bisect_right(self._samples, oldest, key=lambda sample: sample[1])
            since = self._samples[place - 1][0] if place else now
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
        """The estimated tokens that an engine is believed to hold."""
        one = self._engines.get(engine)
        return one.used if one is not None else 0

    def caching(self, engine: str) -> Caching | None:
        """Whether an engine has a prefix cache; None where it has not joined."""
        one = self._engines.get(engine)
        return one.caching if one is not None else None

    def _learn_size(self, one: EngineEntries) -> None:
        """Update the ratio of reported to estimated tokens, since an engine's cache is bounded by real tokens. Entries
        that now exceed the limit are dropped at the next use."""
        one.ratio = one.reported / one.estimated
        one.bound()
        one.estimated /= 2
        one.reported /= 2

    def _sample(self, now: float) -> None:
        """Keep the present instant. When there are too many, every second one is dropped, and the interval is
        doubled."""
        self._samples.append((now, self._blocks.stamp + 1))
        self._next_sample = now + self._sample_step
        if len(self._samples) > _MAX_SAMPLES:
            self._samples = deque([sample for number, sample in enumerate(self._samples) if number % 2 == 0])
            self._sample_step *= 2
