"""This gateway in virtual time: its own backends, leases, prefix index, learnt speeds, eligibility and policies.

It observes only what a gateway can: bytes of prompts, the clients' limits, when engines answer, `cached_tokens` and
`prompt_tokens` of their usage, and the gaps between the tokens of its streams.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from math import ceil
from random import Random

from pd_proxy.fleet.backend import Backend, Lease
from pd_proxy.fleet.pool_speeds import PoolSpeeds
from pd_proxy.fleet.speeds import join_pool
from pd_proxy.flow.request import EXPECTED_OUTPUT
from pd_proxy.handoff.coordinates import Coordinates
from pd_proxy.placement.ask import Ask
from pd_proxy.placement.decide import decide
from pd_proxy.placement.eligibility import Members, Needs, Rules, eligible
from pd_proxy.placement.ranks import by_engine, rank_for
from pd_proxy.prefix.index import PrefixIndex

from bench.fleet.fleet import Fleet
from bench.fleet.jobs import Job

WATCH = 0.25
"""Seconds between two readings of the gaps between tokens."""
_BATCH = 32  # tokens after which the relay reports a stream's gaps (`proxy/pd_proxy/relay/fast_path.py`)
_MOST_TOLD = 8  # most reports for one engine at one reading; more of them change little
_WINDOW = 4  # readings over which a gap is averaged: 32 tokens take about a second

POLICIES: dict[str, dict[str, str]] = {
    "auto": {"prefill": "auto", "decode": "auto", "mixed": "auto"},
    "least_loaded": {"prefill": "least_loaded", "decode": "least_loaded", "mixed": "least_loaded"},
    "prefix": {"prefill": "prefix", "decode": "least_loaded", "mixed": "prefix"},
    "session": {"prefill": "session", "decode": "least_loaded", "mixed": "session"},
    "round_robin": {"prefill": "round_robin", "decode": "round_robin", "mixed": "round_robin"},
    "random": {"prefill": "random", "decode": "random", "mixed": "random"},
    "power_of_two": {"prefill": "power_of_two", "decode": "power_of_two", "mixed": "power_of_two"},
}

RULES = Rules(
    splits={},
    endpoints={},
    plain=frozenset(),
    negotiates=frozenset(),
    all_plain=True,
    splits_somewhere=frozenset(),
    splits_everywhere=frozenset(),
    endpoints_everywhere=frozenset({"chat"}),
)
"""Engines of one kind, with a connector that splits every request."""


@dataclass(slots=True)
class _Notes:
    """What the gateway keeps of a running request."""

    decode: Lease
    prefill: Lease | None
    believed: int
    reason: str
    prefill_name: str
    decode_name: str


class Gateway:
    """The router.

    Arguments:
        policy: one of `POLICIES`.
        targets: whether clients' targets are set.
    Attributes:
        reasons: how many requests were placed for each reason.
        expected: prompt tokens that were expected to be cached at the chosen engine.
    """

    def __init__(self, policy: str, *, seed: int = 0, targets: bool = True) -> None:
        self._policies = POLICIES[policy]
        self._looks = not {"auto", "prefix"}.isdisjoint(self._policies.values())
        self._random = Random(seed).random
        self._targets = targets
        self._turn = 0
        self.reasons: dict[str, int] = {}
        self.expected = 0

    def start(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._clock = fleet.clock
        self.index = PrefixIndex()
        ranks = Coordinates(dp=fleet.kind.ranks)
        prefills, decodes = PoolSpeeds(), PoolSpeeds()
        self.prefill = [
            Backend(f"http://prefill-{number}", "prefill", speeds=join_pool(prefills))
            for number in range(len(fleet.prefill))
        ]
        self.decode = [
            Backend(f"http://decode-{number}", "decode", speeds=join_pool(decodes))
            for number in range(len(fleet.decode))
        ]
        sizes = {"prefill": len(self.prefill), "decode": len(self.decode), "mixed": 0}
        self._members: Members[Backend] = Members(self.prefill, self.decode, (), configured=sizes)
        self._places = {
            backend.url: number for pool in (self.prefill, self.decode) for number, backend in enumerate(pool)
        }
        self._ranked: dict[str, Backend] = {}
        for backend in (*self.prefill, *self.decode):
            backend.locate(ranks)
            backend.mark_up()
            if backend.ranks:
                self._ranked.update(dict.fromkeys((backend.url, *backend.rank_names), backend))
        capacities = [*(one.capacity for one in fleet.kind.prefill), *(one.capacity for one in fleet.kind.decode)]
        for backend, size in zip((*self.prefill, *self.decode), capacities, strict=True):
            for name in backend.rank_names or (backend.url,):
                self.index.join(name, size)
        for backend, one in zip(self.decode, fleet.kind.decode, strict=True):
            backend.speeds.capacity = one.capacity * fleet.kind.ranks
        # For each decode engine, at the last readings: its steps, and the seconds that they took.
        self._seen = [deque([(0.0, 0.0)], maxlen=_WINDOW + 1) for _ in self.decode]
        self._inside = 0
        self._watching = False

    def place(self, job: Job) -> None:
        request, now = job.request, self._clock.now
        prompt = request.prompt
        chain, tokens = prompt.chain, prompt.estimate
        self._turn += 1
        ask = Ask(
            self._random,
            self._turn,
            now,
            tokens,
            tokens + (request.max_tokens or EXPECTED_OUTPUT),
            self.index.cached(chain),
            request.session,
            request.ttft if self._targets else None,
            request.tpot if self._targets else None,
        )
        if self._ranked and ask.cached:
            ask.cached = by_engine(ask, self._ranked)
        needs: Needs[Backend] = Needs(None, tokens, ask.decode_tokens, "chat", "/v1/chat/completions")
        found = eligible(self._members, needs, RULES)
        decision = decide(
            found.view, ask, unsplittable=found.unsplittable, policies=self._policies, allow_local_prefill=True
        )
        self.reasons[decision.reason] = self.reasons.get(decision.reason, 0) + 1
        decode, prefill = decision.decode, decision.prefill
        computes = prefill or decode
        believed = ask.uncached(computes.url)
        self.expected += tokens - believed
        job.decode = self._places[decode.url]
        rank = rank_for(computes, ask) if computes.ranks and self._looks else None
        lease = Lease(decode, ask.decode_tokens, rank if prefill is None else None)
        job.decode_rank = lease.rank or 0
        prefill_lease, prefill_name, decode_name = None, "", _name(lease)
        if prefill is not None:
            prefill_lease = Lease(prefill, tokens, rank)
            job.prefill, job.prefill_rank = self._places[prefill.url], prefill_lease.rank or 0
            prefill_name = _name(prefill_lease)
            self.index.enter(prefill_name, chain, now)
        else:
            job.prefill = -1
        self.index.enter(decode_name, chain, now)
        computes.speeds.given(believed, now, tokens)
        if rank is not None:
            computes.rank_work[rank] += believed
        job.notes = _Notes(lease, prefill_lease, believed, decision.reason, prefill_name, decode_name)
        self._inside += 1
        if not self._watching:
            self._watching = True
            self._clock.at(now + WATCH, self._watch)

    def prefilled(self, job: Job) -> None:
        notes, prompt = _notes(job), job.request.prompt
        assert notes.prefill is not None
        backend = notes.prefill.backend
        notes.prefill.release()
        _computed(notes.prefill, notes.believed)
        backend.speeds.answered(notes.believed, prompt.tokens - job.cached, prompt.tokens, self._clock.now)
        self.index.correct(notes.prefill_name, prompt.chain, job.cached, prompt.tokens)

    def first(self, job: Job) -> None:
        notes, now = _notes(job), self._clock.now
        backend, prompt = notes.decode.backend, job.request.prompt
        if notes.prefill is not None:
            backend.speeds.handed_over(now - job.prefilled, prompt.estimate, now)
        else:
            # How much it found in its cache is in its usage, which comes with the end of the stream.
            _computed(notes.decode, notes.believed)
            backend.speeds.answered(notes.believed, notes.believed, prompt.estimate, now)

    def ended(self, job: Job) -> None:
        notes, prompt = _notes(job), job.request.prompt
        notes.decode.release()
        if notes.prefill is None:
            self.index.correct(notes.decode_name, prompt.chain, job.cached, prompt.tokens)
        else:
            self.index.settle(notes.decode_name, prompt.chain)
        self._inside -= 1

    def failed(self, job: Job) -> None:
        notes, chain, now = _notes(job), job.request.prompt.chain, self._clock.now
        assert notes.prefill is not None
        for lease, name in ((notes.prefill, notes.prefill_name), (notes.decode, notes.decode_name)):
            lease.release()
            self.index.withdraw(name, chain)
        _computed(notes.prefill, notes.believed)
        notes.prefill.backend.speeds.withdrawn(notes.believed, now)
        self._inside -= 1

    def changed(self, engine: int, up: bool) -> None:
        backend, now = self.prefill[engine], self._clock.now
        if up:
            backend.mark_up()
            backend.speeds.returned(now)
            for name in backend.rank_names or (backend.url,):
                self.index.clear(name)
        else:
            backend.mark_down("is gone")
            backend.speeds.left(now)
        self._members.prefill = [one for one in self.prefill if one.up]

    def _watch(self, _: object) -> None:
        """Report the gaps between tokens, as often as the relay of all streams would."""
        now = self._clock.now
        for backend, ranks, seen in zip(self.decode, self._fleet.decode, self._seen, strict=True):
            steps = busy = 0.0
            for rank in ranks:
                more, seconds = rank.watch()
                steps, busy = steps + more, busy + seconds
            before, since = seen[0]
            last = seen[-1][0]
            seen.append((steps, busy))
            streams = sum(len(rank.active) for rank in ranks) / len(ranks)
            count = min(_MOST_TOLD, ceil((steps - last) * streams / _BATCH))
            for _ in range(count if steps - before >= 1.0 else 0):
                gap = (busy - since) / (steps - before)
                backend.speeds.stepped(gap, backend.inflight_requests, backend.inflight_tokens, now)
        self._watching = self._inside > 0
        if self._watching:
            self._clock.at(now + WATCH, self._watch)


def _name(lease: Lease) -> str:
    """The prefix index's name for the engine or rank of a lease."""
    backend = lease.backend
    return backend.url if lease.rank is None else backend.rank_names[lease.rank]


def _computed(lease: Lease, believed: int) -> None:
    """Note that a rank no longer has to prefill a prompt."""
    if lease.rank is not None:
        lease.backend.rank_work[lease.rank] -= believed


def _notes(job: Job) -> _Notes:
    assert isinstance(job.notes, _Notes)
    return job.notes
