"""A router that sees what no gateway can: exact caches, queues, present speeds and the length of answers.

It is greedy, so it is no upper bound: a rule that leaves an engine free for later requests may be better. It is run in
a few variants; the best of them for each trace is called the oracle.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

from bench.fleet.blocks import BlockCache
from bench.fleet.decode import DecodeEngine
from bench.fleet.fleet import Fleet
from bench.fleet.jobs import Job
from bench.fleet.prefill import PrefillEngine


@dataclass(frozen=True)
class Variant:
    """How the oracle decides.

    Attributes:
        local: whether decode may compute prompts, where this endangers no sequence's TPOT.
        pack: prompts that take longer than this many seconds are queued behind each other.
        weight: how much a prompt's own work counts above its time, since work that is done twice delays all requests.
        margin: share of the TTFT target by which decode has to be sooner.
    """

    local: bool = True
    pack: float = 4.0
    weight: float = 0.0
    margin: float = 0.0


VARIANTS = {
    "greedy": Variant(pack=1e9),
    "packing": Variant(),
    "frugal": Variant(weight=1.0),
    "spilling": Variant(margin=0.25),
    "frugal, spilling": Variant(weight=1.0, margin=0.25),
    "remote": Variant(local=False),
}
_MARGIN = 0.95  # share of the TPOT target that a sequence may reach because of another's prompt
_SHORTLIST = 4  # decode engines that are considered for a local prefill


class _Place(NamedTuple):
    """A rank that could compute a prompt."""

    cost: float
    ends: float
    own: float
    engine: int
    rank: int
    backlog: float


class Oracle:
    """The router."""

    def __init__(self, variant: Variant) -> None:
        self._variant = variant

    def start(self, fleet: Fleet) -> None:
        self._clock = fleet.clock
        self._prefill: list[list[PrefillEngine]] = fleet.prefill
        self._decode: list[list[DecodeEngine]] = fleet.decode
        # What each engine's cache will be when it begins the last prompt that it was sent, and when it ends it.
        self._caches = [[BlockCache(rank.model.capacity) for rank in engine] for engine in fleet.prefill]
        self._until = [[0.0 for _ in engine] for engine in fleet.prefill]
        # Sequences and tokens on their way to a decode engine, and the final size of all its sequences.
        self._coming = [[[0, 0] for _ in engine] for engine in fleet.decode]
        self._final = [[0 for _ in engine] for engine in fleet.decode]

    def place(self, job: Job) -> None:
        """Choose the prefill rank that is expected to be done first, and the decode engine whose step will be
        shortest."""
        request = job.request
        prompt, tokens = request.prompt, request.prompt.tokens
        steps = sorted(
            (self._step(engine, rank, tokens, request.output), engine, rank)
            for engine, ranks in enumerate(self._decode)
            for rank in range(len(ranks))
        )
        job.decode, job.decode_rank = steps[0][1:]
        remote = self._remote(job)
        if self._variant.local:
            local = self._local(job, steps[:_SHORTLIST], remote)
            if local is not None:
                job.prefill, (job.decode, job.decode_rank) = -1, local
                self._final[job.decode][job.decode_rank] += tokens + request.output
                return
        assert remote is not None, "a fleet without prefill engines"
        job.prefill, job.prefill_rank = remote.engine, remote.rank
        self._until[remote.engine][remote.rank] = remote.ends
        self._caches[remote.engine][remote.rank].touch(prompt.blocks)
        coming = self._coming[job.decode][job.decode_rank]
        coming[0] += 1
        coming[1] += tokens
        self._final[job.decode][job.decode_rank] += tokens + request.output

    def prefilled(self, job: Job) -> None:
        self._arrived(job)

    def first(self, job: Job) -> None:
        pass

    def ended(self, job: Job) -> None:
        request = job.request
        self._final[job.decode][job.decode_rank] -= request.prompt.tokens + request.output

    def failed(self, job: Job) -> None:
        self._arrived(job)
        self.ended(job)

    def changed(self, engine: int, up: bool) -> None:
        for rank, cache in enumerate(self._caches[engine]):
            cache.clear()
            self._until[engine][rank] = 0.0

    def _arrived(self, job: Job) -> None:
        coming = self._coming[job.decode][job.decode_rank]
        coming[0] -= 1
        coming[1] -= job.request.prompt.tokens

    def _step(self, engine: int, rank: int, tokens: int, output: int) -> float:
        """Seconds of a step with one more sequence, and a penalty where the KV cache will not hold all."""
        decode = self._decode[engine][rank]
        sequences, coming = self._coming[engine][rank]
        step = decode.model.step(decode.sequences + sequences + 1, decode.kv + coming + tokens)
        over = self._final[engine][rank] + tokens + output - decode.model.capacity
        return decode.factor * step + max(0, over) * 1e-6

    def _remote(self, job: Job) -> _Place | None:
        """The best prefill rank; None where none is up."""
        prompt, now, variant = job.request.prompt, self._clock.now, self._variant
        places: list[_Place] = []
        for number, ranks in enumerate(self._prefill):
            for rank, engine in enumerate(ranks):
                if not engine.up:
                    continue
                model = engine.model
                cached = min(self._caches[number][rank].matched(prompt.blocks), prompt.tokens - 1)
                left = prompt.tokens - cached
                own = engine.factor * (model.seconds(cached, left) + model.overhead * ceil(left / model.chunk))
                backlog = max(0.0, self._until[number][rank] - now)
                ends = now + backlog + own
                places.append(_Place(ends + variant.weight * own, ends, own, number, rank, backlog))
        if not places:
            return None
        best = min(places)
        if best.own > variant.pack:
            return max(
                (place for place in places if place.cost <= best.cost + best.own), key=lambda place: place.backlog
            )
        return best

    def _local(self, job: Job, steps: list[tuple[float, int, int]], remote: _Place | None) -> tuple[int, int] | None:
        """A decode rank that would have the first token sooner and keep every sequence inside its TPOT."""
        request = job.request
        prompt, now = request.prompt, self._clock.now
        best: tuple[int, int] | None = None
        limit = float("inf")
        if remote is not None:
            decode = self._decode[job.decode][job.decode_rank]
            limit = remote.ends + decode.model.latency + prompt.tokens / decode.model.pull + decode.step()
            limit -= self._variant.margin * request.ttft
        for _, engine, rank in steps:
            decode = self._decode[engine][rank]
            model = decode.model.prefill
            cached = min(decode.cache.matched(prompt.blocks), prompt.tokens - 1)
            left = prompt.tokens - cached
            seconds = decode.factor * model.seconds(cached, left)
            ends = now + decode.ahead() + seconds + ceil(left / model.chunk) * decode.step()
            if ends < limit and not decode.waiting and self._harmless(decode, seconds, now):
                best, limit = (engine, rank), ends
        return best

    def _harmless(self, decode: DecodeEngine, seconds: float, now: float) -> bool:
        """Whether all sequences stay inside their TPOT when each waits this many seconds more."""
        step, behind = decode.factor * decode.model.step(decode.sequences + 1, decode.kv), decode.ahead() + seconds
        for job in decode.active:
            request = job.request
            written = job.generated + decode.steps - job.joined
            whole = now - job.first + behind + max(0.0, request.output - written) * step
            if whole > _MARGIN * request.tpot * (request.output - 1):
                return False
        return True
