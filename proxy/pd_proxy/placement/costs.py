"""The costs that a decision compares, in readable form. Computed only on demand (`/admin/decisions`, `/admin/explain`).

They are computed from the same candidates and the same request as the decision, so this must be called before the
request takes its leases, which change the candidates.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from pd_proxy.placement.ask import Ask
from pd_proxy.placement.auto import Learnt, expected_step, time_to_first_token


class Cost(msgspec.Struct, frozen=True):
    """The expected cost of a request on one candidate. Times are in seconds.

    Attributes:
        cached: the prompt tokens that are believed to be in its prefix cache.
        uncached: the prompt tokens that it would compute.
        wait: the time of the prefill work before the request.
        own: the time of the request's own prefill.
        first_token: the time until its prefill is done; more than `wait` plus `own` where the candidate is in slow
            start.
        rate: the uncached tokens that it prefills per second.
        step: the time of its decode step, with the request.
        slowness: the time of its steps over the median of its pool.
        factor: the share of its usual load that it may be given.
        tokens, requests: what it has in flight, other workers' included.
    """

    url: str
    cached: int
    uncached: int
    wait: float
    own: float
    first_token: float
    rate: float
    step: float
    slowness: float
    factor: float
    tokens: int
    requests: int


def cost(candidate: Learnt, ask: Ask) -> Cost:
    """The expected cost on one candidate."""
    speeds, uncached = candidate.speeds, ask.uncached(candidate.url)
    return Cost(
        candidate.url,
        cached=ask.prompt_tokens - uncached,
        uncached=uncached,
        wait=speeds.ahead(ask.now),
        own=speeds.seconds(uncached, ask.prompt_tokens),
        first_token=time_to_first_token(candidate, ask),
        rate=speeds.rate,
        step=expected_step(candidate, ask),
        slowness=speeds.slowness,
        factor=candidate.factor,
        tokens=candidate.inflight_tokens + candidate.elsewhere_tokens,
        requests=candidate.inflight_requests + candidate.elsewhere_requests,
    )


def costs(candidates: Sequence[Learnt], ask: Ask) -> list[Cost]:
    """The expected cost on each of the candidates, in their order."""
    return [cost(candidate, ask) for candidate in candidates]
