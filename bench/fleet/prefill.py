"""A prefill engine: first come, first served, in chunks."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass

from bench.fleet.blocks import BlockCache
from bench.fleet.clock import Clock
from bench.fleet.jobs import Job


@dataclass(frozen=True)
class PrefillModel:
    """The speed and capacity of a prefill engine.

    Attributes:
        rate: tokens/s without attention's share.
        attention: seconds that one token costs for each token before it: 100,000 tokens take 16.7 + 5 s.
        chunk: tokens of one step at most (vLLM: `max_num_batched_tokens`).
        overhead: seconds of a step, however short.
        capacity: tokens of its KV cache.
        adapters: LoRA adapters that it holds; loading another one takes `adapter_load` seconds of a step.
    """

    rate: float = 6000.0
    attention: float = 1e-9
    chunk: int = 8192
    overhead: float = 0.010
    capacity: int = 400_000
    adapters: int = 8
    adapter_load: float = 0.1

    def seconds(self, start: int, count: int) -> float:
        """Seconds to compute `count` tokens behind `start` others, without the steps' overhead."""
        return count / self.rate + self.attention * count * (start + 0.5 * count)


class PrefillEngine:
    """One engine, or one data-parallel rank of one.

    Attributes:
        factor: how many times longer than its model it takes at present.
        up: whether it accepts requests.
        computed: prompt tokens computed so far; hit: found in its cache.
    """

    def __init__(
        self,
        clock: Clock,
        model: PrefillModel,
        done: Callable[[Job], object],
        *,
        factor: float = 1.0,
        caching: bool = True,
    ) -> None:
        self.model = model
        self.factor = factor
        self.cache = BlockCache(model.capacity if caching else 0)
        self.up = True
        self.computed = 0
        self.hit = 0
        self._clock = clock
        self._done = done
        self._queue: deque[Job] = deque()
        self._step: list[Job] | None = None  # jobs that end with the running step; None while idle
        self._step_ends = 0.0
        self._life = 0
        self._adapters: OrderedDict[str, None] = OrderedDict()

    def submit(self, job: Job) -> None:
        """Put a prompt at the end of the queue."""
        job.cached = -1
        self._queue.append(job)
        if self._step is None:
            self._start()

    @property
    def waiting_work(self) -> float:
        """The measure by which an engine spreads requests over its ranks: how many each has."""
        return len(self._queue) + (self._step is not None)

    def ahead(self) -> float:
        """Seconds until a prompt that came now would begin. For the oracle only: no gateway can see it."""
        seconds = 0.0
        model = self.model
        for job in self._queue:
            left = job.left
            if job.cached < 0:
                chain = job.request.prompt
                left = chain.tokens - min(self.cache.matched(chain.blocks), chain.tokens - 1)
            seconds += model.seconds(job.request.prompt.tokens - left, left)
        seconds *= self.factor
        if self._step is not None:
            seconds += max(0.0, self._step_ends - self._clock.now)
        return seconds

    def restart(self) -> list[Job]:
        """Lose the cache and all jobs; returns the jobs."""
        self._life += 1
        lost = [*(self._step or ()), *self._queue]
        self._queue.clear()
        self._step = None
        self.cache.clear()
        self._adapters.clear()
        return lost

    def _start(self) -> None:
        """Begin a step with the prompts at the head of the queue."""
        queue, model, budget = self._queue, self.model, self.model.chunk
        seconds, done = model.overhead, []
        while queue and budget:
            job = queue[0]
            if job.cached < 0:
                seconds += self._begin(job)
            count = min(job.left, budget)
            seconds += model.seconds(job.position, count)
            job.position += count
            job.left -= count
            budget -= count
            self.computed += count
            if job.left:
                break
            done.append(queue.popleft())
        self._step = done
        self._step_ends = self._clock.now + seconds * self.factor
        self._clock.at(self._step_ends, self._end, self._life)

    def _begin(self, job: Job) -> float:
        """Look a prompt up in the cache, and hold its blocks from now on; returns the seconds to load its adapter."""
        prompt, cache = job.request.prompt, self.cache
        # The last token is always computed: its logits are needed.
        job.cached = job.position = min(cache.matched(prompt.blocks), prompt.tokens - 1)
        job.left = prompt.tokens - job.position
        job.began = self._clock.now
        self.hit += job.cached
        if cache.capacity:
            cache.touch(prompt.blocks)
        adapter = job.request.adapter
        if not adapter:
            return 0.0
        known = adapter in self._adapters
        self._adapters[adapter] = None
        self._adapters.move_to_end(adapter)
        if known:
            return 0.0
        if len(self._adapters) > self.model.adapters:
            self._adapters.popitem(last=False)
        return self.model.adapter_load

    def _end(self, life: int) -> None:
        if life != self._life:
            return
        done, self._step = self._step, None
        if self._queue:
            self._start()
        for job in done or ():
            job.prefilled = self._clock.now
            self._done(job)
