"""Which of an engine's data-parallel ranks gets a request, where the gateway chooses it.

Ranks compute apart, and each has a prefix cache of its own. So a prompt goes to the rank that will have computed it
first: the one with the least to prefill, what the prompt itself would add there included. While no rank is free, that
counts for more, as in `auto.py`: to compute twice what is cached elsewhere delays everybody. On an engine that decodes
too, a rank's tokens in flight count for what they make the steps of the answer longer. Where all that is equal, as
where nothing is known, it is the rank with the fewest tokens in flight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from pd_proxy.placement.ask import Ask
from pd_proxy.placement.auto import DUPLICATE, Learnt, expected_output


class Ranked(Learnt, Protocol):
    """An engine of several ranks."""

    @property
    def role(self) -> str: ...

    @property
    def ranks(self) -> Sequence[int]:
        """Tokens in flight on each."""

    @property
    def rank_work(self) -> Sequence[int]:
        """Tokens that each has yet to prefill."""

    @property
    def rank_names(self) -> Sequence[str]:
        """What each is called in `Ask.cached`."""


def rank_for(engine: Ranked, ask: Ask) -> int:
    """The rank that a prompt goes to if this engine computes it. It has ranks."""
    prompt, get, speeds = ask.prompt_tokens, ask.cached.get, engine.speeds
    work, loads = engine.rank_work, engine.ranks
    count = len(loads)  # the engine is as fast as its ranks together, and its step has a rank's share of the tokens
    own = 1.0 + DUPLICATE * min(1.0, least * speeds.pace * count) if (least := min(work)) else 1.0
    costs = [
        given + own * (prompt - hit if (hit := get(name, 0)) < prompt else 1)
        for given, name in zip(work, engine.rank_names, strict=True)
    ]
    if engine.role != "prefill":
        weight = expected_output(ask) * speeds.step_token * count / speeds.pace
        costs = [cost + weight * load for cost, load in zip(costs, loads, strict=True)]
    cheapest = min(costs)
    if costs.count(cheapest) == 1:
        return costs.index(cheapest)
    return min((loads[rank], rank) for rank in range(count) if costs[rank] == cheapest)[1]


def by_engine(ask: Ask, engines: Mapping[str, Ranked]) -> Mapping[str, int]:
    """Tokens of a prompt that engines have, by URL and by ranks' names: an engine of several ranks has what that rank
    has which would get the prompt.

    Arguments:
        ask: `cached` is of ranks, by their names.
        engines: those of several ranks, by their ranks' names and by URL.
    """
    cached = ask.cached
    found = dict(cached)
    for engine in set(map(engines.get, cached)):
        if engine is not None and engine.ranks:
            found[engine.url] = cached.get(engine.rank_names[rank_for(engine, ask)], 0)
    return found
