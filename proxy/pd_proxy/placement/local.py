"""Whether a remote prefill is worth it: when one engine answers a request whole though there is a pair for it.

A decode engine that prefills delays every stream it has, so this is guarded; unguarded it loses more than it gains.

- A decode engine prefills for itself when at most 2,048 tokens are not cached there, it has **time to spare**, and the
  first token is expected **sooner by a margin**: 0.25 of the client's target for it, since a prompt that goes elsewhere
  is missing in prefill's caches; 0.1 where nothing of it is cached anywhere. Up to 256 uncached tokens need no margin:
  they fit into a step.
- When prefill is so full that the request would miss its target, decode takes up to 8,192 uncached tokens if it meets
  the target: a burst **spills**.
- Time to spare means that the gap between tokens stays below 0.9 of the client's target (in a spill below the target).
  That is the step to be expected with this request; the gap observed of late, where that is longer and no prefill has
  made it so; and the prefill that the engine has done in the last seconds or has yet to do, this request's included,
  spread over 160 tokens of its streams. What counts for a stream is its mean, so a stop of half a second may be borne
  once and not ten times.
- A mixed engine takes the request by the same rules without the bound on tokens, since to prefill is its work. It also
  takes it when no decode engine meets the target for the gap and the mixed one does.
- **Without targets** nobody has said what the streams may suffer. Then the rule is conservative: the same with 2 s for
  the first token and 2.5 times the step of the idle engine for the gap, and with the margin of a quarter for every
  prompt.
  So prefill has a queue of half a second before decode prefills anything.

While nothing was learnt of prefill's pace, prefill stays remote.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import nsmallest
from typing import Generic, TypeVar

import msgspec

from pd_proxy.placement.ask import Ask
from pd_proxy.placement.auto import SOON, Learnt, expected_step, time_to_first_token, waits_and_work

L = TypeVar("L", bound=Learnt)

MOST = 2048
"""Uncached tokens that a decode engine may prefill for itself."""
MOST_SPILT = 8192
"""Those that it may where the request would miss its target for the first token otherwise."""
AT_ONCE = 0.05
"""Seconds: a first token by then is soon enough, whoever else could give it."""
SHORT = 256
"""Uncached tokens for which it need only be sooner."""
SPARE = 0.9
"""Of the target for the gap between tokens, up to which an engine has time to spare."""
MARGIN = 0.25
"""Of the target for the first token, by which a local prefill is to be sooner."""
MARGIN_NEW = 0.1
"""The same where nothing of the prompt is cached anywhere, and the client has targets."""
HORIZON = 160
"""Tokens of its streams over which an engine's prefill work is spread."""
_IDLE = 2.5  # times the idle engine's step
_CALM = 0.1  # seconds of prefill: what is less has not made a gap long
_RECENT = 30.0  # seconds for which an observed gap says how an engine is now
_LOOKED_AT = 4  # engines that could have the first token soonest


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
    avoid = ask.avoid
    if avoid:
        decodes = [candidate for candidate in decodes if candidate.url not in avoid]
        mixed = [candidate for candidate in mixed if candidate.url not in avoid]
    if not decodes and not mixed:
        return None
    remote = time_to_first_token(prefill, ask) + decode.speeds.handoff(ask.prompt_tokens)
    if remote < AT_ONCE:
        return None
    soonest, best = remote, None
    late = remote > _ttft(ask)
    if mixed:
        for candidate in _soonest(mixed, ask):
            seconds = _own(candidate, prefill, ask.uncached(candidate.url), ask)
            local = candidate.speeds.ahead(ask.now) / candidate.factor + seconds
            if (
                local < soonest
                and _gains(local, remote, ask, ask.prompt_tokens)
                and has_time_to_spare(candidate, ask, seconds, late=late)
            ):
                soonest, best = local, Instead(candidate, "mixed", "mixed_sooner")
    if decodes and (most := _most(remote, ask)):
        for candidate in _soonest(decodes, ask):
            uncached = ask.uncached(candidate.url)
            if uncached > most:
                continue
            seconds = _own(candidate, prefill, uncached, ask)
            local = candidate.speeds.ahead(ask.now) / candidate.factor + seconds
            if (
                local < soonest
                and _gains(local, remote, ask, uncached)
                and has_time_to_spare(candidate, ask, seconds, late=late)
            ):
                soonest, best = local, Instead(candidate, "decode", _reason(uncached, ask))
    if best is None and mixed and ask.tpot is not None and expected_step(decode, ask) > ask.tpot:
        steps = [expected_step(candidate, ask) for candidate in mixed]
        lightest = mixed[steps.index(min(steps))]
        if has_time_to_spare(lightest, ask, _own(lightest, prefill, ask.uncached(lightest.url), ask)):
            return Instead(lightest, "mixed", "mixed_spill")
    return best


