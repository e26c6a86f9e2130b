"""The last decisions of placement, which answer why a request went where it went.

Every decision is noted in brief: where the request goes and the reason, and, of at most a thousand a second, what was
known then of the engines that were chosen, as plain numbers. What is expected of them is computed from these when
an operator asks. The record of the request is kept with it, so the outcome of the request can be shown beside what was
expected.

A decision in full has every candidate's costs, and which backends were left out by which rule. That takes as long as
some hundred decisions, so it is done where an operator has asked for it (`x-pd-proxy-explain`), and otherwise for one
decision as soon as 400 times the time of the last one has passed: 0.25 % of a core at most. A gateway with little to do
explains every request in full.

Memory: 1,000 decisions, each with at most 16 candidates of a pool and 32 that were left out; some 10 MB at most.
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from heapq import nsmallest
from math import isfinite
from time import monotonic
from typing import Any

import msgspec

from pd_proxy.fleet.backend import Backend
from pd_proxy.fleet.pool_speeds import PoolSpeeds
from pd_proxy.flow.request import Request
from pd_proxy.placement.ask import Ask, uncached
from pd_proxy.placement.auto import time_to_first_token
from pd_proxy.placement.costs import Cost, costs
from pd_proxy.placement.decide import Decision, View
from pd_proxy.telemetry.records import RequestRecord

MOST = 1000
"""Decisions that are kept."""
MOST_HEADER = 4096
"""Bytes of a decision in a response header: proxies take 8 kB of headers in all."""
MOST_CANDIDATES = 16
"""Candidates of one pool that are kept with a decision: those with the earliest first token, and the chosen one."""
_SHARE = 400.0  # times what an explanation took, until the next one without an operator's request
_LOOK = 0.001  # seconds from one look at the engines that were chosen to the next: it takes half a microsecond of each
_LONGEST_NAME = 64  # characters of what a client has named

LeftOut = Sequence[tuple[Backend, str]]


class Snapshot(msgspec.Struct, frozen=True, gc=False):
    """What a decision knew of an engine that it chose, as numbers; `cost` makes sense of them.

    Attributes:
        wait: seconds of prefill work before the request.
        slow: its steps' time over what the pool's fit says.
        pool: what its pool had learnt.
    """

    url: str
    cached: int
    wait: float
    pace: float
    slow: float
    step_base: float
    step_token: float
    factor: float
    tokens: int
    requests: int
    pool: PoolSpeeds

    def cost(self, prompt: int, decode_tokens: int) -> Cost:
        """What `placement.costs.cost` said of it then, as long as the pool's fits are what they were.

        Arguments:
            prompt, decode_tokens: of the request.
        """
        own_tokens = uncached(prompt, self.cached)
        own = self.pool.work(own_tokens, prompt) * self.pace
        return Cost(
            self.url,
            cached=prompt - own_tokens,
            uncached=own_tokens,
            wait=self.wait,
            own=own,
            first_token=self.wait / self.factor + own,
            rate=1.0 / self.pace,
            step=self.step_base + self.step_token * (self.tokens / self.factor + decode_tokens),
            slowness=self.slow / self.pool.factor,
            factor=self.factor,
            tokens=self.tokens,
            requests=self.requests,
        )


def snapshot(backend: Backend, ask: Ask) -> Snapshot:
    """What is known of an engine now."""
    speeds, url = backend.speeds, backend.url
    return Snapshot(
        url,
        ask.cached.get(url, 0),
        speeds.ahead(ask.now),
        speeds.pace,
        speeds.factor,
        speeds.step_base,
        speeds.step_token,
        backend.factor,
        backend.inflight_tokens + backend.elsewhere_tokens,
        backend.inflight_requests + backend.elsewhere_requests,
        speeds.pool,
    )


class Explanation(msgspec.Struct, frozen=True, gc=False):
    """All that a decision looked at.

    Attributes:
        candidates: role and costs of each that is kept.
        of: how many there were of each role.
        left_out: URL, role and rule of each that is kept.
        rules: how many each rule left out.
    """

    candidates: tuple[tuple[str, Cost], ...]
    of: Mapping[str, int]
    left_out: tuple[tuple[str, str, str], ...]
    rules: Mapping[str, int]


def explanation_of(
    view: View[Backend], ask: Ask, left_out: LeftOut, chosen: Sequence[str], most: int | None = None
) -> Explanation:
    """All that a decision looks at. To be called before its request takes its leases.

    Arguments:
        chosen: URLs of the backends that were chosen, which are kept in any case.
        most: candidates of a pool, and twice as many that were left out; None: all.
    """
    candidates: list[tuple[str, Cost]] = []
    pools = {"prefill": view.prefill, "decode": view.decode, "mixed": view.mixed}
    for role, pool in pools.items():
        kept: Sequence[Backend] = pool
        if most is not None and len(pool) > most:
            kept = nsmallest(most, pool, key=lambda one: (one.url not in chosen, time_to_first_token(one, ask)))
        candidates += [(role, one) for one in costs(kept, ask)]
    rules = Counter(rule for _, rule in left_out)
    listed = left_out if most is None else left_out[: 2 * most]
    return Explanation(
        tuple(candidates),
        {role: len(pool) for role, pool in pools.items()},
        tuple((backend.url, backend.role, rule) for backend, rule in listed),
        rules,
    )


class Decided(msgspec.Struct, frozen=True, gc=False):
    """One decision. What is empty where no backend could be chosen: `prefill`, `decode`, `reason`.

    Attributes:
        at: `time.monotonic`.
        record: of the request, as it is when it is looked at.
        nth: which try of it.
        prompt, decode_tokens, ttft, tpot: of its `Ask`.
        error: why no backend was chosen, or empty.
        full: None in a brief one.
        chosen: URLs of the backends that were chosen: prefill's or an empty one, and the one that answers.
    """

    at: float
    record: RequestRecord
    nth: int
    prompt: int
    decode_tokens: int
    ttft: float | None
    tpot: float | None
    pool: str = ""
    prefill: Snapshot | None = None
    decode: Snapshot | None = None
    reason: str = ""
    fallback: str = ""
    error: str = ""
    full: Explanation | None = None
    chosen: tuple[str, str] = ("", "")


class Decisions:
    """The last decisions of one worker.

    Attributes:
        counts: how many there were, by the pool that answers and the reason; of those without anybody, by `none`.
        local: how many requests one backend prefills and answers, where a pair was configured, by pool and reason.
    """

    def __init__(self, most: int = MOST, clock: Callable[[], float] = monotonic) -> None:
        self._ring: deque[Decided] = deque(maxlen=most)
        self._clock = clock
        self._next = float("-inf")
        self._looked = float("-inf")
        self.counts: Counter[tuple[str, str]] = Counter()
        self.local: Counter[tuple[str, str]] = Counter()

    def __len__(self) -> int:
        return len(self._ring)

    def due(self, request: Request, now: float) -> bool:
        """Whether a decision is to be noted in full."""
        return request.explain or now >= self._next

    def note(self, request: Request, ask: Ask, decision: Decision[Backend], full: Explanation | None = None) -> None:
        """A try was placed. Called once it stands in the request's record, and before it takes its leases."""
        pool, reason = decision.pool, decision.reason
        self.counts[pool, reason] += 1
        if decision.prefill is None and pool != "prefill" and (decision.fallback or reason in _INSTEAD):
            self.local[pool, decision.fallback or reason] += 1
        closely = full is not None or request.explain or ask.now >= self._looked + _LOOK
        if closely:
            self._looked = ask.now
        decided = _decided(request.record, request.record.tries, ask, decision, full, closely)
        self._ring.append(decided)
        if request.explain:
            request.explained = header(self.shown(decided))

    def note_none(self, request: Request, ask: Ask, error: str, full: Explanation | None = None) -> None:
        """Nobody could be given a try."""
        self.counts["none", "none"] += 1
        self._ring.append(_undecided(request.record, ask, error, full))

    def preview(
        self, request: Request, ask: Ask, decision: Decision[Backend] | str, full: Explanation
    ) -> dict[str, Any]:
        """What would be decided about a request, as JSON has it. It is not noted.

        Arguments:
            decision: or why there is none.
        """
        record = request.record
        if isinstance(decision, str):
            return self.shown(_undecided(record, ask, decision, full))
        return self.shown(_decided(record, 1, ask, decision, full, True))

    def explained(self, since: float) -> None:
        """An explanation that was begun at `since` is done."""
        now = self._clock()
        self._next = max(self._next, now + _SHARE * (now - since))

    def last(self, limit: int, request_id: str = "") -> list[dict[str, Any]]:
        """The last decisions, the latest first.

        Arguments:
            limit: how many at most.
            request_id: only those for requests of this id.
        """
        found: list[dict[str, Any]] = []
        for one in reversed(self._ring):
            if len(found) >= limit:
                break
            if not request_id or one.record.request_id == request_id:
                found.append(self.shown(one))
        return found

    def shown(self, one: Decided) -> dict[str, Any]:
        """A decision as JSON has it, but for `at`, which is of `time.monotonic`."""
        record, full = one.record, one.full
        if full is not None:
            candidates = [{"role": role, **_shown(cost, one.chosen)} for role, cost in full.candidates]
            rest: dict[str, Any] = {
                "candidates_of": {role: count for role, count in full.of.items() if count},
                "left_out": [{"url": url, "role": role, "rule": rule} for url, role, rule in full.left_out],
                "left_out_by": dict(full.rules),
            }
        else:
            pairs = (("prefill", one.prefill), (one.pool, one.decode))
            known = [(role, it.cost(one.prompt, one.decode_tokens)) for role, it in pairs if it is not None]
            candidates, rest = [{"role": role, **_shown(cost, one.chosen)} for role, cost in known], {}
        return {
            "at": one.at,
            "request_id": record.request_id,
            "endpoint": record.endpoint,
            "model": record.model[:_LONGEST_NAME],
            "client": record.client,
            "try": one.nth,
            "prompt_tokens": one.prompt,
            "output_tokens": max(0, one.decode_tokens - one.prompt),
            "targets": {"ttft": one.ttft, "tpot": one.tpot},
            "pool": one.pool or None,
            "prefill": one.chosen[0] or None,
            "decode": one.chosen[1] or None,
            "reason": one.reason or None,
            "fallback": one.fallback or None,
            "error": one.error or None,
            "complete": full is not None,
            "candidates": candidates,
            **rest,
            "outcome": _outcome(record) if one.nth == record.tries or one.error else None,
        }


