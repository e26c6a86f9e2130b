"""The scheduler of a simulated engine: which sequences wait, which run, and which blocks each holds.

First come, first served. A sequence whose KV comes from another engine waits in `loading` meanwhile. When blocks run
out, the sequence that came last is preempted.

Invariant: every block that a sequence holds is in `sequence.blocks` with one reference, dropped exactly once: when the
sequence ends, is preempted, or its references pass over to a hand-off.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from pd_proxy_simulator.blocks import Block, BlockPool, Content
from pd_proxy_simulator.config import SimulatorConfig
from pd_proxy_simulator.metrics import Stats
from pd_proxy_simulator.sequences import Sequence, Status
from pd_proxy_simulator.tokens import MASK, mix


class Scheduler:
    """The sequences of one engine.

    Attributes:
        queue: those that have no blocks yet.
        loading: those whose KV is being fetched.
        ready: those whose KV has come; only a place in the batch is missing.
        running: the batch.
    """

    def __init__(
        self,
        config: SimulatorConfig,
        pool: BlockPool,
        stats: Stats,
        *,
        load: Callable[[Sequence], bool],
        give_back: Callable[[Sequence], None],
    ) -> None:
        """Make a scheduler without sequences.

        Arguments:
            load: begins to fetch a sequence's KV; returns whether the engine has survived that.
            give_back: ends a preempted sequence such that the proxy sends it again (`preemption: report`).
        """
        self._config = config
        self._pool = pool
        self._stats = stats
        self._load = load
        self._give_back = give_back
        self.queue: deque[Sequence] = deque()
        self.ready: deque[Sequence] = deque()
        self.loading: set[Sequence] = set()
        self.running: list[Sequence] = []

    def everything(self) -> list[Sequence]:
        """All sequences, the running ones first."""
        return [*self.running, *self.ready, *self.loading, *self.queue]

    def clear(self) -> None:
        """Forget all sequences."""
        for sequence in self.everything():
            sequence.status = Status.FINISHED
        self.queue.clear()
        self.ready.clear()
        self.loading.clear()
        self.running.clear()

    def make_ready(self, sequence: Sequence) -> None:
        """Move a loading sequence to `ready`: it is computed in the next step that has a place for it."""
        self.loading.discard(sequence)
        sequence.loaded = True
        sequence.status = Status.WAITING
        self.ready.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence that has ended out of every list. It still holds its blocks."""
        match sequence.status:
            case Status.RUNNING:
                self.running.remove(sequence)
            case Status.LOADING:
                self.loading.discard(sequence)
            case Status.WAITING:
                (self.ready if sequence in self.ready else self.queue).remove(sequence)
        sequence.status = Status.FINISHED

    def free(self, sequence: Sequence) -> None:
        """Free the blocks of a sequence."""
        blocks, sequence.blocks = sequence.blocks, []
        self._pool.release(blocks)

    def next_step(self, now: float) -> tuple[list[tuple[Sequence, int]], int]:
        """Choose the sequences of the next step, each with a number of tokens of its prompt.

        Returns:
            The sequences, each with its prompt tokens in this step, and the sum of those tokens.
        """
        batch: list[tuple[Sequence, int]] = []
        preempted = self._stats.preemptions
        budget = self._go_on(batch, self._config.max_num_batched_tokens)
        if self._stats.preemptions == preempted:
            self._join(batch, budget, now)
        prompt_tokens = sum(chunk for _, chunk in batch)
        return [(sequence, chunk) for sequence, chunk in batch if sequence.status is Status.RUNNING], prompt_tokens

    def _go_on(self, batch: list[tuple[Sequence, int]], budget: int) -> int:
        """Put the running sequences into the batch; returns the tokens that are left of the budget."""
        block_size = self._config.block_size
        for sequence in list(self.running):
            if sequence.status is not Status.RUNNING:
                continue
            chunk = 0
            if sequence.prefill_left:
                chunk = min(sequence.prefill_left, budget)
                if chunk <= 0:
                    continue
                budget -= chunk
            else:
                if len(sequence.blocks) * block_size < len(sequence.tokens) and not self._grow(sequence):
                    continue
                budget -= 1
            batch.append((sequence, chunk))
        return budget

    def _join(self, batch: list[tuple[Sequence, int]], budget: int, now: float) -> None:
        """Put waiting sequences into the batch, as far as there is room."""
        while (self.ready or self.queue) and len(self.running) < self._config.max_num_seqs and budget > 0:
            if self.ready:
                sequence = self.ready.popleft()
            else:
                sequence = self.queue[0]
                if not self._allocate(sequence):
                    return
                self.queue.popleft()
                if (sequence.transfer.fetches or sequence.transfer.awaits) and not sequence.loaded:
                    if not self._load(sequence):
                        return
                    continue
            sequence.status = Status.RUNNING
            if not sequence.output_length:
                self._stats.queue_time.observe(now - sequence.arrived)
            self.running.append(sequence)
            chunk = min(sequence.prefill_left, budget)
            budget -= chunk
            batch.append((sequence, chunk))

    def _allocate(self, sequence: Sequence) -> bool:
        """Allocate blocks for all known tokens of a sequence, the cached blocks first."""
        block_size = self._config.block_size
        length = len(sequence.tokens)
        hits: list[Block] = []
        if self._config.prefix_caching and not sequence.skip_cache:
            # The last token is always computed, since the next one is drawn from it.
            keys = sequence.boundaries[1 : (length - 1) // block_size + 1]
            hits = self._pool.match(key ^ sequence.cache_key for key in keys)
        blocks = self._pool.take(hits, -(-length // block_size) - len(hits))
        if blocks is None:
            return False
        sequence.blocks = blocks
        sequence.sealed = len(hits)
        sequence.error = 0
        sequence.taint(hits)
        sequence.prefill_left = length - len(hits) * block_size
        if not sequence.output_length:
            sequence.cached = len(hits) * block_size
            self._stats.prefix_queries += length
            self._stats.prefix_hits += sequence.cached
        return True

    def _grow(self, sequence: Sequence) -> bool:
        """Allocate one more block for a running sequence. If none is free, the latest sequences are preempted for
        it."""
        while True:
            fresh = self._pool.take([], 1)
            if fresh is not None:
                sequence.blocks.extend(fresh)
                self.seal(sequence, len(sequence.tokens) - 1)
                return True
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False

    def _preempt(self, victim: Sequence) -> None:
        self._stats.preemptions += 1
        if self._config.preemption == "report":
            self._give_back(victim)
            return
        self.running.remove(victim)
        self.free(victim)
        victim.status = Status.WAITING
        victim.loaded = True  # KV that came from prefill is computed here the second time
        self.queue.appendleft(victim)

    def seal(self, sequence: Sequence, computed: int) -> None:
        """Store the KV of every block that has become full."""
        size = self._config.block_size
        for index in range(sequence.sealed, computed // size):
            tokens = sequence.tokens[index * size : (index + 1) * size]
            self._pool.write(
                sequence.blocks[index],
                sequence.boundaries[index],
                tokens,
                sequence.error,
                sequence.key(index + 1),
                sequence.key(index) if index else None,
                sequence.cache_salt,
            )
            sequence.sealed = index + 1

    def store(self, sequence: Sequence, hits: int, contents: list[Content]) -> None:
        """Store pulled KV in this engine's own blocks, right or wrong: positions are matched, not owners."""
        size = self._config.block_size
        attended = sequence.prompt_length - 1  # the last position is computed here
        for index, content in enumerate(contents, start=hits):
            before, found, error = content
            start = index * size
            expected = sequence.tokens[start : min(start + size, sequence.prompt_length)]
            reach = min(attended - start, size)
            if reach > 0 and not error and (before != sequence.boundaries[index] or found[:reach] != expected[:reach]):
                error = mix((before ^ len(found) ^ sum(found)) & MASK) or 1
            if reach <= 0:
                error = 0
            full = len(expected) == size
            key = sequence.key(index + 1) if full else None
            block = sequence.blocks[index]
            parent = sequence.key(index) if index else None
            self._pool.write(block, sequence.boundaries[index], expected, error, key, parent, sequence.cache_salt)
            if full:
                sequence.sealed = index + 1
            sequence.taint([block])
