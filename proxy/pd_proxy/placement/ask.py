"""The request as placement sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet

import msgspec

NOTHING_CACHED: Mapping[str, int] = {}


class Ask(msgspec.Struct, gc=False):
    """One request as a decision sees it, with the time and the random numbers that the decision may use.

    Attributes:
        random: returns a number in [0, 1).
        turn: the number of decisions so far, for round robin.
        now: the time in seconds, on the clock of the candidates' speeds.
        prompt_tokens: the tokens of its prompt.
        decode_tokens: the tokens of its prompt and of the expected output, as its lease on a decode backend counts
            them.
        cached: the prompt tokens that each engine is believed to have in its prefix cache, by URL; 0 where absent. For
            engines with several data-parallel ranks also by the ranks' names (`ranks.py`).
        session: the name of its session, for the policy `session`; or empty.
        ttft, tpot: the targets of its client, in seconds; None where there is none.
        avoid: the URLs of backends that failed this request. They are chosen only where there are no others.
        prefer: the URL of the prefill backend where an earlier try has prefilled; it is taken where it is eligible.
        brief: the prompt is so short that its prefill time does not matter, and only the load of each engine counts.
    """

    random: Callable[[], float]
    turn: int = 0
    now: float = 0.0
    prompt_tokens: int = 0
    decode_tokens: int = 0
    cached: Mapping[str, int] = NOTHING_CACHED
    session: bytes = b""
    ttft: float | None = None
    tpot: float | None = None
    avoid: AbstractSet[str] = frozenset()
    prefer: str = ""
    brief: bool = False

    def uncached(self, url: str) -> int:
        """The tokens of its prompt that an engine is expected to compute: at least the last one."""
        return uncached(self.prompt_tokens, self.cached.get(url, 0))


def uncached(prompt: int, cached: int) -> int:
    """The tokens of a prompt that are not cached: at least its last one, from which the first output token is
    sampled."""
    if cached <= 0:
        return prompt
    return prompt - cached if cached < prompt else min(prompt, 1)