def _decided(
    record: RequestRecord, nth: int, ask: Ask, decision: Decision[Backend], full: Explanation | None, closely: bool
) -> Decided:
    prefill, decode = decision.prefill, decision.decode
    return Decided(
        ask.now,
        record,
        nth,
        ask.prompt_tokens,
        ask.decode_tokens,
        ask.ttft,
        ask.tpot,
        decision.pool,
        snapshot(prefill, ask) if closely and prefill is not None else None,
        snapshot(decode, ask) if closely else None,
        decision.reason,
        record.fallback,  # which may say more than the decision's own
        "",
        full,
        ("" if prefill is None else prefill.url, decode.url),
    )


def _undecided(record: RequestRecord, ask: Ask, error: str, full: Explanation | None) -> Decided:
    return Decided(
        ask.now,
        record,
        record.tries + 1,
        ask.prompt_tokens,
        ask.decode_tokens,
        ask.ttft,
        ask.tpot,
        error=error,
        full=full,
    )


_INSTEAD = frozenset({"local_short", "local_cached", "local_spill", "mixed_sooner", "mixed_spill"})


def _shown(cost: Cost, chosen: Sequence[str]) -> dict[str, Any]:
    """Costs as JSON has them: times in seconds, to a tenth of a millisecond and steps to a microsecond."""
    return {
        "url": cost.url,
        "chosen": cost.url in chosen,
        "cached": cost.cached,
        "uncached": cost.uncached,
        "wait": _rounded(cost.wait, 4),
        "own": _rounded(cost.own, 4),
        "first_token": _rounded(cost.first_token, 4),
        "rate": _rounded(cost.rate, 1),
        "step": _rounded(cost.step, 6),
        "slowness": _rounded(cost.slowness, 3),
        "slow_start": _rounded(cost.factor, 3) if cost.factor < 1 else None,
        "tokens": cost.tokens,
        "requests": cost.requests,
    }


