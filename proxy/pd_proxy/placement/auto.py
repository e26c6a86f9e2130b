"""The policy `auto`: chooses the backend that is expected to serve the request soonest, by its learnt speeds.

- **Prefill** (`first_token`): the earliest expected first token. The expected time is that of the work before the
  request plus that of the request's own work, which is its tokens that are not cached there, both at the engine's pace.
  While no engine is free, the request's own work has a greater weight, since computing again what is cached elsewhere
  delays all later requests. There are two exceptions:

  - A **long** prompt, whose own work takes longer than the target for the first token, is late on every engine. It goes
    behind other work as long as that does not double its time. So long prompts queue behind each other, and leave other
    engines to the short ones.
  - A prefix in great demand **spreads**: where the engine that has it has a queue (of half the target) and another
    engine has none, the prompt goes to the other one if it is not much later there. With the earliest first token as
    the only rule, that queue would always stay just short enough to keep the prompt there.
- **Decode** (`next_token`): the shortest expected step, by tokens in flight, of the engines whose KV cache has room.
- **Whole requests** (`whole_answer`): the earliest expected end, with prefill and decode on one engine.

Where nothing is cached, all engines have the same speeds, and the prompt is not long, each rule chooses exactly as
`least_loaded` does, with the same ties and the same random number.

A candidate costs some 70 ns. So the first pass leaves out what can only make a candidate more expensive: slow start, a
stuck leg, a full KV cache. Where none of these applies to the cheapest candidate, it is also the cheapest with them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from pd_proxy.placement.ask import Ask, uncached
from pd_proxy.placement.policies import POLICIES, Candidate, Choice, lightest

LONG = 4.0
"""Seconds of own work from which a prompt is long, where its client has no target for the first token."""
SOON = 2.0
"""The target for the first token, in seconds, that is assumed for clients without one."""
DUPLICATE = 2.0  # the request's own work is added so many times more where every engine has a second or more to do
_QUEUE = 0.5  # part of the target for the first token; an engine with more work than that has a queue
_IDLE = 0.2  # part of that queue's work; an engine with less has no queue
_LATER = 1.5  # times the earliest first token; the bound for a prompt that is spread
_MAX_OUTPUT = 1024  # tokens; with a greater bound of its client an answer is mostly shorter than that bound


class Pool(Protocol):
    """The speeds that the engines of a pool share: `fleet/pool_speeds.py`."""

    @property
    def prefills(self) -> bool: ...

    @property
    def steps(self) -> bool: ...

    def work(self, uncached: int, prompt: int) -> int: ...


class Speeds(Protocol):
    """The learnt speeds of one engine: `fleet/speeds.py`."""

    @property
    def pool(self) -> Pool: ...

    @property
    def pace(self) -> float: ...

    @property
    def rate(self) -> float: ...

    @property
    def slowness(self) -> float: ...

    @property
    def free_at(self) -> float: ...

    @property
    def rest(self) -> float: ...

    @property
    def late_at(self) -> float: ...

    @property
    def step_base(self) -> float: ...

    @property
    def step_token(self) -> float: ...

    @property
    def capacity(self) -> float: ...

    @property
    def gap(self) -> float: ...

    @property
    def gap_at(self) -> float: ...

    def ahead(self, now: float) -> float: ...

    def disturbed(self, now: float) -> float: ...

    def seconds(self, uncached: int, prompt: int) -> float: ...

    def step(self, sequences: int, kv_tokens: int) -> float: ...

    def handoff(self, tokens: int) -> float: ...


class Learnt(Candidate, Protocol):
    """A candidate with learnt speeds."""

    @property
    def speeds(self) -> Speeds: ...


def first_token(candidates: Sequence[Learnt], ask: Ask) -> int:
    """The candidate with the earliest expected first token, with the exceptions above.

    For very short prompts (`Ask.brief`) the work before the request is taken from the leases, since tracking such
    prompts one by one would cost more than it improves.
    """
    if len(candidates) == 1:
        return 0
    if ask.brief:
        mine = ask.prompt_tokens
        costs = [((c.inflight_tokens + c.elsewhere_tokens) / c.factor + mine) * c.speeds.pace for c in candidates]
        return _least(candidates, costs, ask)
    costs = waits_and_work(candidates, ask)
    index = _least(candidates, costs, ask)
    chosen = candidates[index]
    speeds = chosen.speeds
    if ask.cached and speeds.free_at > ask.now:
        index = _avoid_duplicate_work(candidates, costs, index, ask)
        chosen = candidates[index]
        speeds = chosen.speeds
    if chosen.factor != 1.0 or ask.now > speeds.late_at:
        costs = [time_to_first_token(candidate, ask) for candidate in candidates]
        index = _least(candidates, costs, ask)
        chosen = candidates[index]
        speeds = chosen.speeds
    prompt, target = ask.prompt_tokens, LONG if ask.ttft is None else ask.ttft
    if speeds.pace * prompt > 0.1 * target:  # the quadratic part of attention makes no short prompt ten times slower
        own = speeds.seconds(ask.uncached(chosen.url), prompt)
        if own > target:
            return _place_long(candidates, index, own, ask)
    queue = _QUEUE * (SOON if ask.ttft is None else ask.ttft)
    if ask.cached and speeds.free_at - ask.now > queue and ask.cached.get(chosen.url, 0) > 0:
        return _spread(candidates, index, ask)
    return index


def _avoid_duplicate_work(candidates: Sequence[Learnt], costs: Sequence[float], index: int, ask: Ask) -> int:
    """Choose for a prompt of which a part is cached somewhere, while no engine is free.

    Work that another engine has cached delays all later requests. So the longer the shortest queue is, the greater is
    the weight of the request's own work.

    Arguments:
        costs: the result of `waits_and_work`.
        index: the index of the least cost.
    """
    now = ask.now
    waits = [left if (left := (s := c.speeds).free_at - now) > s.rest else s.rest for c in candidates]
    weight = DUPLICATE * min(1.0, min(waits))
    if weight <= 0.0:
        return index
    return _least(candidates, [cost + weight * (cost - wait) for cost, wait in zip(costs, waits, strict=True)], ask)


def why_first(prefill: Learnt, ask: Ask) -> str:
    """Why `first_token` has chosen this candidate: one of `REASONS` in `decide.py`."""
    target, url, speeds = LONG if ask.ttft is None else ask.ttft, prefill.url, prefill.speeds
    if speeds.pace * ask.prompt_tokens > 0.1 * target and speeds.seconds(ask.uncached(url), ask.prompt_tokens) > target:
        return "long"
    return "cached" if ask.cached and ask.cached.get(url) else "earliest"


def waits_and_work(candidates: Sequence[Learnt], ask: Ask) -> list[float]:
    """The expected time to the first token of each candidate, without regard to slow start and stuck legs."""
    now, prompt, cached = ask.now, ask.prompt_tokens, ask.cached
    work = candidates[0].speeds.pool.work
    whole = work(prompt, prompt)
    if not cached:
        return [
            (left if (left := (s := c.speeds).free_at - now) > s.rest else s.rest) + s.pace * whole for c in candidates
        ]
    own = {hit: work(uncached(prompt, hit), prompt) for hit in set(cached.values())}  # many engines have the same part
    own[0] = whole
    get = cached.get
    return [
        (left if (left := (s := c.speeds).free_at - now) > s.rest else s.rest) + s.pace * own[get(c.url, 0)]
        for c in candidates
    ]


def time_to_first_token(candidate: Learnt, ask: Ask) -> float:
    """Seconds until a candidate is expected to have prefilled the prompt. In its slow start the work before the request
    has a greater weight."""
    speeds = candidate.speeds
    return speeds.ahead(ask.now) / candidate.factor + speeds.seconds(ask.uncached(candidate.url), ask.prompt_tokens)


def _place_long(candidates: Sequence[Learnt], index: int, own: float, ask: Ask) -> int:
    """Choose for a long prompt: the candidate with the most work before it, of those that finish it at most `own`
    seconds later than the best candidate.

    Arguments:
        index: the index of the candidate with the earliest first token.
        own: the seconds of the prompt's own work there.
    """
    costs = [time_to_first_token(candidate, ask) for candidate in candidates]
    most, now = costs[index] + own, ask.now
    fit = [n for n, cost in enumerate(costs) if cost <= most and now <= candidates[n].speeds.late_at]
    if not fit:
        return index
    waits = [-candidates[n].speeds.ahead(now) for n in fit]
    if not any(waits):
        return index
    among = [candidates[n] for n in fit]
    return fit[_least(among, waits, ask)]


def _spread(candidates: Sequence[Learnt], index: int, ask: Ask) -> int:
    """Choose for a prompt where the engine that has its prefix cached has a queue.

    Arguments:
        index: the index of the candidate with the earliest first token.
    """
    now = ask.now
    shortest = _IDLE * candidates[index].speeds.ahead(now)
    most = _LATER * time_to_first_token(candidates[index], ask)
    for n, candidate in enumerate(candidates):
        wait = candidate.speeds.ahead(now) / candidate.factor
        if wait < shortest and time_to_first_token(candidate, ask) <= most:
            index, shortest = n, wait
    return index


def next_token(candidates: Sequence[Learnt], ask: Ask) -> int:
    """The candidate with the shortest expected step once it has the request, of those with room for its KV cache."""
    if len(candidates) == 1:
        return 0
    own = ask.decode_tokens
    costs = [
        (s := c.speeds).step_base + s.step_token * (c.inflight_tokens + c.elsewhere_tokens + own) for c in candidates
    ]
    index = _least(candidates, costs, ask)
    chosen = candidates[index]
    if chosen.factor == 1.0 and chosen.inflight_tokens + chosen.elsewhere_tokens + own <= chosen.speeds.capacity:
        return index
    return _with_capacity(candidates, ask, expected_step)


def expected_step(candidate: Learnt, ask: Ask) -> float:
    """The expected seconds of a candidate's step once it has the request, as `next_token` compares them."""
    speeds = candidate.speeds
    tokens = candidate.inflight_tokens + candidate.elsewhere_tokens
    return speeds.step_base + speeds.step_token * (tokens / candidate.factor + ask.decode_tokens)


