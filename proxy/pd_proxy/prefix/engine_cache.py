"""Follows an engine's prefix cache by its KV events, and translates its blocks into blocks of the index.

An engine names its blocks by hashes of its own. For each block it publishes which block is before it and which token
ids are in it. From these the gateway computes the hashes that a prompt of ids has in the index (`chain.py`), for each
block of the index that ends within an engine's block. Then it passes on which of these are stored or removed.

Events of an engine affect only what is believed of that engine, even if they are false. The memory for them is bounded,
and inconsistent events are counted and ignored.
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
"""The most blocks that are kept of one publisher: 4 M tokens in blocks of 16. Beyond that the oldest are dropped."""
MOST_BYTES = 1 << 26
"""The most bytes of token ids that are kept of one publisher. Ids are kept behind the last end of a block of the index,
since they are the beginning of the next one."""
_LARGEST = 1 << 13
"""The most tokens of a block. Engines have 16 to some thousand; all ids of a block are hashed in one step."""
_STEP = 64  # blocks that are handled in one step
_STEP_TOKENS = 1 << 12  # tokens that are handled in one step

_WHOLE = (None, "full_attention", "mla_attention", "sink_full_attention", "unknown")
"""The kinds of a hybrid model's caches that hold the whole prompt. The others hold only its end, or a state."""
_TIERS = {None: 1, "GPU": 1, "CPU": 2, "CPU_PINNED": 2, "STORAGE": 4, "DISK": 4}
_OTHER_TIER = 8


class Holder(Protocol):
    """Receives the changes of an engine's cache, in hashes of the index."""

    def stored(self, hashes: Sequence[int], sizes: Sequence[int]) -> None:
        """The engine has stored blocks that follow one another.

        Arguments:
            sizes: the tokens of each block.
        """

    def removed(self, hashes: Iterable[int]) -> None:
        """The engine has removed blocks."""

    def cleared(self) -> None:
        """The engine has removed all blocks."""


class _Block(msgspec.Struct, gc=False):
    """One block of an engine.

    Attributes:
        end: the tokens from the prompt's start to its end.
        parent: the engine's name of the block before it; None where there is none.
        hashes: the hashes of the index's blocks that end in it.
        tail: the token ids behind the last of these ends, as an array's bytes; all of its ids where there is no end.
        tiers: the tiers that hold it, a bit for each.
        root: the root of the chain, where it begins a prompt.
    """

    end: int
    parent: Hash | None
    hashes: tuple[int, ...]
    tail: bytes
    tiers: int
    root: int


class EngineCache:
    """The cache of one publisher: an engine, or one of its data-parallel ranks.

    Arguments:
        holder: receives the changes.
        model_of: returns the name by which clients ask for a model, from an adapter's name, or from None for the base
            model; None where that is not known.
        key: the key of the hashes, as for `chain_of`.
        counts: counts events and blocks by what became of them: `stored`, `removed`, `cleared`, `forgotten` (there were
            too many), `unplaced` (its parent is not known, or it depends on media), `ignored` (of another cache than
            the prompt's), `unknown` (kind of event), `malformed`.
        on_bad_event: called with what is wrong with an event: the key in `counts`, and a description.
    """

    def __init__(
        self,
        holder: Holder,
        model_of: Callable[[str | None], str | None],
        key: bytes,
        counts: Counter[str],
        on_bad_event: Callable[[str, str], object] = lambda what, why: None,
        *,
        most_blocks: int = MOST_BLOCKS,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        self._holder = holder
        self._model_of = model_of
        self._key = key
        self._counts = counts
        self._on_bad_event = on_bad_event
        self._most_blocks = most_blocks
        self._most_bytes = most_bytes
        self._blocks: dict[Hash, _Block] = {}
        self._bytes = 0
        self._other_groups: set[int] = set()
        self._roots: dict[tuple[str, str], int] = {}

    def __len__(self) -> int:
        """The number of the engine's blocks that are known."""
        return len(self._blocks)

    def apply(self, payload: bytes) -> Iterator[None]:
        """Apply a batch of events, step by step. Between two steps the state is consistent.

        Arguments:
            payload: the batch as it was published.
        """
        try:
            events = read_batch(payload)
        except Undecodable as error:
            self._count_bad("malformed", f"not a batch of KV events: {error}")
            return
        for raw in events:
            try:
                event = read_event(raw)
            except UnknownKind as error:
                self._count_bad("unknown", str(error))
            except Undecodable as error:
                self._count_bad("malformed", f"a malformed event: {error}")
            else:
                yield from self._apply(event)
            yield

    def clear(self) -> None:
        """Forget all blocks, since the engine has cleared its cache."""
        self._blocks, self._bytes = {}, 0
        self._other_groups.clear()
        self._holder.cleared()

    def _count_bad(self, what: str, why: str) -> None:
        self._counts[what] += 1
        self._on_bad_event(what, why)

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
            if event.locality != "REMOTE" and len(self._other_groups) < _STEP:
                self._other_groups.add(group)
            return
        tier = _tier(event.medium)
        size, ids = event.block_size, event.token_ids
        if not ids:  # published for a tier that knows only the names of its blocks
            self._store_names(names, tier)
            return
        if not 0 < size <= _LARGEST or len(ids) != size * count:
            self._count_bad("malformed", f"{count} blocks of {size} tokens cannot have {len(ids)} token ids")
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
        """Note that known blocks have been copied to a tier."""
        for name in names:
            if (known := self._blocks.get(name)) is not None:
                known.tiers |= tier
            else:
                self._counts["unplaced"] += 1

    def _place(self, event: BlockStored, before: _Block | None, root: int, tier: int) -> Iterator[None]:
        """Add an event's blocks behind one another, a few in one step.

        Arguments:
            before: the block before the first one; None where the first one begins a prompt.
            root: the root of the chain in that case.
        """
        names, count = event.block_hashes, len(event.block_hashes)
        size, ids, parent = event.block_size, event.token_ids, event.parent_block_hash
        hashes: list[int] = []
        sizes: list[int] = []
        step = max(1, min(_STEP, _STEP_TOKENS // size))
        for number, name in enumerate(names):
            if number % step == step - 1:
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
                    self._count_bad("malformed", "a token id is not a number of 32 bits")
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
        """Drop the oldest blocks where there are too many."""
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
        """Make the block that follows another, or that begins a prompt. None where a block before it is not cached any
        more, so that no request could find it.

        Arguments:
            hashes, sizes: the hashes of the index's blocks that end in it, and their sizes, are appended to these.
        Raises:
            OverflowError: an id is not a number of 32 bits.
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
        """Go back from an engine's block to the last end of a block of the index. Returns the hash there, and the ids
        behind it. The hash is None where a block on the way is not cached any more, or was stored again behind another.

        Arguments:
            root: the root of the prompt, where `block` is None.
            place: how many blocks of the index end before.
            size: the bytes of the ids that are expected; ends the search where an engine's blocks form a circle.
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
        """The root of a prompt's chain; None where it cannot be known."""
        adapter = event.lora_name if isinstance(event.lora_name, str) and event.lora_name else None
        if adapter is None and event.lora_id is not None:
            return None  # the adapter's name is not known
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
        """Whether a block depends on more than its token ids."""
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
            if number % _STEP == 0:
                yield

    def _drop(self, name: Hash) -> None:
        block = self._blocks.pop(name)
        self._bytes -= len(block.tail)
        if block.hashes:
            self._holder.removed(block.hashes)


def _tier(medium: object) -> int:
    return _TIERS.get(medium, _OTHER_TIER) if medium is None or isinstance(medium, str) else _OTHER_TIER
