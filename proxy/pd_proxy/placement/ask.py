"""What one request asks of placement."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet

import msgspec

NOTHING_CACHED: Mapping[str, int] = {}


class Ask(msgspec.Struct, gc=False):
    """One request as a decision sees it, with the time and the random numbers that the decision may use.

    Attributes:
        random: gives a number in [0, 1).
        turn: counts decisions, for round robin.
        now: seconds, on the clock of the candidates' speeds.
        prompt_tokens: its prompt.
        decode_tokens: its prompt and the output to come, as its lease on a decode backend counts them.
        cached: prompt tokens that engines are believed to have in their prefix caches, by URL; who is missing has none.
            Of engines of several data-parallel ranks by the ranks' names too (`ranks.py`).
        session: names the session that it belongs to, for the policy `session`; or empty.
        ttft, tpot: the targets of its client, in seconds; None where there is none.
        avoid: URLs of backends that failed it; chosen only where there is nobody else.
        prefer: URL of a prefill backend to take if it may be had: an earlier try has prefilled there.
        brief: any engine has its prompt computed in next to no time, so that only the load of each counts.
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
        """Tokens of its prompt that an engine is believed to have to compute: at least the last one."""
        return uncached(self.prompt_tokens, self.cached.get(url, 0))


def uncached(prompt: int, cached: int) -> int:
    """Tokens of a prompt that are left to compute: at least its last one, from which the answer's first is sampled."""
    if cached <= 0:
        return prompt
    return prompt - cached if cached < prompt else min(prompt, 1)
