"""What one engine has in its prefix cache, as its KV events tell it, in the terms of the index.

An engine names its blocks by hashes of its own, and says of each which block is before it and which token ids are in
it. From these the hashes follow that a prompt of ids has here (`chain.py`), wherever blocks of the index end within an
engine's block. What is told of blocks reaches the index as that: stored, removed, all gone.

An engine may lie about itself, which harms nobody but itself: how much is kept is bounded, and what does not add up is
counted and left out.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import msgspec

from pd_proxy.decoding import Undecodable
from pd_proxy.prefix.blocks import IDS
from pd_proxy.prefix.chain import link_ids, root_of_ids
from pd_proxy.prefix.kv_events import (
    BlockRemoved,
    BlockStored,
    Event,
    Hash,
    UnknownKind,
    read_batch,
    read_event,
)

MOST_BLOCKS = 1 << 18
"""Blocks that are known of one publisher: 4 M tokens in blocks of 16. Beyond that the oldest are forgotten."""
MOST_BYTES = 1 << 26
"""Bytes of token ids that are kept with them, for what will follow a block that ends where none of the index does."""
_LARGEST = 1 << 13
"""Tokens of a block. Engines have 16 to some thousand; all of a block's ids are hashed in one step."""
_PATIENCE = 64  # blocks that are looked at in one step
_PATIENCE_TOKENS = 1 << 12  # tokens likewise

_WHOLE = (None, "full_attention", "mla_attention", "sink_full_attention", "unknown")
"""Kinds of a hybrid model's caches that hold the prompt from its start. The others hold its end, or a state."""
_TIERS = {None: 1, "GPU": 1, "CPU": 2, "CPU_PINNED": 2, "STORAGE": 4, "DISK": 4}
_OTHER_TIER = 8


class Holder(Protocol):
    """Who is told which hashes an engine has."""

    def stored(self, hashes: Sequence[int], sizes: Sequence[int]) -> None:
        """It has blocks that follow one another.

        Arguments:
            sizes: tokens of each.
        """

    def removed(self, hashes: Iterable[int]) -> None:
        """It has them no more."""

    def cleared(self) -> None:
        """It has nothing any more."""


class _Block(msgspec.Struct, gc=False):
    """One block of an engine.

    Attributes:
        end: tokens from the prompt's start to its end.
        parent: the engine's name of the block before it; None where there is none.
        hashes: of the index's blocks that end in it.
        tail: the token ids behind the last of these ends, as an array's bytes; all of its ids where none is in it.
        tiers: where it is; a bit for each tier.
        root: the hash under all others, where it begins a prompt.
    """

    end: int
    parent: Hash | None
    hashes: tuple[int, ...]
    tail: bytes
    tiers: int
    root: int


