"""One run: a trace, a fleet's engines and a router, until every request is answered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from bench.fleet.clock import Clock
from bench.fleet.decode import DecodeEngine
from bench.fleet.jobs import Job, Request
from bench.fleet.kinds import Change, Kind
from bench.fleet.prefill import PrefillEngine
from bench.fleet.traffic import Trace


class Router(Protocol):
    """The interface of a router: where requests go, and which events it observes. Places are indices of engines;
    `job.prefill` is -1 where decode computes the prompt."""

    def start(self, fleet: Fleet) -> None:
        """Called once, before all other methods."""

    def place(self, job: Job) -> None:
        """Set the job's `prefill`, `decode` and ranks."""

    def prefilled(self, job: Job) -> None:
        """Called when a prefill engine has answered."""

    def first(self, job: Job) -> None:
        """Called when decode has sent its first token."""

    def ended(self, job: Job) -> None:
        """Called when the answer is complete."""

    def failed(self, job: Job) -> None:
        """Called when the job's prefill engine has left; it is placed again next."""

    def changed(self, engine: int, up: bool) -> None:
        """Called when a prefill engine has left or joined, then with an empty cache."""


@dataclass(frozen=True)
class Outcome:
    """The result of a run.

    Attributes:
        jobs: all of them, in the order in which they ended.
        hit_rate: share of prompt tokens that prefill engines found in their caches; local prefills not counted.
        local: share of requests whose prompt decode computed.
        preemptions: sequences that decode put back into its queue.
        events: events simulated.
    """

    jobs: list[Job]
    hit_rate: float
    local: float
    preemptions: int
    events: int

    @property
    def goodput(self) -> float:
        """Share of requests inside their SLO."""
        return sum(job.good for job in self.jobs) / len(self.jobs)

    def missed(self) -> tuple[float, float]:
        """Share of requests that missed their TTFT, and their TPOT."""
        count = len(self.jobs)
        return (
            sum(job.ttft > job.request.ttft for job in self.jobs) / count,
            sum(job.tpot > job.request.tpot for job in self.jobs) / count,
        )

    def ttft(self, share: float) -> float:
        """A percentile of the time to the first token, in seconds."""
        ordered = sorted(job.ttft for job in self.jobs)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class Fleet:
    """The engines of a run.

    Attributes:
        prefill, decode: for each engine its data-parallel ranks.
    """

    def __init__(self, kind: Kind, router: Router) -> None:
        self.kind = kind
        self.clock = Clock()
        self.router = router
        self.jobs: list[Job] = []
        slow = kind.prefill_factors or (1.0,) * len(kind.prefill)
        self.prefill = [
            [PrefillEngine(self.clock, model, self._prefilled, factor=factor) for _ in range(kind.ranks)]
            for model, factor in zip(kind.prefill, slow, strict=True)
        ]
        slow = kind.decode_factors or (1.0,) * len(kind.decode)
        self.decode = [
            [DecodeEngine(self.clock, model, router.first, self._ended, factor=factor) for _ in range(kind.ranks)]
            for model, factor in zip(kind.decode, slow, strict=True)
        ]
        router.start(self)
        for change in kind.changes:
            if change.what == "join":
                self._set_up(change.engine, False)
            self.clock.at(change.time, self._change, change)

    def run(self, trace: Trace) -> Outcome:
        """Send a trace's requests, and simulate until all are answered."""
        for request in trace:
            self.clock.at(request.time, self._send, request)
        self.clock.run()
        ranks = [rank for engine in self.prefill for rank in engine]
        seen = sum(rank.computed + rank.hit for rank in ranks)
        return Outcome(
            self.jobs,
            sum(rank.hit for rank in ranks) / seen if seen else 0.0,
            sum(job.prefill < 0 for job in self.jobs) / len(self.jobs),
            sum(rank.preemptions for engine in self.decode for rank in engine),
            self.clock.events,
        )

    def _send(self, request: Request) -> None:
        self._place(Job(request, self.clock.now))

    def _place(self, job: Job) -> None:
        self.router.place(job)
        if job.prefill >= 0:
            self.prefill[job.prefill][job.prefill_rank].submit(job)
        else:
            self.decode[job.decode][job.decode_rank].submit(job)

    def _prefilled(self, job: Job) -> None:
        self.router.prefilled(job)
        self.decode[job.decode][job.decode_rank].submit(job)

    def _ended(self, job: Job) -> None:
        self.router.ended(job)
        self.jobs.append(job)
        request = job.request
        if request.follow is not None:
            self.clock.at(self.clock.now + request.pause, self._send, request.follow)

    def _change(self, change: Change) -> None:
        if change.what == "slow":
            for rank in (self.decode if change.pool == "decode" else self.prefill)[change.engine]:
                if isinstance(rank, DecodeEngine):
                    rank.slow(change.value)
                else:
                    rank.factor = change.value
        elif change.what == "restart":
            lost = [job for rank in self.prefill[change.engine] for job in rank.restart()]
            self._set_up(change.engine, False)
            self.clock.at(self.clock.now + change.value, self._back, change.engine)
            for job in lost:
                self.router.failed(job)
                job.position = job.left = 0
                self._place(job)
        else:
            self._back(change.engine)

    def _back(self, engine: int) -> None:
        self._set_up(engine, True)

    def _set_up(self, engine: int, up: bool) -> None:
        for rank in self.prefill[engine]:
            rank.up = up
        self.router.changed(engine, up)


def simulate(kind: Kind, trace: Trace, router: Router) -> Outcome:
    """Run a trace on a kind's fleet."""
    return Fleet(kind, router).run(trace)
