"""The placement policies, which choose one backend of a pool. Each is a pure function of candidates and request."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from hashlib import blake2b
from math import ceil
from typing import Any, Protocol

from pd_proxy.placement.ask import Ask


class Candidate(Protocol):
    """What a policy may read of a backend."""

    @property
    def url(self) -> str: ...

    @property
    def inflight_tokens(self) -> int: ...

    @property
    def inflight_requests(self) -> int: ...

    @property
    def elsewhere_tokens(self) -> int: ...

    @property
    def elsewhere_requests(self) -> int: ...

    @property
    def factor(self) -> float:
        """The share of its usual load that it may be given, in (0, 1]: below 1 during its slow start."""


Choice = Callable[[Sequence[Any], Ask], int]
"""(candidates, ask) -> index of the chosen one. Candidates are never empty."""

_BOUND = 1.25  # times the mean of requests in flight; Mirrokni et al. 2018 have the trade-off
_FEWEST = 4  # requests in flight that every backend may have, whatever the mean


def load(candidate: Candidate) -> tuple[float, float]:
    """The load that `least_loaded` compares: tokens in flight, then requests, both divided by the candidate's factor.

    Those of the gateway's other workers are included. One request is added, so that of idle candidates those in slow
    start come last.
    """
    factor = candidate.factor
    tokens = candidate.inflight_tokens + candidate.elsewhere_tokens
    requests = candidate.inflight_requests + candidate.elsewhere_requests + 1
    return (tokens, requests) if factor == 1.0 else (tokens / factor, requests / factor)


def _or_next(candidates: Sequence[Candidate], index: int, ask: Ask) -> int:
    """The candidate at `index`; where it is in slow start, sometimes the next one instead."""
    factor = candidates[index].factor
    return index if factor == 1.0 or ask.random() < factor else (index + 1) % len(candidates)


def least_loaded(candidates: Sequence[Candidate], ask: Ask) -> int:
    """The candidate with the fewest tokens in flight. Ties are broken at random, so that gateways that start together
    do not all send their first requests to the same backend."""
    return 0 if len(candidates) == 1 else lightest(candidates, range(len(candidates)), ask)


def lightest(candidates: Sequence[Candidate], among: Sequence[int], ask: Ask) -> int:
    """The least loaded of the candidates at the indices `among`. The order is that of `load`, inlined for speed."""
    tokens = [((c := candidates[n]).inflight_tokens + c.elsewhere_tokens) / c.factor for n in among]
    least = min(tokens)
    same = tokens.count(least)
    if same == 1:
        return among[tokens.index(least)]
    if same < len(tokens):
        among = [n for n, value in zip(among, tokens, strict=True) if value == least]
    requests = [((c := candidates[n]).inflight_requests + c.elsewhere_requests + 1) / c.factor for n in among]
    fewest = min(requests)
    same = requests.count(fewest)
    if same == 1:
        return among[requests.index(fewest)]
    if same < len(requests):
        among = [n for n, value in zip(among, requests, strict=True) if value == fewest]
    return among[int(ask.random() * same)]


def round_robin(candidates: Sequence[Candidate], ask: Ask) -> int:
    """Each candidate in turn."""
    return _or_next(candidates, ask.turn % len(candidates), ask)


def at_random(candidates: Sequence[Candidate], ask: Ask) -> int:
    """A random candidate."""
    return _or_next(candidates, int(ask.random() * len(candidates)), ask)


def power_of_two(candidates: Sequence[Candidate], ask: Ask) -> int:
    """The less loaded of two random candidates (Mitzenmacher 2001). Nearly as even as `least_loaded`; and several
    gateways that see the same outdated loads do not all choose the same backend."""
    count = len(candidates)
    if count == 1:
        return 0
    first = int(ask.random() * count)
    second = (first + 1 + int(ask.random() * (count - 1))) % count
    return first if load(candidates[first]) <= load(candidates[second]) else second


def _requests(candidates: Sequence[Candidate]) -> list[float]:
    return [(c.inflight_requests + c.elsewhere_requests) / c.factor for c in candidates]


def _bound(requests: Sequence[float]) -> float:
    """The most requests that a candidate may have, the new one included."""
    return max(_FEWEST, ceil(_BOUND * (sum(requests) + 1) / len(requests)))


@lru_cache(4096)
def _key(url: str) -> int:
    return int.from_bytes(blake2b(url.encode(), digest_size=8).digest(), "little")


def session(candidates: Sequence[Candidate], ask: Ask) -> int:
    """The same candidate for all requests of a session, within a bound on its load (consistent hashing with bounded
    loads:
    Mirrokni, Thorup, Zadimoghaddam 2018).

    Each session has its own order of the candidates, by a hash of both (rendezvous hashing: Thaler, Ravishankar 1998).
    So a backend that joins or leaves moves only its own sessions. The first candidate in this order is taken whose
    requests in flight stay within 1.25 of the mean. Requests without a session go to the least loaded candidate. So do
    all while no candidate is within the bound, which can happen in a slow start of all, when loads are not whole
    numbers.
    """
    if not ask.session:
        return least_loaded(candidates, ask)
    name = int.from_bytes(blake2b(ask.session, digest_size=8).digest(), "little")
    requests = _requests(candidates)
    most = _bound(requests) - 1
    best, highest = 0, -1
    for index, candidate in enumerate(candidates):
        if requests[index] <= most:
            score = (_key(candidate.url) ^ name) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
            score = (score ^ score >> 32) * 0xD6E8FEB86659FD93 & 0xFFFFFFFFFFFFFFFF
            if score > highest:
                best, highest = index, score
    return best if highest >= 0 else least_loaded(candidates, ask)


def prefix(candidates: Sequence[Candidate], ask: Ask) -> int:
    """The candidate that is believed to have most of the prompt cached, of those whose requests in flight stay within
    1.25 of the mean. Ties are broken by the least load, which is also the rule where nothing is cached."""
    cached = ask.cached
    if not cached or len(candidates) == 1:
        return least_loaded(candidates, ask)
    requests = _requests(candidates)
    most = _bound(requests) - 1
    hits = [
        min(cached.get(candidate.url, 0), ask.prompt_tokens) if requests[index] <= most else -1
        for index, candidate in enumerate(candidates)
    ]
    longest = max(hits)
    best = [index for index, hit in enumerate(hits) if hit == longest]
    return best[least_loaded([candidates[index] for index in best], ask)]


POLICIES: dict[str, Choice] = {
    "least_loaded": least_loaded,
    "round_robin": round_robin,
    "random": at_random,
    "power_of_two": power_of_two,
    "session": session,
    "prefix": prefix,
}
"""The policies that are the same in every pool. `auto` has a rule for each pool: see `auto.py`."""
