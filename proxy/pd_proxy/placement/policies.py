"""How one backend is chosen among those of a pool. Each policy is one pure function of candidates and request."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from hashlib import blake2b
from math import ceil
from typing import Any, Protocol

from pd_proxy.placement.ask import Ask


class Candidate(Protocol):
    """What a policy may look at."""

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
_FEWEST = 4  # requests in flight that are never too many


def load(candidate: Candidate) -> tuple[float, float]:
    """What least-loaded compares: tokens in flight, then requests, those of this gateway's other workers included; both
    over the candidate's factor. One request is added, so that of idle candidates those in their slow start come last.
    """
    factor = candidate.factor
    tokens = candidate.inflight_tokens + candidate.elsewhere_tokens
    requests = candidate.inflight_requests + candidate.elsewhere_requests + 1
    return (tokens, requests) if factor == 1.0 else (tokens / factor, requests / factor)


def _or_next(candidates: Sequence[Candidate], index: int, ask: Ask) -> int:
    """The one at `index`; as often as its slow start has it, the next one in its stead."""
    factor = candidates[index].factor
    return index if factor == 1.0 or ask.random() < factor else (index + 1) % len(candidates)


def least_loaded(candidates: Sequence[Candidate], ask: Ask) -> int:
    """The one with the fewest tokens in flight; among equals a random one, so that gateways started together do not
    all send their first requests to the same backend."""
    return 0 if len(candidates) == 1 else lightest(candidates, range(len(candidates)), ask)


def lightest(candidates: Sequence[Candidate], among: Sequence[int], ask: Ask) -> int:
    """The same of the candidates at some indices: their order is that of `load`, in two passes without a call."""
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
    """Each in its turn."""
    return _or_next(candidates, ask.turn % len(candidates), ask)


def at_random(candidates: Sequence[Candidate], ask: Ask) -> int:
    """Any."""
    return _or_next(candidates, int(ask.random() * len(candidates)), ask)


def power_of_two(candidates: Sequence[Candidate], ask: Ask) -> int:
    """The less loaded of two random ones (Mitzenmacher 2001): nearly as even as least-loaded, without the herd when
    several gateways see the same stale loads."""
    count = len(candidates)
    if count == 1:
        return 0
    first = int(ask.random() * count)
    second = (first + 1 + int(ask.random() * (count - 1))) % count
    return first if load(candidates[first]) <= load(candidates[second]) else second


def _requests(candidates: Sequence[Candidate]) -> list[float]:
    return [(c.inflight_requests + c.elsewhere_requests) / c.factor for c in candidates]


def _bound(requests: Sequence[float]) -> float:
    """How many requests one of these may have once it is given another."""
    return max(_FEWEST, ceil(_BOUND * (sum(requests) + 1) / len(requests)))


@lru_cache(4096)
def _key(url: str) -> int:
    return int.from_bytes(blake2b(url.encode(), digest_size=8).digest(), "little")


def session(candidates: Sequence[Candidate], ask: Ask) -> int:
    """Always the same one for one session, as long as its load is bounded (Mirrokni, Thorup, Zadimoghaddam 2018).

    Each session has its own order of the candidates, by the hash of both (rendezvous hashing: Thaler, Ravishankar
    1998), so that one which comes or goes moves its own sessions only. The first in this order is taken whose requests
    in flight stay within 1.25 of the mean. Requests without a session go to the least loaded, and so do all while none
    is within the bound, as in a slow start of all, when loads are no whole numbers.
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
    """The one that is believed to have most of the prompt cached, of those whose requests in flight stay within 1.25 of
    the mean; among equals the least loaded, which is also the rule where nothing is cached."""
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
"""Those that are the same in every pool. `auto` is not: see `auto.py`."""
