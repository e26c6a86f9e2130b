"""Chooses one of an engine's data-parallel ranks for a request, where the gateway may choose it.

Ranks compute separately, and each has a prefix cache of its own. So a prompt goes to the rank that is expected to have
computed it first: the one with the least to prefill, including what the prompt would add there. While no rank is free,
the prompt's own work has a greater weight, as in `auto.py`, since computing again what is cached elsewhere delays later
requests. On an engine that also decodes, a rank's tokens in flight are added as the time by which they lengthen the
answer's steps. Ties go to the rank with the fewest tokens in flight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from pd_proxy.placement.ask import Ask
from pd_proxy.placement.auto import DUPLICATE, Learnt, expected_output


class Ranked(Learnt, Protocol):
    """An engine with several data-parallel ranks."""

    @property
    def role(self) -> str: ...

    @property
    def ranks(self) -> Sequence[int]:
        """The tokens in flight on each rank."""

    @property
    def rank_work(self) -> Sequence[int]:
        """The tokens that each rank has still to prefill."""

    @property
    def rank_names(self) -> Sequence[str]:
        """The name of each rank in `Ask.cached`."""


def rank_for(engine: Ranked, ask: Ask) -> int:
    """The rank that a prompt goes to if this engine computes it. The engine must have ranks."""
    prompt, get, speeds = ask.prompt_tokens, ask.cached.get, engine.speeds
    work, loads = engine.rank_work, engine.ranks
    count = len(loads)  # an engine's pace is that of all ranks together; its step depends on one rank's tokens
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
    """The tokens of a prompt that engines have cached, by URL and by ranks' names. For an engine with several ranks it
    is the value of the rank that would get the prompt.

    Arguments:
        ask: its `cached` is by ranks' names for such engines.
        engines: the engines with several ranks, by their ranks' names and by URL.
    """
    cached = ask.cached
    found = dict(cached)
    for engine in set(map(engines.get, cached)):
        if engine is not None and engine.ranks:
            found[engine.url] = cached.get(engine.rank_names[rank_for(engine, ask)], 0)
    return found