def _with_capacity(candidates: Sequence[Learnt], ask: Ask, cost: Callable[[Learnt, Ask], float]) -> int:
    """The cheapest candidate whose KV cache has room for the request; where none has, the one that exceeds its capacity
    by the smallest factor."""
    own = ask.decode_tokens
    fill = [
        ((c.inflight_tokens + c.elsewhere_tokens) / c.factor + own) / c.speeds.capacity if c.speeds.capacity else 1e9
        for c in candidates
    ]
    fit = [n for n, share in enumerate(fill) if share <= 1.0]
    if not fit:
        return _least(candidates, fill, ask)
    among = [candidates[n] for n in fit]
    return fit[_least(among, [cost(candidate, ask) for candidate in among], ask)]


def whole_answer(candidates: Sequence[Learnt], ask: Ask) -> int:
    """The candidate that is expected to finish the whole request first, of those with room for its KV cache."""
    return 0 if len(candidates) == 1 else _with_capacity(candidates, ask, time_to_last_token)


def time_to_last_token(candidate: Learnt, ask: Ask) -> float:
    """The seconds in which a candidate is expected to have finished the whole answer."""
    return time_to_first_token(candidate, ask) + expected_output(ask) * expected_step(candidate, ask)


def expected_output(ask: Ask) -> int:
    """The tokens that an answer is expected to have."""
    return min(max(1, ask.decode_tokens - ask.prompt_tokens), _MAX_OUTPUT)


def _least(candidates: Sequence[Learnt], costs: Sequence[float], ask: Ask) -> int:
    """The index of the least cost. Ties are broken by the least load, and then at random."""
    least = min(costs)
    same = costs.count(least)
    if same == 1:
        return costs.index(least)
    if same == len(costs):
        return lightest(candidates, range(same), ask)
    return lightest(candidates, [index for index, cost in enumerate(costs) if cost == least], ask)


CHOICES: dict[str, dict[str, Choice]] = {
    role: {**POLICIES, "auto": rule}
    for role, rule in (("prefill", first_token), ("decode", next_token), ("mixed", whole_answer))
}
"""All policies by pool and name."""