def _most(remote: float, ask: Ask) -> int:
    """Uncached tokens that a decode engine may prefill; 0 where none could be sooner by enough."""
    ttft = _ttft(ask)
    if remote > ttft:
        most = MOST_SPILT
    elif remote > _margin(ask) * ttft:
        most = MOST
    else:
        most = SHORT if _targeted(ask) else 0
    return most if ask.prompt_tokens <= most or ask.cached else 0


def _targeted(ask: Ask) -> bool:
    return ask.ttft is not None and ask.tpot is not None


def _ttft(ask: Ask) -> float:
    return SOON if ask.ttft is None else ask.ttft


def _soonest(candidates: Sequence[L], ask: Ask) -> Sequence[L]:
    """Those that could have the first token soonest; all of a few."""
    if len(candidates) <= _LOOKED_AT:
        return candidates
    costs = waits_and_work(candidates, ask)
    return [candidates[n] for n in nsmallest(_LOOKED_AT, range(len(costs)), key=costs.__getitem__)]


def _own(candidate: Learnt, prefill: Learnt, uncached: int, ask: Ask) -> float:
    """Seconds that the prompt takes on an engine that prefills for itself. Where none of its pool ever did, it is taken
    to be as fast as the prefill engine."""
    speeds = candidate.speeds if candidate.speeds.pool.prefills else prefill.speeds
    return speeds.seconds(uncached, ask.prompt_tokens)


def _reason(uncached: int, ask: Ask) -> str:
    if uncached > SHORT:
        return "local_spill"
    return "local_cached" if ask.prompt_tokens > uncached else "local_short"


def _gains(local: float, remote: float, ask: Ask, uncached: int) -> bool:
    """Whether a local prefill is sooner by so much that it is worth it."""
    if uncached <= SHORT and _targeted(ask):
        return local < remote
    ttft = _ttft(ask)
    return local + _margin(ask) * ttft <= remote or (remote > ttft >= local)


def _margin(ask: Ask) -> float:
    """Of the target for the first token, by which a local prefill is to be sooner."""
    return MARGIN if ask.cached or not _targeted(ask) else MARGIN_NEW


def has_time_to_spare(candidate: Learnt, ask: Ask, seconds: float = 0.0, *, late: bool = False) -> bool:
    """Whether an engine's streams stay within their target while it prefills.

    Arguments:
        seconds: of the request's own prefill.
        late: it would miss its target otherwise.
    """
    requests = candidate.inflight_requests + candidate.elsewhere_requests
    if not requests:
        return True
    speeds = candidate.speeds
    if not speeds.pool.steps:
        return False
    gap, disturbed, tpot = expected_step(candidate, ask), speeds.disturbed(ask.now), ask.tpot
    if tpot is None:
        tpot = _IDLE * (speeds.step_base + speeds.step_token * ask.decode_tokens)
    if speeds.gap > gap and disturbed < _CALM and ask.now - speeds.gap_at <= _RECENT:
        gap = speeds.gap
    return gap + (disturbed + seconds) / HORIZON < (tpot if late else SPARE * tpot)
