"""The engine core: continuous batching in one task, first come, first served, over one pool of KV blocks.

A step takes `step_time` plus the time that its prompt tokens need, and generates one token for every sequence whose
prompt is computed. Between steps the state is consistent; everything but the step's own sleep is synchronous. Which
sequences run, and which blocks they hold, is in `scheduler.py`.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from pd_proxy_simulator.blocks import BlockPool, Content
from pd_proxy_simulator.config import SimulatorConfig
from pd_proxy_simulator.connectors import SIDES
from pd_proxy_simulator.errors import RequestError, engine_dead, internal_error
from pd_proxy_simulator.handoffs import Handoffs
from pd_proxy_simulator.media import Media
from pd_proxy_simulator.metrics import Stats
from pd_proxy_simulator.scheduler import Scheduler
from pd_proxy_simulator.sequences import Sequence, Status
from pd_proxy_simulator.sidechannel import OutOfRange, Peers, TransferFailed
from pd_proxy_simulator.tokens import start_state
from pd_proxy_simulator.transfers import Transfer

logger = logging.getLogger(__name__)


class Slowness(Protocol):
    """The interface by which faults make steps longer."""

    def slowness(self) -> float:
        """The factor by which the next step takes longer."""


class Engine:
    """One engine core. `side_port` is the port where its hand-offs can be pulled from, `http_address` the address of
    its API."""

    def __init__(
        self,
        config: SimulatorConfig,
        faults: Slowness,
        *,
        changed: Callable[[], None],
        died: Callable[[], None],
    ) -> None:
        self.config = config
        self.id = str(uuid.uuid4())
        self.origin = start_state(config.weights)
        self.side_port = 0
        self.http_address = ""
        self.stats = Stats()
        self.pool = BlockPool(config.blocks, caching=config.prefix_caching)
        self.handoffs = Handoffs(self.pool, config, self._handoffs_changed)
        self.dead: str | None = None  # the reason
        self.frozen = False  # whether steps are stopped
        self._faults = faults
        self._changed = changed
        self._died = died
        self.peers = Peers(config)
        self.side = SIDES[config.connector](self)
        self.media = Media(self)
        self.scheduler = Scheduler(config, self.pool, self.stats, load=self._load, give_back=self._recompute_elsewhere)
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    # Read by tests and gauges.

    @property
    def running(self) -> int:
        """Sequences in the batch."""
        return len(self.scheduler.running)

    @property
    def waiting(self) -> int:
        """Sequences that are not in the batch yet, for any reason."""
        return len(self.scheduler.queue) + len(self.scheduler.ready) + len(self.scheduler.loading)

    @property
    def loading(self) -> int:
        """Sequences whose KV is being fetched from prefill."""
        return len(self.scheduler.loading)

    @property
    def pulled(self) -> int:
        """Hand-offs of this engine that decode has read (counted at prefill)."""
        return self.handoffs.pulled

    @property
    def pulls(self) -> int:
        """Hand-offs that this engine has read (counted at decode)."""
        return self.stats.pulls

    @property
    def expired(self) -> int:
        """Hand-offs whose lease ran out."""
        return self.handoffs.expired

    @property
    def aborted(self) -> int:
        """Sequences whose client disconnected."""
        return self.stats.aborted

    @property
    def used_blocks(self) -> int:
        """Blocks that sequences and hand-offs hold."""
        return self.pool.used

    @property
    def stranded_blocks(self) -> int:
        """Blocks pinned for hand-offs that were not pulled yet."""
        return self.pool.pinned

    # Start and end.

    def start(self) -> None:
        """Begin to make steps."""
        self.spawn(self._run())

    def close(self) -> None:
        """End at once, without a call to any listener."""
        for task in list(self._tasks):
            task.cancel()
        self.handoffs.close()
        self.scheduler.clear()

    def die(self, reason: str) -> None:
        """Die as after a failed assertion in the core: everything in flight fails, and the process ends shortly
        after."""
        if self.dead is not None:
            return
        logger.error("engine %s died: %s", self.id, reason)
        self.dead = reason
        in_flight = self.scheduler.everything()
        self.close()
        for sequence in in_flight:
            if sequence.listener is not None:
                sequence.listener.on_failure(sequence, engine_dead())
        self._died()
        self._changed()

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a coroutine for as long as the engine lives."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("bug in the simulator", exc_info=error)
            self.die(repr(error))

    def _handoffs_changed(self) -> None:
        self._wake.set()
        self._changed()

    # Requests arrive and end.

    def submit(self, sequences: list[Sequence]) -> None:
        """Queue the sequences of one request.

        Raises:
            RequestError: the engine is dead, or the queue is full.
        """
        if self.dead is not None:
            raise engine_dead()
        if self.config.max_queued and len(self.scheduler.queue) + len(sequences) > self.config.max_queued:
            self.stats.admission_rejections += 1
            message = f"The engine's queue is full ({self.config.max_queued} requests); try again later."
            # Refused by a middleware: prefill is not told, and the hand-off can still be taken elsewhere.
            raise RequestError(503, "Service Unavailable", message, late=False)
        now = asyncio.get_running_loop().time()
        for sequence in sequences:
            sequence.arrived = now
            if sequence.skip_cache and sequence.transfer.fetches:
                sequence.transfer = Transfer()
            self.scheduler.queue.append(sequence)
            if sequence.transfer.leg != "local":
                self.side.submitted(sequence)
        self._wake.set()
        self._changed()

    def abort(self, sequences: list[Sequence]) -> None:
        """The client has disconnected: free what its sequences hold, now."""
        for sequence in sequences:
            if sequence.status is Status.FINISHED or self.dead is not None:
                continue
            self.stats.aborted += 1
            if sequence.status is Status.LOADING:
                if self.side.stuck(sequence):
                    self._drop(sequence)
                    self.release_unread(sequence.transfer)
                else:
                    sequence.abandoned = True  # its blocks are being written to: they stay until the read ends
                    self.side.abandoned(sequence)
                continue
            if sequence.transfer.keeps:
                self.side.dropped(sequence)
            self._drop(sequence)
            if sequence.transfer.fetches and not sequence.loaded:
                self.release_unread(sequence.transfer)
        self._wake.set()
        self._changed()

    def give_up(self, sequences: list[Sequence] | None = None) -> None:
        """End the given sequences, or all, with finish reason "abort", as a stopped or paused engine does. Each
        answers with the tokens that it has."""
        if sequences is None:
            sequences = self.scheduler.everything()
        for sequence in sequences:
            if sequence.status is Status.FINISHED or sequence.abandoned:
                continue
            self.stats.finished["abort"] += 1
            text = sequence.abort()
            if sequence.status is Status.LOADING and not self.side.stuck(sequence):
                sequence.abandoned = True  # its blocks are being written to: they stay until the read ends
                self.side.abandoned(sequence)
            else:
                if sequence.transfer.keeps:
                    self.side.dropped(sequence)
                self._drop(sequence)
                if sequence.transfer.fetches and not sequence.loaded:
                    self.release_unread(sequence.transfer)
            if sequence.listener is not None:
                sequence.listener.on_token(sequence, None, text)
        self._wake.set()
        self._changed()

    def freeze(self, frozen: bool) -> None:
        """Stop making steps, or go on."""
        self.frozen = frozen
        self._wake.set()

    def release_unread(self, transfer: Transfer) -> None:
        """Notify prefill that the KV which it keeps will not be fetched."""
        if transfer.fetches and self.dead is None:
            self.side.release_unread(transfer)

    def _drop(self, sequence: Sequence) -> None:
        """End a sequence in any state, and free its blocks."""
        self.scheduler.remove(sequence)
        self._sequence_ended(sequence)
        self.scheduler.free(sequence)

    # Steps.

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        config = self.config
        deadline = 0.0
        while True:
            if self.frozen:
                self._wake.clear()
                await self._wake.wait()
                continue
            batch, prompt_tokens = self.scheduler.next_step(loop.time())
            if self.dead is not None:
                return
            if not batch:
                self._wake.clear()
                self._changed()
                await self._wake.wait()
                continue
            duration = config.step_time
            if config.prefill_rate:
                duration += prompt_tokens / config.prefill_rate
            duration *= self._faults.slowness()
            now = loop.time()
            # A step that began late because the previous step's bookkeeping took long is not longer for it.
            deadline = (deadline if now - deadline < duration else now) + duration
            await asyncio.sleep(max(deadline - now, 0))
            self._step(batch)

    def _recompute_elsewhere(self, sequence: Sequence) -> None:
        """vllm-ascend's recompute scheduler: the sequence ends without a token, and the proxy has to send it again."""
        sequence.finish_reason, sequence.stop_reason = "stop", "recomputed"
        self._finish(sequence)
        if sequence.listener is not None:
            sequence.listener.on_token(sequence, None, "")

    def _step(self, batch: list[tuple[Sequence, int]]) -> None:
        now = asyncio.get_running_loop().time()
        config, stats = self.config, self.stats
        block_size, context = config.block_size, config.context
        stats.steps += 1
        for sequence, chunk in batch:
            if sequence.status is not Status.RUNNING:
                continue
            if chunk:
                sequence.prefill_left -= chunk
                if sequence.prefill_left > 0:
                    continue
                self.scheduler.seal(sequence, len(sequence.tokens))
            generated = sequence.output_length
            if sequence.sampling.recompute_after == generated:
                self._recompute_elsewhere(sequence)
                continue
            text = sequence.generate(block_size, context)
            stats.generation_tokens += 1
            if generated:
                stats.inter_token_latency.observe(now - sequence.last_token_at)
            else:
                self._first_token(sequence, now)
            sequence.last_token_at = now
            if sequence.finish_reason is not None:
                self._finish(sequence)
            if sequence.listener is not None:
                sequence.listener.on_token(sequence, sequence.tokens[-1], text)
        self._changed()

    def _first_token(self, sequence: Sequence, now: float) -> None:
        stats = self.stats
        self.side.computed(sequence)
        sequence.first_token_at = now
        stats.time_to_first_token.observe(now - sequence.arrived)
        stats.prompt_tokens += sequence.prompt_length
        stats.local_cache_hit += sequence.cached
        if self.config.written_tokens:
            sequence.written = sequence.prompt_length - sequence.cached - sequence.external
        stats.external_kv_transfer += sequence.external
        stats.local_compute += sequence.prompt_length - sequence.cached - sequence.external
        stats.prompt_length.observe(sequence.prompt_length)

    def _finish(self, sequence: Sequence) -> None:
        """Handle the end of a sequence after its last token: keep its blocks for decode, or free them."""
        reason = sequence.finish_reason
        assert reason is not None
        now = asyncio.get_running_loop().time()
        self.stats.finished[reason] += 1
        self.stats.end_to_end.observe(now - sequence.arrived)
        self.stats.output_length.observe(sequence.output_length)
        self.scheduler.running.remove(sequence)
        sequence.status = Status.FINISHED
        if sequence.output_length:
            self.scheduler.seal(sequence, len(sequence.tokens) - 1)
        if sequence.transfer.keeps and reason in self.side.kept_after and sequence.stop_reason != "recomputed":
            self._hand_off(sequence)
        else:
            if sequence.transfer.keeps:
                self.side.dropped(sequence)
            self.scheduler.free(sequence)
        self._sequence_ended(sequence)

    def _hand_off(self, sequence: Sequence) -> None:
        size = self.config.block_size
        computed = len(sequence.tokens) - 1
        needed = -(-computed // size)
        blocks, spare = sequence.blocks[:needed], sequence.blocks[needed:]
        sequence.blocks = []
        self.pool.release(spare)
        if computed % size:
            start = computed - computed % size
            part = sequence.tokens[start:computed]
            self.pool.write(blocks[-1], sequence.boundaries[start // size], part, sequence.error, None)
        self.handoffs.pin(self.side.key(sequence), blocks)
        sequence.kept = blocks
        sequence.handoff_params = self.side.kept(sequence, computed)

    # Fetching.

    def _load(self, sequence: Sequence) -> bool:
        """Begin to fetch a sequence's KV, or to wait for decode; returns whether the engine has survived the
        sequence's parameters."""
        sequence.status = Status.LOADING
        self.scheduler.loading.add(sequence)
        if sequence.transfer.fetches:
            self.stats.external_queries += sequence.prompt_length - sequence.cached
        self.side.load(sequence)
        return self.dead is None

    def admit(self, sequence: Sequence) -> None:
        """Compute a sequence: what it waited for has come, or is no longer needed."""
        self.scheduler.make_ready(sequence)
        self._wake.set()
        self._changed()

    def fail(self, sequence: Sequence) -> None:
        """Fail a sequence: what it waited for does not come."""
        self.scheduler.loading.discard(sequence)
        sequence.status = Status.FINISHED
        self.stats.finished["error"] += 1
        self.scheduler.free(sequence)
        self._sequence_ended(sequence)
        if sequence.listener is not None:
            sequence.listener.on_failure(sequence, internal_error())
        self._wake.set()
        self._changed()

    def _sequence_ended(self, sequence: Sequence) -> None:
        if sequence.transfer.leg != "local":
            self.side.ended(sequence)

    def fetch(self, sequence: Sequence, contents: Coroutine[Any, Any, list[Content]]) -> None:
        """Fill the blocks of a loading sequence with `contents`; blocks that were cached are not in it."""
        task = self.spawn(self._fetch(sequence, contents))
        task.add_done_callback(lambda _: contents.close())  # an engine may die before the task's first step

    def compute(self, sequence: Sequence) -> None:
        """Compute the prompt of a loading sequence here: there is nothing to fetch."""
        self.scheduler.make_ready(sequence)
        self._wake.set()

    async def _fetch(self, sequence: Sequence, fetching: Coroutine[Any, Any, list[Content]]) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        tokens = sequence.prompt_length - sequence.cached
        contents: list[Content] | None = None
        try:
            contents = await fetching
        except TransferFailed as error:
            logger.warning("cannot pull: %s", error)
            self.stats.failed_transfers += 1
        except OutOfRange as error:
            self.die(f"AssertionError: {error}")
            return
        self.side.loaded(sequence)
        if sequence.abandoned:
            self.scheduler.loading.discard(sequence)
            sequence.status = Status.FINISHED
            self.scheduler.free(sequence)
            self._sequence_ended(sequence)
            self._wake.set()
            self._changed()
        elif contents is not None:
            fetched = min(len(contents) * self.config.block_size, tokens)
            self.stats.pulls += bool(contents)
            self.stats.transfer_time.observe(loop.time() - began)
            self.stats.external_hits += fetched
            sequence.external = fetched
            self.scheduler.store(sequence, sequence.cached // self.config.block_size, contents)
            sequence.prefill_left = max(1, tokens - fetched)
            self.admit(sequence)
        elif self.side.recomputes or self.config.load_failure_policy == "recompute":
            self.admit(sequence)
        else:
            self.fail(sequence)
