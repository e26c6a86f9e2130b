"""What a decision compared, spelt out for people: computed only when somebody asks.

It reads the same candidates and the same request as the decision, so it must be called before the decision has changed
them: before the request takes its leases.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from pd_proxy.placement.ask import Ask
from pd_proxy.placement.auto import Learnt, expected_step, time_to_first_token


class Cost(msgspec.Struct, frozen=True):
    """What is expected of one candidate. Times are seconds.

    Attributes:
        cached: tokens of the prompt that are believed to be in its prefix cache.
        uncached: those that it would compute.
        wait: prefill work before the request.
        own: the request's own prefill.
        first_token: until its prefill is done; more than both where the candidate is in its slow start.
        rate: uncached tokens that it prefills in a second.
        step: of its decode, with the request.
        slowness: of its steps, over the median of its pool.
        factor: the share of its usual load that it may be given.
        tokens, requests: that it has in flight, other workers' included.
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
    """What is expected of one candidate."""
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
    """What is expected of each of some candidates, in their order."""
    return [cost(candidate, ask) for candidate in candidates]
