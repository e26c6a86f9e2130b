"""What KV events correct in the index: the stage between the engines' caches and the index.

Events tell of token ids. The index knows prompts by what clients send, which is text mostly, and so whatever is told of
ids has to be carried over:

- prompts of ids are entered in the index by the very hashes that events lead to. These are passed on once a client has
  sent such a prompt: until then nobody would look for them, and they would take the place of others.
- prompts of text are entered by hashes of text. Where the ids of a prompt are known (its engine has reported them, or a
  tokenizer has made them), the end of each block of its text belongs to a place among its ids, and what becomes of that
  place becomes of the text.

Entries made at dispatch stay what they are: events add and remove, and nothing waits for them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from pd_proxy.prefix.blocks import IDS
from pd_proxy.prefix.chain import Chain, chain_of_ids, root_of_ids

MOST_TEXTS = 1 << 17
"""Ends of blocks of text whose place among ids is known: some 4,000 prompts of 16 kB that share nothing; 20 MB."""
_MOST_KNOWN = 4096  # prompts of text that are not learnt from again
_PATIENCE = 256  # entries that are passed on in one step
_COUNT = 1 << 16  # above the size, which is at most 4096


class Index(Protocol):
    """What is corrected: `PrefixIndex`."""

    def store(self, engine: str, hashes: Sequence[int], sizes: Sequence[int]) -> None: ...

    def remove(self, engine: str, hashes: Iterable[int]) -> None: ...

    def clear(self, engine: str) -> None: ...

    def caching(self, engine: str) -> object | None: ...


class Held:
    """The hashes of ids that one publisher has: an engine, or one of its data-parallel ranks, which to the index is an
    engine of its own."""

    def __init__(self, engine: str, corrections: Corrections) -> None:
        self.engine = engine
        self._corrections = corrections
        self.sizes: dict[int, int] = {}  # how many blocks have it, and its tokens

    def stored(self, hashes: Sequence[int], sizes: Sequence[int]) -> None:
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
        self.sizes.clear()
        self._corrections.cleared(self.engine)


class Corrections:
    """What events say of all engines, on its way to the index.

    Arguments:
        key: of the hashes, as for `chain_of`.
    Attributes:
        ids_wanted: a client has sent a prompt of ids.
        held: by engine.
    """

    def __init__(self, index: Index, key: bytes, *, most_texts: int = MOST_TEXTS) -> None:
        self._index = index
        self._key = key
        self._most_texts = most_texts
        self._texts: OrderedDict[int, tuple[int, int]] = OrderedDict()  # by the ids' hash: the text's, and its tokens
        self._known: OrderedDict[int, None] = OrderedDict()  # the last hash of each prompt that was learnt from
        self.ids_wanted = False
        self.held: dict[str, Held] = {}

    @property
    def texts(self) -> int:
        """Ends of blocks of text whose place among ids is known."""
        return len(self._texts)

    def join(self, engine: str) -> Held:
        """An engine is going to tell of its cache, or one of its ranks."""
        held = self.held[engine] = Held(engine, self)
        return held

    def leave(self, engine: str) -> None:
        """An engine does not tell any more; what is believed of it stays."""
        self.held.pop(engine, None)

    def want_ids(self) -> Iterator[None]:
        """A client has sent a prompt of ids: pass on what is known of ids, step by step."""
        self.ids_wanted = True
        for engine in list(self.held):
            yield from self.restore(engine)

    def restore(self, engine: str) -> Iterator[None]:
        """The index knows nothing of an engine, or not all: tell it what the engine has, step by step."""
        held = self.held.get(engine)
        if held is None:
            return
        newest_first = list(held.sizes)[::-1]  # the index drops the last of what it is given first
        for start in range(0, len(newest_first), _PATIENCE):
            still = [hashed for hashed in newest_first[start : start + _PATIENCE] if hashed in held.sizes]
            self.stored(engine, still, [held.sizes[hashed] % _COUNT for hashed in still])
            yield

    def knows(self, chain: Chain) -> bool:
        """Whether there is nothing to be learnt from the ids of a prompt: they are its own, or are known."""
        return chain.exact or not chain.hashes or chain.hashes[-1] in self._known

    def learn(self, chain: Chain, ids: Iterable[int], model: str, cache_salt: str = "") -> None:
        """The ids of a prompt of text are known.

        Arguments:
            chain: of the text.
            model, cache_salt: of the request.
        Raises:
            OverflowError: an id has more than 32 bits, or is negative.
        """
        if self.knows(chain):
            return
        of_ids = chain_of_ids(ids, root_of_ids(model, self._key, cache_salt), self._key)
        self._known[chain.hashes[-1]] = None
        if len(self._known) > _MOST_KNOWN:
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
        """An engine has blocks of ids that it had not."""
        if self.ids_wanted:
            self._index.store(engine, hashes, sizes)
        if self._texts:
            known = [found for hashed in hashes if (found := self._texts.get(hashed)) is not None]
            if known:
                self._index.store(engine, [one for one, _ in known], [size for _, size in known])

    def removed(self, engine: str, hashes: Sequence[int]) -> None:
        """An engine has blocks of ids no more."""
        if self.ids_wanted:
            self._index.remove(engine, hashes)
        if self._texts:
            known = [found[0] for hashed in hashes if (found := self._texts.get(hashed)) is not None]
            if known:
                self._index.remove(engine, known)

    def joined(self, engine: str) -> bool:
        """Whether the index takes what is told of an engine."""
        return self._index.caching(engine) is not None

    def cleared(self, engine: str) -> None:
        """An engine has nothing any more."""
        self._index.clear(engine)
