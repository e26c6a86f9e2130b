"""This gateway: its own backends, leases, prefix index, learnt speeds, eligibility and policies, in virtual time.

It sees what a gateway sees: bytes of prompts, what clients allow, when engines answer, `cached_tokens` and
`prompt_tokens` of their usage, and the gaps between the tokens of its streams.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from math import ceil
from random import Random

from bench.fleet.fleet import Fleet
from bench.fleet.jobs import Job
from proxy.fleet.backend import Backend, Lease
from proxy.fleet.speeds import PoolSpeeds
from proxy.flow.request import EXPECTED_OUTPUT
from proxy.handoff.coordinates import Coordinates
from proxy.placement.ask import Ask
from proxy.placement.decide import decide
from proxy.placement.eligibility import Members, Needs, Rules, eligible
from proxy.prefix.index import PrefixIndex

WATCH = 0.25
"""Seconds between two looks at the gaps between tokens."""
_BATCH = 32  # tokens after which the relay tells what a stream's have taken (`proxy/relay/passage.py`)
_MOST_TOLD = 8  # of one engine at one look; more change little
_WINDOW = 4  # looks over which a gap is a mean: 32 tokens take about a second

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
    meets=frozenset(),
    all_plain=True,
    splits_somewhere=frozenset(),
    splits_everywhere=frozenset(),
    endpoints_everywhere=frozenset({"chat"}),
)
"""Engines of one kind, with a connector that splits every request."""


@dataclass(slots=True)
class _Notes:
    """What the gateway keeps of a request under way."""

    decode: Lease
    prefill: Lease | None
    believed: int
    reason: str


class Gateway:
    """The router.

    Arguments:
        policy: of `POLICIES`.
        targets: whether clients' targets are set.
    Attributes:
        reasons: how many requests were placed for each reason.
        expected: prompt tokens that were thought to be cached where they went.
    """

    def __init__(self, policy: str, *, seed: int = 0, targets: bool = True) -> None:
        self._policies = POLICIES[policy]
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
            Backend(f"http://prefill-{number}", "prefill", speeds=prefills.join())
            for number in range(len(fleet.prefill))
        ]
        self.decode = [
            Backend(f"http://decode-{number}", "decode", speeds=decodes.join()) for number in range(len(fleet.decode))
        ]
        sizes = {"prefill": len(self.prefill), "decode": len(self.decode), "mixed": 0}
        self._members: Members[Backend] = Members(self.prefill, self.decode, (), configured=sizes)
        self._places = {
            backend.url: number for pool in (self.prefill, self.decode) for number, backend in enumerate(pool)
        }
        for backend, model in [*zip(self.prefill, fleet.kind.prefill, strict=True)]:
            self.index.join(backend.url, model.capacity * fleet.kind.ranks)
        for backend, one in [*zip(self.decode, fleet.kind.decode, strict=True)]:
            self.index.join(backend.url, one.capacity * fleet.kind.ranks)
            backend.speeds.capacity = one.capacity * fleet.kind.ranks
        for backend in (*self.prefill, *self.decode):
            backend.locate(ranks)
            backend.mark_up()
        # Of each decode engine, at the last looks: its steps, and the seconds that they took.
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
        needs: Needs[Backend] = Needs(None, tokens, ask.decode_tokens, "chat", "/v1/chat/completions")
        found = eligible(self._members, needs, RULES)
        decision = decide(found.view, ask, alone=found.alone, policies=self._policies, allow_local_prefill=True)
        self.reasons[decision.reason] = self.reasons.get(decision.reason, 0) + 1
        decode, prefill = decision.decode, decision.prefill
        computes = prefill or decode
        believed = ask.uncached(computes.url)
        self.expected += tokens - believed
        job.decode = self._places[decode.url]
        lease = Lease(decode, ask.decode_tokens)
        job.decode_rank = lease.rank or 0
        prefill_lease = None
        if prefill is not None:
            prefill_lease = Lease(prefill, tokens)
            job.prefill, job.prefill_rank = self._places[prefill.url], prefill_lease.rank or 0
            self.index.enter(prefill.url, chain, now)
        else:
            job.prefill = -1
        self.index.enter(decode.url, chain, now)
        computes.speeds.given(believed, now, tokens)
        job.notes = _Notes(lease, prefill_lease, believed, decision.reason)
        self._inside += 1
        if not self._watching:
            self._watching = True
            self._clock.at(now + WATCH, self._watch)

    def prefilled(self, job: Job) -> None:
        notes, prompt = _notes(job), job.request.prompt
        assert notes.prefill is not None
        backend = notes.prefill.backend
        notes.prefill.release()
        backend.speeds.answered(notes.believed, prompt.tokens - job.cached, prompt.tokens, self._clock.now)
        self.index.correct(backend.url, prompt.chain, job.cached, prompt.tokens)

    def first(self, job: Job) -> None:
        notes, now = _notes(job), self._clock.now
        backend, prompt = notes.decode.backend, job.request.prompt
        if notes.prefill is not None:
            backend.speeds.handed_over(now - job.prefilled, prompt.estimate, now)
        else:
            # What it had found in its cache is in its usage, which comes with the end of the stream.
            backend.speeds.answered(notes.believed, notes.believed, prompt.estimate, now)

    def ended(self, job: Job) -> None:
        notes, prompt = _notes(job), job.request.prompt
        url = notes.decode.backend.url
        notes.decode.release()
        if notes.prefill is None:
            self.index.correct(url, prompt.chain, job.cached, prompt.tokens)
        else:
            self.index.settle(url, prompt.chain)
        self._inside -= 1

    def failed(self, job: Job) -> None:
        notes, chain, now = _notes(job), job.request.prompt.chain, self._clock.now
        assert notes.prefill is not None
        for lease in (notes.prefill, notes.decode):
            lease.release()
            self.index.withdraw(lease.backend.url, chain)
        notes.prefill.backend.speeds.withdrawn(notes.believed, now)
        self._inside -= 1

    def changed(self, engine: int, up: bool) -> None:
        backend, now = self.prefill[engine], self._clock.now
        if up:
            backend.mark_up()
            backend.speeds.returned(now)
            self.index.clear(backend.url)
        else:
            backend.mark_down("is gone")
            backend.speeds.left(now)
        self._members.prefill = [one for one in self.prefill if one.up]

    def _watch(self, _: object) -> None:
        """Tell the gaps between tokens, as often as the relay of all streams would."""
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


def _notes(job: Job) -> _Notes:
    assert isinstance(job.notes, _Notes)
    return job.notes