class EngineCache:
    """What one publisher has said: an engine, or one of its data-parallel ranks.

    Arguments:
        holder: is told what becomes of the blocks.
        model_of: the name by which clients ask for a model, from an adapter's name, or from None for the base model;
            None where that is not known.
        key: of the hashes, as for `chain_of`.
        counts: by what became of events and blocks: `stored`, `removed`, `cleared`, `unplaced` (its parent is not
            known, or it depends on media), `ignored` (of another cache than the prompt's), `unknown` (kind of event),
            `malformed`.
        complain: is told what is wrong with events: a word, and a sentence for people.
    """

    def __init__(
        self,
        holder: Holder,
        model_of: Callable[[str | None], str | None],
        key: bytes,
        counts: Counter[str],
        complain: Callable[[str, str], object] = lambda what, why: None,
        *,
        most_blocks: int = MOST_BLOCKS,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        self._holder = holder
        self._model_of = model_of
        self._key = key
        self._counts = counts
        self._complain = complain
        self._most_blocks = most_blocks
        self._most_bytes = most_bytes
        self._blocks: dict[Hash, _Block] = {}
        self._bytes = 0
        self._other_groups: set[int] = set()
        self._roots: dict[tuple[str, str], int] = {}

    def __len__(self) -> int:
        """How many of the engine's blocks are known."""
        return len(self._blocks)

    def apply(self, payload: bytes) -> Iterator[None]:
        """Take a batch, step by step; between two steps all is as the events so far say.

        Arguments:
            payload: the batch as it was published.
        """
        try:
            events = read_batch(payload)
        except Undecodable as error:
            self._wrong("malformed", f"it is no batch of KV events: {error}")
            return
        for raw in events:
            try:
                event = read_event(raw)
            except UnknownKind as error:
                self._wrong("unknown", str(error))
            except Undecodable as error:
                self._wrong("malformed", f"an event is not as it should be: {error}")
            else:
                yield from self._apply(event)
            yield

    def clear(self) -> None:
        """Nothing is cached there any more."""
        self._blocks, self._bytes = {}, 0
        self._other_groups.clear()
        self._holder.cleared()

    def _wrong(self, what: str, why: str) -> None:
        self._counts[what] += 1
        self._complain(what, why)

    def _apply(self, event: Event) -> Iterator[None]:
        if isinstance(event, BlockStored):
            yield from self._store(event)
        elif isinstance(event, BlockRemoved):
            yield from self._remove(event)
        else:
            self._counts["cleared"] += 1
            self.clear()

    # Stored

    def _store(self, event: BlockStored) -> Iterator[None]:
        names, count = event.block_hashes, len(event.block_hashes)
        group = event.group_idx if isinstance(event.group_idx, int) else 0
        if event.locality == "REMOTE" or event.kv_cache_spec_kind not in _WHOLE:
            self._counts["ignored"] += count
            if event.locality != "REMOTE" and len(self._other_groups) < _PATIENCE:
                self._other_groups.add(group)
            return
        tier = _tier(event.medium)
        size, ids = event.block_size, event.token_ids
        if not ids:  # of a tier whose keeper knows no more than names
            self._store_names(names, tier)
            return
        if not 0 < size <= _LARGEST or len(ids) != size * count:
            self._wrong("malformed", f"{count} blocks of {size} tokens with {len(ids)} token ids are no blocks")
            return
        parent = event.parent_block_hash
        before = self._blocks.get(parent) if parent is not None else None
        root = 0
        if before is None:
            found = self._root(event) if parent is None else None
            if found is None:
                self._counts["unplaced"] += count
                return
            root = found
        yield from self._place(event, before, root, tier)

    def _store_names(self, names: Sequence[Hash], tier: int) -> None:
        """Blocks that are known have been copied to a tier."""
        for name in names:
            if (known := self._blocks.get(name)) is not None:
                known.tiers |= tier
            else:
                self._counts["unplaced"] += 1

    def _place(self, event: BlockStored, before: _Block | None, root: int, tier: int) -> Iterator[None]:
        """Place an event's blocks behind one another, a few in one step.

        Arguments:
            before: the block before the first one; None where that begins a prompt, under `root`.
        """
        names, count = event.block_hashes, len(event.block_hashes)
        size, ids, parent = event.block_size, event.token_ids, event.parent_block_hash
        hashes: list[int] = []
        sizes: list[int] = []
        patience = max(1, min(_PATIENCE, _PATIENCE_TOKENS // size))
        for number, name in enumerate(names):
            if number % patience == patience - 1:
                self._holder.stored(hashes, sizes)
                hashes, sizes = [], []
                self._fit()
                yield
            known = self._blocks.get(name)
            if known is None:
                try:
                    if not self._depends_on_media(event, number):
                        known = self._block(
                            before, parent, root, ids[number * size : number * size + size], hashes, sizes
                        )
                except OverflowError:
                    self._wrong("malformed", "a token id is no number of 32 bits")
                    break
                if known is None:
                    self._counts["unplaced"] += count - number
                    break
                self._blocks[name] = known
                self._bytes += len(known.tail)
                self._counts["stored"] += 1
            known.tiers |= tier
            parent, before = name, known
        if hashes:
            self._holder.stored(hashes, sizes)
        self._fit()

    def _fit(self) -> None:
        """Forget the oldest where there are too many."""
        while len(self._blocks) > self._most_blocks or self._bytes > self._most_bytes:
            self._drop(next(iter(self._blocks)))
            self._counts["forgotten"] += 1

    def _block(
        self,
        before: _Block | None,
        parent: Hash | None,
        root: int,
        ids: list[int],
        hashes: list[int],
        sizes: list[int],
    ) -> _Block | None:
        """The block that follows another, or begins a prompt; None where what is before it is not cached any more, so
        that it cannot be found. The hashes that end in it are appended to `hashes`, and their sizes to `sizes`.

        Raises:
            OverflowError: an id is no number of 32 bits.
        """
        start = before.end if before is not None else 0
        end = start + len(ids)
        first, last = IDS.whole(start), IDS.whole(end)
        tail = array("I", ids)
        if first == last:
            return _Block(end, parent, (), tail.tobytes(), 0, root)
        at = IDS.ends[first - 1] if first else 0
        previous, rest = self._behind(before, root, first, (start - at) * tail.itemsize)
        if previous is None:
            return None
        pending = array("I", rest)
        pending.extend(tail)
        own: list[int] = []
        for place in range(first, last):
            length = IDS.ends[place] - at
            previous = link_ids(previous, pending[:length], self._key)
            del pending[:length]
            at = IDS.ends[place]
            own.append(previous)
            sizes.append(IDS.sizes[place])
        hashes += own
        return _Block(end, parent, tuple(own), pending.tobytes(), 0, root)

    def _behind(self, block: _Block | None, root: int, place: int, size: int) -> tuple[int | None, bytes]:
        """The hash at the last end of an index's block at or before an engine's block's end, and the ids behind it; no
        hash where a block on the way is not cached any more, or has been stored anew behind another one.

        Arguments:
            root: of the prompt that begins behind, where there is no block.
            place: how many ends there are.
            size: bytes of the ids. An engine may have blocks follow each other in a ring, which has no end.
        """
        parts: list[bytes] = []
        while block is not None:
            parts.append(block.tail)
            size -= len(block.tail)
            if size < 0:
                return None, b""
            if block.hashes or block.parent is None:
                found = block.hashes[-1] if block.hashes else None if place else block.root
                return (None if size else found), b"".join(reversed(parts))
            block = self._blocks.get(block.parent)
            if block is None:
                return None, b""
        return root, b""

    def _root(self, event: BlockStored) -> int | None:
        """The hash under a prompt; None where it cannot be known."""
        adapter = event.lora_name if isinstance(event.lora_name, str) and event.lora_name else None
        if adapter is None and event.lora_id is not None:
            return None  # an adapter without its name
        model = self._model_of(adapter)
        keys = event.extra_keys[0] if isinstance(event.extra_keys, list) and event.extra_keys else None
        salts = [one for one in keys if one != adapter] if isinstance(keys, list) else []
        if model is None or len(salts) > 1 or not all(isinstance(salt, str) for salt in salts):
            return None
        salt = salts[0] if salts else ""
        root = self._roots.get((model, salt))
        if root is None:
            if len(self._roots) >= 1024:
                self._roots.clear()
            root = self._roots[model, salt] = root_of_ids(model, self._key, salt)
        return root

    def _depends_on_media(self, event: BlockStored, number: int) -> bool:
        """Whether a block's content is more than its token ids."""
        keys: Any = event.extra_keys
        if not isinstance(keys, list) or number >= len(keys) or not isinstance(keys[number], list):
            return False
        return any(not isinstance(one, str) for one in keys[number])

    # Removed

    def _remove(self, event: BlockRemoved) -> Iterator[None]:
        group = event.group_idx if isinstance(event.group_idx, int) else 0
        if event.locality == "REMOTE" or group in self._other_groups:
            self._counts["ignored"] += len(event.block_hashes)
            return
        tier = _tier(event.medium)
        for number, name in enumerate(event.block_hashes, 1):
            block = self._blocks.get(name)
            if block is not None:
                block.tiers &= ~tier
                if not block.tiers:
                    self._drop(name)
                    self._counts["removed"] += 1
            if number % _PATIENCE == 0:
                yield

    def _drop(self, name: Hash) -> None:
        block = self._blocks.pop(name)
        self._bytes -= len(block.tail)
        if block.hashes:
            self._holder.removed(block.hashes)


def _tier(medium: object) -> int:
    return _TIERS.get(medium, _OTHER_TIER) if medium is None or isinstance(medium, str) else _OTHER_TIER
