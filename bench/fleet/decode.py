"""A decode engine: continuous batching whose steps take longer with more sequences and KV cache, without an event for
each step.

Between two changes of the batch each step takes `s + g·k` seconds, where `k` is the number of steps since the change:
every step adds a token of KV cache for each sequence. So the number of steps by a time, and the duration of a step,
have a closed form, and a request costs a few events however long its answer is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from math import ceil, sqrt

from bench.fleet.blocks import BLOCK, BlockCache
from bench.fleet.clock import Clock
from bench.fleet.jobs import Job
from bench.fleet.prefill import PrefillModel


@dataclass(frozen=True)
class DecodeModel:
    """The speed and capacity of a decode engine.

    Attributes:
        base, sequence, token: seconds of a step, and what each sequence and each token of KV cache adds to it.
        capacity: tokens of its KV cache.
        latency, pull: seconds of a hand-off, and tokens/s that it reads from another engine.
        prefill: how it computes prompts itself; in steps of its own chunk, for which every sequence waits.
        most: sequences that run at the same time (vLLM: `max_num_seqs`).
    """

    base: float = 0.018
    sequence: float = 0.00025
    token: float = 3e-8
    capacity: int = 600_000
    latency: float = 0.005
    pull: float = 200_000.0
    prefill: PrefillModel = field(default_factory=lambda: PrefillModel(chunk=2048))
    most: int = 256

    def step(self, sequences: float, kv: float) -> float:
        """Seconds of a step."""
        return self.base + self.sequence * sequences + self.token * kv


class DecodeEngine:
    """One engine, or one data-parallel rank of one.

    Attributes:
        factor: how many times longer than its model it takes at present; set by `slow`.
        kv: tokens of the running sequences, as a step reads them; used: of the KV cache that is taken, also by what is
            being pulled or computed, blocks that sequences share counted once.
        steps: done so far, with sequences; busy: seconds that they took.
        preemptions: how often a sequence has been put back into the queue for lack of KV cache.
    """

    def __init__(
        self,
        clock: Clock,
        model: DecodeModel,
        first: Callable[[Job], object],
        ended: Callable[[Job], object],
        *,
        factor: float = 1.0,
    ) -> None:
        self.model = model
        self.factor = factor
        self.cache = BlockCache(model.capacity)
        self.kv = 0.0
        self.used = 0.0
        self.steps = self.busy = 0.0
        self.preemptions = 0
        self.active: dict[Job, None] = {}
        self.waiting: deque[Job] = deque()
        self._clock = clock
        self._first = first
        self._ended = ended
        self._held: dict[int, int] = {}  # blocks of prompts in use, with the number of sequences that use them
        self._time = 0.0
        self._ends: list[tuple[float, int, int, Job]] = []
        self._number = 0
        self._epoch = 0
        self._queue: deque[Job] = deque()  # prompts to compute here; the first one is being computed
        self._chunk = 0.0  # seconds by which a prompt lengthens a step
        self._chunk_ends = 0.0  # the step that ends the prompt's computation

    @property
    def sequences(self) -> int:
        """Sequences that run, are pulled, are computed or wait."""
        return len(self.active) + len(self.waiting) + len(self._queue)

    @property
    def waiting_work(self) -> float:
        """The measure by which an engine spreads requests over its ranks."""
        return self.sequences

    def step(self) -> float:
        """Seconds of the present step."""
        return self.factor * (self.model.step(len(self.active), self.kv) + self._chunk)

    def ahead(self) -> float:
        """Seconds of prefill work that wait on this engine. For the oracle only: no gateway can see it."""
        seconds = sum(self._own(job)[1] for job in list(self._queue)[1:])
        if self._queue:
            self._sync()
            seconds += max(0.0, self._chunk_ends - self.steps) * self.step()
        return seconds

    def submit(self, job: Job) -> None:
        """Accept a request: its KV cache is pulled where a prefill engine has computed it; otherwise its prompt is
        computed here."""
        self.waiting.append(job)
        self._sync()
        self._admit()
        self._plan()

    def slow(self, factor: float) -> None:
        """From now on a step takes `factor` times as long as its model says."""
        self._sync()
        self.factor = factor
        self._plan()

    def watch(self) -> tuple[float, float]:
        """Steps so far, and seconds that the engine was busy with them: in streams their quotient is the gap between
        tokens."""
        self._sync()
        return self.steps, self.busy

    def _admit(self) -> None:
        """Start waiting sequences, as long as there is KV cache for the next one."""
        while self.waiting:
            job = self.waiting[0]
            if self._held and (len(self.active) >= self.model.most or not self._fits(job)):
                return
            self.waiting.popleft()
            self._hold(job)
            if job.prefill >= 0 and not job.preempted:
                prompt = job.request.prompt
                missing = max(0, prompt.tokens - self.cache.matched(prompt.blocks))
                seconds = self.model.latency + missing / self.model.pull
                self._clock.at(self._clock.now + seconds, self._pulled, job)
            else:
                self._queue.append(job)
                if len(self._queue) == 1:
                    self._compute()

    def _fits(self, job: Job) -> bool:
        """Whether there is KV cache for a sequence."""
        free = self.model.capacity - self.used
        tokens = job.request.prompt.tokens + job.generated
        if tokens < free:
            return True
        held = self._held
        return tokens - BLOCK * sum(block in held for block in job.request.prompt.blocks) < free

    def _hold(self, job: Job) -> None:
        """Take KV cache for a sequence."""
        held, blocks, new = self._held, job.request.prompt.blocks, 0
        for block in blocks:
            if block in held:
                held[block] += 1
            else:
                held[block] = 1
                new += 1
        self.used += new * BLOCK + job.request.prompt.tokens - len(blocks) * BLOCK + job.generated

    def _release(self, job: Job) -> None:
        """Release a sequence's KV cache."""
        held, blocks, freed = self._held, job.request.prompt.blocks, 0
        for block in blocks:
            if held[block] == 1:
                del held[block]
                freed += 1
            else:
                held[block] -= 1
        self.used -= freed * BLOCK + job.request.prompt.tokens - len(blocks) * BLOCK + job.generated
        if not held:
            self.used = max(0.0, self.used)

    def _unshared(self) -> int:
        """Tokens of the KV cache that belong to no prompt's blocks."""
        return max(0, int(self.used) - BLOCK * len(self._held))

    def _own(self, job: Job) -> tuple[int, float]:
        """Steps and seconds to compute a prompt here; the seconds do not include the steps themselves."""
        prompt, model = job.request.prompt, self.model.prefill
        cached = min(self.cache.matched(prompt.blocks), prompt.tokens - 1)
        if job.cached < 0 or not job.preempted:
            job.cached = cached
        left = prompt.tokens + int(job.generated) - cached
        return ceil(left / model.chunk), model.seconds(cached, left)

    def _compute(self) -> None:
        """Begin to compute the first prompt of the queue."""
        job = self._queue[0]
        job.began = job.began or self._clock.now
        steps, seconds = self._own(job)
        self._chunk = seconds / steps
        self._chunk_ends = self.steps + steps

    def _pulled(self, job: Job) -> None:
        self._sync()
        job.pulled = self._clock.now
        self._join(job)
        if not job.first:
            job.first = self._clock.now + self.step()
            self._clock.at(job.first, self._first, job)
        self._plan()

    def _join(self, job: Job) -> None:
        """Start a sequence whose KV cache is here."""
        prompt = job.request.prompt
        self.kv += prompt.tokens + job.generated
        self.active[job] = None
        self.cache.touch(prompt.blocks, self._unshared())
        job.joined = self.steps
        job.runs += 1
        self._number += 1
        heappush(self._ends, (self.steps + job.request.output - job.generated, self._number, job.runs, job))

    def _leave(self, job: Job) -> None:
        """Remove a sequence from the batch."""
        del self.active[job]
        job.runs += 1
        job.generated += self.steps - job.joined
        self.kv -= job.request.prompt.tokens + job.generated
        self._release(job)
        if not self.active:
            self.kv = 0.0

    def _sync(self) -> None:
        """Account for the steps up to now."""
        elapsed = self._clock.now - self._time
        self._time = self._clock.now
        count = len(self.active)
        if elapsed <= 0.0 or not (count or self._queue):
            return
        step, growth = self.step(), self.factor * self.model.token * count
        done = (sqrt(step * step + 2.0 * growth * elapsed) - step) / growth if growth else elapsed / step
        self.steps += done
        self.kv += done * count
        self.used += done * count
        if count:
            self.busy += elapsed

    def _plan(self) -> None:
        """Schedule a call at the next change of the batch."""
        self._epoch += 1
        ends, count = self._ends, len(self.active)
        while ends and ends[0][2] != ends[0][3].runs:
            heappop(ends)
        until = ends[0][0] if ends else float("inf")
        if self._queue and self._chunk_ends < until:
            until = self._chunk_ends
        if count > 1:
            full = self.steps + max(0.0, self.model.capacity - self.used) / count
            until = min(until, full)
        if until == float("inf"):
            return
        steps = max(0.0, until - self.steps)
        growth = self.factor * self.model.token * count
        self._clock.at(self._clock.now + steps * (self.step() + 0.5 * growth * steps), self._due, self._epoch)

    def _due(self, epoch: int) -> None:
        if epoch != self._epoch:
            return
        self._sync()
        ends, reached = self._ends, self.steps + 1e-6
        over: list[Job] = []
        while ends and ends[0][0] <= reached:
            _, _, runs, job = heappop(ends)
            if runs == job.runs:
                self._leave(job)
                over.append(job)
        if self._queue and self._chunk_ends <= reached:
            self._computed()
        while len(self.active) > 1 and self.used >= self.model.capacity - 1e-3:
            self._preempt()
        self._admit()
        self._plan()
        for job in over:
            self._end(job)

    def _computed(self) -> None:
        """Handle the end of the computation of the queue's first prompt; the step has sampled a token, too."""
        job = self._queue.popleft()
        self._chunk = 0.0
        self._join(job)
        if not job.first:
            job.prefilled = job.pulled = job.first = self._clock.now
            self._first(job)
        if self._queue:
            self._compute()

    def _preempt(self) -> None:
        """Put the youngest sequence back at the head of the queue; all of its KV cache has to be computed again."""
        job = next(reversed(self.active))
        self._leave(job)
        job.preempted += 1
        self.preemptions += 1
        self.waiting.appendleft(job)

    def _end(self, job: Job) -> None:
        request = job.request
        if request.follow is not None:  # the next turn's prompt begins with this one's prompt and answer
            whole = (request.prompt.tokens + request.output) // BLOCK
            self.cache.touch(request.follow.prompt.blocks[:whole], self._unshared())
        job.ended = self._clock.now
        self._ended(job)