def _rounded(value: float, digits: int) -> float | None:
    return round(value, digits) if isfinite(value) else None  # JSON has no infinity


def _outcome(record: RequestRecord) -> dict[str, Any]:
    """What became of a request, as far as that is known; `outcome` is null while it runs."""
    return {
        "outcome": record.outcome or None,
        "status": record.status or None,
        "prompt_tokens": record.prompt_tokens or None,
        "cached_tokens": record.cached_tokens if record.prompt_tokens else None,
        "prefill_seconds": None if record.prefill_seconds is None else _rounded(record.prefill_seconds, 4),
        "ttft": None if record.ttft is None else _rounded(record.ttft, 4),
        "tpot": None if record.tpot is None else _rounded(record.tpot, 6),
        "tokens": record.tokens or None,
    }


_DUMP = json.JSONEncoder(separators=(",", ":"), ensure_ascii=True).encode


def header(shown: Mapping[str, Any]) -> bytes:
    """A decision as the value of a response header: JSON on one line, in ASCII, of at most `MOST_HEADER` bytes. What
    is too much is left out, candidates that were not chosen first, and counted in `omitted`."""
    brief = {name: value for name, value in shown.items() if value is not None and name not in ("outcome", "at")}
    candidates = sorted(brief.pop("candidates", ()), key=lambda one: not one["chosen"])
    left_out = list(brief.pop("left_out", ()))
    omitted = 0
    while True:
        more = {"omitted": omitted} if omitted else {}
        text = _DUMP({**brief, "candidates": candidates, "left_out": left_out, **more})
        if len(text) <= MOST_HEADER:
            return text.encode("ascii")
        most = candidates if len(candidates) >= len(left_out) else left_out
        if not most:
            break
        dropped = max(1, len(most) // 4)
        del most[-dropped:]
        omitted += dropped
    short = ("request_id", "pool", "prefill", "decode", "reason")
    return _DUMP({name: str(brief[name])[:256] for name in short if name in brief}).encode("ascii")
