"""Whether a remote prefill is worth it: when one engine answers a request whole though there is a pair for it.

A decode engine that prefills delays every stream it has, so this is guarded; unguarded it loses more than it gains.

- A decode engine prefills for itself when at most 2,048 tokens are not cached there, it has **time to spare** (the gap
  between its tokens, observed and as expected with this request, is below 0.8 of the client's target for it), and the
  first token is expected **sooner by a margin**, 0.25 of the target for it. Up to 256 uncached tokens need no margin:
  they fit into a step. That covers bursts, in which prefill is full and decode is not.
- A mixed engine takes the request by the same rule without the bound on tokens, since to prefill is its work; and it
  also takes it when no decode engine meets the target for the gap and the mixed one does.
- **Without targets** nobody has said what the streams may suffer. Then the rule is conservative: at most 512 uncached
  tokens (a mixed engine: any), on an engine whose step stays within 1.5 of what it takes when the engine is idle, and
  the first token in at most half of the time of a remote prefill, and by 0.25 s sooner.

While nothing was learnt of prefill's pace, prefill stays remote.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

import msgspec

from proxy.placement.ask import Ask
from proxy.placement.auto import Learnt, expected_step, time_to_first_token

L = TypeVar("L", bound=Learnt)

MOST = 2048
"""Uncached tokens that a decode engine may prefill for itself."""
SHORT = 256
"""Uncached tokens for which it need only be sooner."""
MOST_UNTARGETED = 512
"""Uncached tokens that it may prefill where the client has no targets."""
SPARE = 0.8
"""Of the target for the gap between tokens, up to which an engine has time to spare."""
MARGIN = 0.25
"""Of the target for the first token, by which a local prefill is to be sooner."""
_IDLE = 1.5  # times the idle engine's step
_LEAST_GAIN = 0.25  # seconds
_RECENT = 30.0  # seconds for which an observed gap says how an engine is now
_MOST_LOOKED_AT = 4  # engines that have something cached


class Instead(msgspec.Struct, Generic[L], frozen=True):
    """A backend that takes a request whole.

    Attributes:
        pool: its pool, `decode` or `mixed`.
        reason: why, in a word.
    """

    backend: L
    pool: str
    reason: str


def instead(prefill: L, decode: L, decodes: Sequence[L], mixed: Sequence[L], ask: Ask) -> Instead[L] | None:
    """Who serves a request better alone than a pair does; None where the pair is to.

    Arguments:
        prefill, decode: the pair.
        decodes: the decode backends that may prefill for themselves.
        mixed: the mixed backends.
    """
    if not prefill.speeds.pool.prefills:
        return None
    if ask.avoid:
        mixed = [candidate for candidate in mixed if candidate.url not in ask.avoid]
    best: Instead[L] | None = None
    remote = soonest = 0.0
    untargeted = ask.tpot is None or ask.ttft is None
    most = MOST_UNTARGETED if untargeted else MOST
    for index in _worth_a_look(decode, decodes, ask, most) if decodes else ():
        if not remote:
            remote = soonest = time_to_first_token(prefill, ask) + decode.speeds.handoff(ask.prompt_tokens)
        candidate = decodes[index]
        uncached = ask.uncached(candidate.url)
        local = _first_token(candidate, prefill, ask)
        if local < soonest and _gains(local, remote, ask, uncached) and has_time_to_spare(candidate, ask):
            soonest = local
            short = uncached <= SHORT
            cached = ask.prompt_tokens > uncached
            best = Instead(
                candidate, "decode", ("local_cached" if cached else "local_short") if short else "local_spill"
            )
    if mixed:
        remote = remote or time_to_first_token(prefill, ask) + decode.speeds.handoff(ask.prompt_tokens)
        times = [_first_token(candidate, prefill, ask) for candidate in mixed]
        index = min(range(len(mixed)), key=times.__getitem__)
        sooner = times[index] < (soonest or remote) and _gains(times[index], remote, ask, ask.prompt_tokens)
        if sooner and has_time_to_spare(mixed[index], ask):
            return Instead(mixed[index], "mixed", "mixed_sooner")
        if best is None and ask.tpot is not None and expected_step(decode, ask) > ask.tpot:
            steps = [expected_step(candidate, ask) for candidate in mixed]
            index = min(range(len(mixed)), key=steps.__getitem__)
            if has_time_to_spare(mixed[index], ask):
                return Instead(mixed[index], "mixed", "mixed_spill")
    return best


def _worth_a_look(decode: Learnt, decodes: Sequence[Learnt], ask: Ask, most: int) -> list[int]:
    """Those that could prefill the request: the one with the shortest step, and those with most of it cached."""
    prompt, cached, avoid = ask.prompt_tokens, ask.cached, ask.avoid
    found: list[int] = []
    if cached:
        get, least = cached.get, max(1, prompt - most)
        found = [n for n, c in enumerate(decodes) if get(c.url, 0) >= least]
        if avoid:
            found = [n for n in found if decodes[n].url not in avoid]
        if len(found) > _MOST_LOOKED_AT:
            found = sorted(found, key=lambda n: -cached[decodes[n].url])[:_MOST_LOOKED_AT]
    if prompt <= most:
        for n, candidate in enumerate(decodes):
            if candidate is decode:
                if n not in found:
                    found.append(n)
                break
    return found


def _first_token(candidate: Learnt, prefill: Learnt, ask: Ask) -> float:
    """Seconds until an engine is expected to have prefilled for itself. Where none of its pool ever did, it is taken to
    be as fast as the prefill engine."""
    speeds = candidate.speeds
    if speeds.pool.prefills:
        return time_to_first_token(candidate, ask)
    return speeds.ahead(ask.now) / candidate.factor + prefill.speeds.seconds(
        ask.uncached(candidate.url), ask.prompt_tokens
    )


def _gains(local: float, remote: float, ask: Ask, uncached: int) -> bool:
    """Whether a local prefill is sooner by so much that it is worth it."""
    if ask.ttft is None or ask.tpot is None:
        return local + max(_LEAST_GAIN, 0.5 * remote) <= remote
    return local < remote if uncached <= SHORT else local + MARGIN * ask.ttft <= remote


def has_time_to_spare(candidate: Learnt, ask: Ask) -> bool:
    """Whether an engine's streams stay within their target, or without one near their best, while it prefills."""
    requests = candidate.inflight_requests + candidate.elsewhere_requests
    if not requests:
        return True
    speeds = candidate.speeds
    step = expected_step(candidate, ask) if speeds.pool.steps else None
    if ask.tpot is None:
        return step is not None and step <= _IDLE * (speeds.step_base + speeds.step_token * ask.decode_tokens)
    most = SPARE * ask.tpot
    if speeds.gap and ask.now - speeds.gap_at <= _RECENT:
        return speeds.gap < most and (step is None or step < most)
    return step is not None and step < most
