"""Decides when one engine serves a whole request although a pair could: local prefill.

A decode engine that prefills delays all of its streams. Without the following conditions, local prefill loses more than
it gains.

- A decode engine prefills a prompt itself when at most 2,048 tokens of it are not cached there, the engine has **time
  to spare**, and the first token is expected **earlier by a margin**. The margin is 0.25 of the client's target for the
  first token, since the prompt will then be missing in the prefill engines' caches; and 0.1 where nothing of the prompt
  is cached anywhere. Up to 256 uncached tokens need no margin, since they fit into one step.
- A burst **spills**: when prefill is so full that the request would miss its target, a decode engine takes up to 8,192
  uncached tokens if it meets the target.
- An engine has time to spare where the gap between tokens stays below 0.9 of the client's target; in a spill, below the
  target. The gap is the expected step with this request, or the recently observed gap where that is longer and no
  prefill has caused it. Added is the prefill time of the last seconds and of all prompts that are still to be
  prefilled, this one included, divided by 160 tokens of the engine's streams. The mean gap of a stream is what counts,
  so it may stop for half a second once, but not ten times.
- A mixed engine takes the request by the same rules without the bound on tokens, since prefill is its work too. It also
  takes it when no decode engine meets the target for the gap and the mixed engine does.
- **Without targets** it is not known which delays are acceptable, so the rule is conservative: the targets are 2 s for
  the first token and 2.5 times the idle engine's step for the gap, and the margin is 0.25 for every prompt. So a decode
  engine prefills only once prefill has a queue of half a second.

Until the pace of prefill has been learnt, prefill stays remote.
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
"""The most uncached tokens that a decode engine may prefill."""
MOST_SPILT = 8192
"""The same where the request would otherwise miss its target for the first token."""
AT_ONCE = 0.05
"""Seconds; where the pair is expected to have the first token by then, no other backend is considered."""
SHORT = 256
"""The most uncached tokens for which a local prefill needs no margin."""
SPARE = 0.9
"""The part of the target for the gap between tokens up to which an engine has time to spare."""
MARGIN = 0.25
"""The part of the target for the first token by which a local prefill has to be earlier."""
MARGIN_NEW = 0.1
"""The same where nothing of the prompt is cached anywhere, and the client has targets."""
HORIZON = 160
"""The tokens of an engine's streams over which the time of its prefill work is averaged."""
_IDLE = 2.5  # times the idle engine's step
_CALM = 0.1  # seconds of recent prefill up to which it has not made the observed gap longer
_RECENT = 30.0  # seconds for which an observed gap is used
_LOOKED_AT = 4  # engines that are compared: those with the earliest first token


class Instead(msgspec.Struct, Generic[L], frozen=True):
    """A backend that serves a whole request instead of a pair.

    Attributes:
        backend: the backend.
        pool: its pool, `decode` or `mixed`.
        reason: one of `REASONS` in `decide.py`.
    """

    backend: L
    pool: str
    reason: str


def instead(prefill: L, decode: L, decodes: Sequence[L], mixed: Sequence[L], ask: Ask) -> Instead[L] | None:
    """The backend that serves the whole request better than a pair does; None where the pair is better.

    Arguments:
        prefill, decode: the pair.
        decodes: the decode backends that may prefill.
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
    """The most uncached tokens that a decode engine may prefill for this request; 0 where it may not prefill."""
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
    """The `_LOOKED_AT` candidates with the earliest expected first token."""
    if len(candidates) <= _LOOKED_AT:
        return candidates
    costs = waits_and_work(candidates, ask)
    return [candidates[n] for n in nsmallest(_LOOKED_AT, range(len(costs)), key=costs.__getitem__)]


def _own(candidate: Learnt, prefill: Learnt, uncached: int, ask: Ask) -> float:
    """The seconds that the prompt takes on an engine that prefills locally. Where no engine of its pool has ever
    prefilled, the speed of the prefill engine is assumed."""
    speeds = candidate.speeds if candidate.speeds.pool.prefills else prefill.speeds
    return speeds.seconds(uncached, ask.prompt_tokens)


def _reason(uncached: int, ask: Ask) -> str:
    if uncached > SHORT:
        return "local_spill"
    return "local_cached" if ask.prompt_tokens > uncached else "local_short"


def _gains(local: float, remote: float, ask: Ask, uncached: int) -> bool:
    """Whether a local prefill is expected to be earlier by the required margin."""
    if uncached <= SHORT and _targeted(ask):
        return local < remote
    ttft = _ttft(ask)
    return local + _margin(ask) * ttft <= remote or (remote > ttft >= local)


def _margin(ask: Ask) -> float:
    """The part of the target for the first token by which a local prefill has to be earlier."""
    return MARGIN if ask.cached or not _targeted(ask) else MARGIN_NEW


def has_time_to_spare(candidate: Learnt, ask: Ask, seconds: float = 0.0, *, late: bool = False) -> bool:
    """Whether an engine's streams stay within their target while it prefills.

    Arguments:
        seconds: the time of the request's own prefill.
        late: whether the request would otherwise miss its target.
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
