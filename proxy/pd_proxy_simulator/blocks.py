"""The KV cache: a pool of blocks with their content, shared by requests with the same prefix.

Invariant: a block is free exactly when its reference count is zero. Free blocks keep their content and can be hit again
until they are given to another request (least recently freed first). `pins` counts the hand-offs that hold a block.

A block's content is the state before it, its tokens, and an `error`: zero for correct KV, anything else for KV that was
computed from, or copied from, wrong KV. Nothing here raises on wrong KV, since real engines cannot detect it either.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from pd_proxy_simulator.kv_events import CacheListener, NullListener
from pd_proxy_simulator.tokens import MASK, mix

Content = tuple[int, list[int], int]


class Block:
    """One block of the pool."""

    __slots__ = ("before", "error", "index", "key", "pins", "refs", "tokens")

    def __init__(self, index: int) -> None:
        self.index = index
        self.refs = 0
        self.pins = 0
        self.key: int | None = None  # the key by which the prefix cache finds it
        self.before = 0
        self.tokens: list[int] = []
        self.error = index + 1  # never written: its content is not the KV of anything


class BlockPool:
    """All blocks of one engine.

    Attributes:
        listener: is called when the prefix cache changes.
    """

    def __init__(self, count: int, *, caching: bool) -> None:
        self.listener: CacheListener = NullListener()
        self._count = count
        # blocks that were ever given out, in that order; block 0, vLLM's null block, never is
        self._touched = [Block(0)]
        self._released: OrderedDict[int, Block] = OrderedDict()
        self._cached: dict[int, Block] = {}
        self._caching = caching
        self.pinned = 0  # blocks that at least one hand-off holds

    @property
    def free(self) -> int:
        """How many blocks can be given out."""
        return self._count - len(self._touched) + len(self._released)

    @property
    def used(self) -> int:
        """How many blocks requests and hand-offs hold."""
        return len(self._touched) - 1 - len(self._released)

    def match(self, keys: Iterable[int]) -> list[Block]:
        """The cached blocks for the longest prefix of `keys`. Takes no references."""
        found: list[Block] = []
        for key in keys:
            block = self._cached.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def take(self, hits: Sequence[Block], fresh: int) -> list[Block] | None:
        """Reference the `hits` and `fresh` new blocks. Returns None, and changes nothing, if there are too few."""
        idle = sum(1 for block in hits if block.refs == 0)
        if self.free - idle < fresh:
            return None
        for block in hits:
            if block.refs == 0:
                del self._released[block.index]
            block.refs += 1
        taken = list(hits)
        for _ in range(fresh):
            block = self._least_recent()
            if block.key is not None:
                del self._cached[block.key]
                self.listener.removed(block.key)
                block.key = None
            block.refs = 1
            block.error = mix(block.error + 1) or 1  # holds another request's KV until it is written
            taken.append(block)
        return taken

    def _least_recent(self) -> Block:
        """Take the free block that was used longest ago, or one that was never used, as long as there is one."""
        if len(self._touched) == self._count:
            return self._released.popitem(last=False)[1]
        block = Block(len(self._touched))
        self._touched.append(block)
        return block

    def release(self, blocks: Sequence[Block]) -> None:
        """Drop one reference of each block. The end of a prefix is evicted before its beginning."""
        for block in reversed(blocks):
            block.refs -= 1
            if block.refs == 0:
                self._released[block.index] = block

    def write(
        self,
        block: Block,
        before: int,
        tokens: list[int],
        error: int,
        key: int | None,
        parent: int | None = None,
        salt: str = "",
    ) -> None:
        """Store KV in a block; `key` makes it findable (full blocks only).

        Arguments:
            parent: the key of the block before it; None for a prompt's first.
            salt: the request's `cache_salt`.
        """
        block.before = before
        block.tokens = tokens
        block.error = error
        if key is not None and self._caching and block.key is None and key not in self._cached:
            block.key = key
            self._cached[key] = block
            self.listener.stored(key, parent, tokens, salt)

    def pin(self, blocks: Sequence[Block]) -> None:
        """Mark blocks as held by a hand-off."""
        for block in blocks:
            self.pinned += block.pins == 0
            block.pins += 1

    def unpin(self, blocks: Sequence[Block]) -> None:
        """Undo `pin`."""
        for block in blocks:
            block.pins -= 1
            self.pinned -= block.pins == 0

    def read(self, index: int, *, scrambled_when_free: bool) -> Content:
        """A block's content as a peer reads it, whichever sequence the block belongs to now."""
        block = self._touched[index] if index < len(self._touched) else Block(index)
        error = block.error
        if scrambled_when_free and block.pins == 0:
            error = (error ^ mix(index + 0x5EED)) & MASK or 1
        return block.before, block.tokens, error

    def forget(self) -> None:
        """Empty the prefix cache."""
        for block in self._cached.values():
            block.key = None
        self._cached.clear()
        self.listener.cleared()
