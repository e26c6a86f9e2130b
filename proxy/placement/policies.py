"""How one backend is chosen among those of a pool. Each policy is one pure function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol


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


Choice = Callable[[Sequence[Candidate], Callable[[], float], int], int]
"""(candidates, random in [0, 1), turn) -> index of the chosen one. Candidates are never empty."""


def load(candidate: Candidate) -> tuple[float, float]:
    """What least-loaded compares: tokens in flight, then requests, those of this gateway's other workers included; both
    over the candidate's factor. One request is added, so that of idle candidates those in their slow start come last.
    """
    factor = candidate.factor
    tokens = candidate.inflight_tokens + candidate.elsewhere_tokens
    requests = candidate.inflight_requests + candidate.elsewhere_requests + 1
    return (tokens, requests) if factor == 1.0 else (tokens / factor, requests / factor)


def _or_next(candidates: Sequence[Candidate], index: int, random: Callable[[], float]) -> int:
    """The one at `index`; as often as its slow start has it, the next one in its stead."""
    factor = candidates[index].factor
    return index if factor == 1.0 or random() < factor else (index + 1) % len(candidates)


def least_loaded(candidates: Sequence[Candidate], random: Callable[[], float], turn: int) -> int:
    """The one with the fewest tokens in flight; among equals a random one, so that gateways started together do not
    all send their first requests to the same backend."""
    if len(candidates) == 1:
        return 0
    loads = [load(candidate) for candidate in candidates]
    least = min(loads)
    equal = [index for index, value in enumerate(loads) if value == least]
    return equal[int(random() * len(equal))]


def round_robin(candidates: Sequence[Candidate], random: Callable[[], float], turn: int) -> int:
    """Each in its turn."""
    return _or_next(candidates, turn % len(candidates), random)


def at_random(candidates: Sequence[Candidate], random: Callable[[], float], turn: int) -> int:
    """Any."""
    return _or_next(candidates, int(random() * len(candidates)), random)


def power_of_two(candidates: Sequence[Candidate], random: Callable[[], float], turn: int) -> int:
    """The less loaded of two random ones (Mitzenmacher 2001): nearly as even as least-loaded, without the herd when
    several gateways see the same stale loads."""
    count = len(candidates)
    if count == 1:
        return 0
    first = int(random() * count)
    second = (first + 1 + int(random() * (count - 1))) % count
    return first if load(candidates[first]) <= load(candidates[second]) else second


POLICIES: dict[str, Choice] = {
    "least_loaded": least_loaded,
    "round_robin": round_robin,
    "random": at_random,
    "power_of_two": power_of_two,
}
