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

from proxy.placement.ask import Ask, uncached
from proxy.placement.auto import DUPLICATE, Learnt, expected_output


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
    prompt, get, tokens, given, speeds = (
        ask.prompt_tokens,
        ask.cached.get,
        engine.ranks,
        engine.rank_work,
        engine.speeds,
    )
    count = len(tokens)  # the engine is as fast as its ranks together, and its step has a rank's share of the tokens
    own = 1.0 + DUPLICATE * min(1.0, min(given) * speeds.pace * count)
    weight = 0.0 if engine.role == "prefill" else expected_output(ask) * speeds.step_token * count / speeds.pace
    costs = [
        (work + own * uncached(prompt, get(name, 0)) + weight * load, load)
        for work, name, load in zip(given, engine.rank_names, tokens, strict=True)
    ]
    return costs.index(min(costs))


def by_engine(ask: Ask, engines: Mapping[str, Ranked]) -> Mapping[str, int]:
    """Tokens of a prompt that engines have, by URL and by ranks' names: an engine of several ranks has what that rank
    has which would get the prompt.

    Arguments:
        ask: `cached` is of ranks, by their names.
        engines: those of several ranks, by their ranks' names and by URL.
    """
    found: dict[str, int] = {}
    for name, tokens in ask.cached.items():
        engine = engines.get(name)
        if engine is None or not engine.ranks:
            found[name] = tokens
            continue
        if name != engine.url:
            found[name] = tokens
        if engine.url not in found:
            found[engine.url] = ask.cached.get(engine.rank_names[rank_for(engine, ask)], 0)
    return found
