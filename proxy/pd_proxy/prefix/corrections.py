"""Applies KV events to the prefix index, between the engines' caches (`engine_cache.py`) and the index.

Events are about blocks of token ids. The index has prompts in the form in which clients send them, which mostly is
text. So events have to be translated:

- Prompts of ids are in the index under the same hashes that events lead to. These hashes are passed on only after a
  client has sent such a prompt. Before, no request would look them up, and they would displace other entries.
- Prompts of text are in the index under hashes of text. Where the ids of a prompt are known (from its engine, or from a
  tokenizer), each end of a block of text is mapped to a block of ids. What an event says of that block of ids is
  applied to the block of text.

Entries are still made when a request is sent. Events only add and remove entries, and no request waits for them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from pd_proxy.prefix.blocks import IDS
from pd_proxy.prefix.chain import Chain, chain_of_ids, root_of_ids

MOST_TEXTS = 1 << 17
"""The most blocks of text that are mapped to blocks of ids: some 4,000 prompts of 16 kB that share nothing; 20 MB."""
_MAX_KNOWN = 4096  # prompts of text whose ids have been learnt, and are not learnt again
_STEP = 256  # entries that are passed on in one step
_COUNT = 1 << 16  # one block in the upper bits of a value of `Held.sizes`; the size below is at most 4096


class Index(Protocol):
    """The methods of `PrefixIndex` that are used here."""

    def store(self, engine: str, hashes: Sequence[int], sizes: Sequence[int]) -> None: ...

    def remove(self, engine: str, hashes: Iterable[int]) -> None: ...

    def clear(self, engine: str) -> None: ...

    def caching(self, engine: str) -> object | None: ...


class Held:
    """The hashes of ids that one publisher holds: an engine, or one of its data-parallel ranks, each of which is an
    engine of its own in the index."""

    def __init__(self, engine: str, corrections: Corrections) -> None:
        self.engine = engine
        self._corrections = corrections
        self.sizes: dict[int, int] = {}  # by hash: how many of its blocks have it (times `_COUNT`), plus its tokens

    def stored(self, hashes: Sequence[int], sizes: Sequence[int]) -> None:
        """Count blocks that it has stored, and pass on those that it did not hold (`Holder`)."""
        held = self.sizes
        new, of = [], []
        for hashed, size in zip(hashes, sizes, strict=True):
            known = held.get(hashed)
            if known is None:
                held[hashed] = _COUNT | size
                new.append(hashed)
                of.append(size)
            else:
                held[hashed] = known + _COUNT
        if new:
            self._corrections.stored(self.engine, new, of)

    def removed(self, hashes: Iterable[int]) -> None:
        """Count blocks that it has removed, and pass on those that it holds no more (`Holder`)."""
        held = self.sizes
        gone = []
        for hashed in hashes:
            known = held.get(hashed)
            if known is not None:
                if known < 2 * _COUNT:
                    del held[hashed]
                    gone.append(hashed)
                else:
                    held[hashed] = known - _COUNT
        if gone:
            self._corrections.removed(self.engine, gone)

    def cleared(self) -> None:
        """Forget all blocks, and pass that on (`Holder`)."""
        self.sizes.clear()
        self._corrections.cleared(self.engine)


class Corrections:
    """Translates what all engines' events say into changes of the index.

    Arguments:
        key: the key of the hashes, as for `chain_of`.
        most_texts: the most blocks of text that are mapped to blocks of ids.
    Attributes:
        ids_wanted: whether a client has sent a prompt of ids.
        held: the hashes that each publisher holds, by its name.
    """

    def __init__(self, index: Index, key: bytes, *, most_texts: int = MOST_TEXTS) -> None:
        self._index = index
        self._key = key
        self._most_texts = most_texts
        self._texts: OrderedDict[int, tuple[int, int]] = OrderedDict()  # ids' hash: the text's hash, and its tokens
        self._known: OrderedDict[int, None] = OrderedDict()  # the last hash of each prompt whose ids were learnt
        self.ids_wanted = False
        self.held: dict[str, Held] = {}

    @property
    def texts(self) -> int:
        """The number of blocks of text that are mapped to blocks of ids."""
        return len(self._texts)

    def join(self, engine: str) -> Held:
        """Add a publisher: an engine or one of its ranks, which will publish events."""
        held = self.held[engine] = Held(engine, self)
        return held

    def leave(self, engine: str) -> None:
        """Remove a publisher, which publishes no more events. The index keeps its entries."""
        self.held.pop(engine, None)

    def want_ids(self) -> Iterator[None]:
        """Pass on all known hashes of ids, step by step, since a client has sent a prompt of ids."""
        self.ids_wanted = True
        for engine in list(self.held):
            yield from self.restore(engine)

    def restore(self, engine: str) -> Iterator[None]:
        """Enter all that a publisher holds into the index, step by step, since the index may have lost it."""
        held = self.held.get(engine)
        if held is None:
            return
        newest_first = list(held.sizes)[::-1]  # of what the index is passed, it drops the last first
        for start in range(0, len(newest_first), _STEP):
            still = [hashed for hashed in newest_first[start : start + _STEP] if hashed in held.sizes]
            self.stored(engine, still, [held.sizes[hashed] % _COUNT for hashed in still])
            yield

    def knows(self, chain: Chain) -> bool:
        """Whether the ids of a prompt need not be learnt: the prompt consists of ids, or its ids are known."""
        return chain.exact or not chain.hashes or chain.hashes[-1] in self._known

    def learn(self, chain: Chain, ids: Iterable[int], model: str, cache_salt: str = "") -> None:
        """Map the blocks of a prompt of text to blocks of its ids.

        Arguments:
            chain: the chain of the text.
            ids: the token ids of the prompt.
            model, cache_salt: those of the request.
        Raises:
            OverflowError: an id has more than 32 bits, or is negative.
        """
        if self.knows(chain):
            return
        of_ids = chain_of_ids(ids, root_of_ids(model, self._key, cache_salt), self._key)
        self._known[chain.hashes[-1]] = None
        if len(self._known) > _MAX_KNOWN:
            self._known.popitem(last=False)
        ratio = of_ids.units / chain.units
        new: list[tuple[int, int, int]] = []
        texts = self._texts
        for place, (hashed, end) in enumerate(zip(chain.hashes, chain.blocks.ends, strict=False)):
            at = bisect_left(IDS.ends, end * ratio)
            if at >= len(of_ids.hashes):
                break
            id_hash = of_ids.hashes[at]
            if id_hash not in texts:
                size = max(1, int(chain.blocks.sizes[place] * ratio))
                texts[id_hash] = (hashed, size)
                new.append((id_hash, hashed, size))
            else:
                texts.move_to_end(id_hash)
        while len(texts) > self._most_texts:
            texts.popitem(last=False)
        if new:
            for held in self.held.values():
                known = [(hashed, size) for id_hash, hashed, size in new if id_hash in held.sizes]
                if known:
                    self._index.store(held.engine, [one for one, _ in known], [size for _, size in known])

    def stored(self, engine: str, hashes: Sequence[int], sizes: Sequence[int]) -> None:
        """Enter blocks of ids that a publisher has newly stored."""
        if self.ids_wanted:
            self._index.store(engine, hashes, sizes)
        if self._texts:
            known = [found for hashed in hashes if (found := self._texts.get(hashed)) is not None]
            if known:
                self._index.store(engine, [one for one, _ in known], [size for _, size in known])

    def removed(self, engine: str, hashes: Sequence[int]) -> None:
        """Remove blocks of ids that a publisher holds no more."""
        if self.ids_wanted:
            self._index.remove(engine, hashes)
        if self._texts:
            known = [found[0] for hashed in hashes if (found := self._texts.get(hashed)) is not None]
            if known:
                self._index.remove(engine, known)

    def joined(self, engine: str) -> bool:
        """Whether the index has the engine, and so takes changes for it."""
        return self._index.caching(engine) is not None

    def cleared(self, engine: str) -> None:
        """Remove everything that an engine had."""
        self._index.clear(engine)
