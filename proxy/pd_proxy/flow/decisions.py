"""Keeps the last decisions of placement, to explain why a request was sent to its backends.

Every decision is noted in brief: the backends and the reason. For at most a thousand decisions a second the state of
the chosen engines is kept as well, as plain numbers, from which their costs are computed when an operator asks. The
record of the request is kept with the decision, so that its outcome can be shown beside the expected costs.

A full explanation has the costs of every candidate, and which backends were left out by which rule. It takes as long as
some hundred decisions. So it is made where an operator has asked for it (`x-pd-proxy-explain`), and otherwise only when
400 times the duration of the last one has passed, which is 0.25 % of a core at most. A gateway with little load
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
"""The number of decisions that are kept."""
MOST_HEADER = 4096
"""The most bytes of a decision in a response header: proxies accept 8 kB of headers in total."""
MOST_CANDIDATES = 16
"""The most candidates of one pool that are kept with a decision: those with the earliest first token, and the
chosen."""
_SHARE = 400.0  # times the duration of an explanation before the next one that no operator has asked for
_SNAPSHOT_INTERVAL = 0.001  # seconds between snapshots of chosen engines: each takes half a microsecond
_LONGEST_NAME = 64  # characters of a model's name, which a client may choose

LeftOut = Sequence[tuple[Backend, str]]


class Snapshot(msgspec.Struct, frozen=True, gc=False):
    """The state of an engine when a decision chose it, as numbers. `cost` computes its costs from them.

    Attributes:
        wait: seconds of prefill work ahead of the request.
        slow: the time of its steps, relative to the fit of its pool.
        pool: the speeds that were learnt for its pool.
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
        """What `placement.costs.cost` returned then, as long as the fits of the pool have not changed.

        Arguments:
            prompt, decode_tokens: tokens of the request.
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
    """The state of an engine now."""
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
    """Everything that a decision took into account.

    Attributes:
        candidates: role and costs of each candidate that is kept.
        of: the number of candidates of each role.
        left_out: URL, role and rule of each backend that was left out and is kept.
        rules: how many backends each rule left out.
    """

    candidates: tuple[tuple[str, Cost], ...]
    of: Mapping[str, int]
    left_out: tuple[tuple[str, str, str], ...]
    rules: Mapping[str, int]


def explanation_of(
    view: View[Backend], ask: Ask, left_out: LeftOut, chosen: Sequence[str], most: int | None = None
) -> Explanation:
    """Everything that a decision takes into account. Must be called before its request takes its leases.

    Arguments:
        chosen: URLs of the backends that were chosen, which are always kept.
        most: how many candidates of a pool are kept, and twice as many backends that were left out; None: all.
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
    """One decision. Where no backend could be chosen, `prefill`, `decode` and `reason` are empty.

    Attributes:
        at: `time.monotonic`.
        record: of the request; it may have changed since.
        nth: the number of the try.
        prompt, decode_tokens, ttft, tpot: of the request's `Ask`.
        error: why no backend was chosen, or empty.
        full: the explanation; None where there is none.
        chosen: URLs of the backends that were chosen: the prefill backend's or an empty string, and the URL of the
            backend that answers.
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
        counts: decisions, by the pool that answers and the reason; both are `none` where no backend was chosen.
        local: requests that one backend prefills and answers though a pair was configured, by pool and reason.
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
        """Whether a decision needs an explanation."""
        return request.explain or now >= self._next

    def note(self, request: Request, ask: Ask, decision: Decision[Backend], full: Explanation | None = None) -> None:
        """Note that a try was placed. Called after the request's record has it, and before it takes its leases."""
        pool, reason = decision.pool, decision.reason
        self.counts[pool, reason] += 1
        if decision.prefill is None and pool != "prefill" and (decision.fallback or reason in _INSTEAD):
            self.local[pool, decision.fallback or reason] += 1
        closely = full is not None or request.explain or ask.now >= self._looked + _SNAPSHOT_INTERVAL
        if closely:
            self._looked = ask.now
        decided = _decided(request.record, request.record.tries, ask, decision, full, closely)
        self._ring.append(decided)
        if request.explain:
            request.explained = header(self.shown(decided))

    def note_none(self, request: Request, ask: Ask, error: str, full: Explanation | None = None) -> None:
        """Note that no backend could be chosen for a try."""
        self.counts["none", "none"] += 1
        self._ring.append(_undecided(request.record, ask, error, full))

    def preview(
        self, request: Request, ask: Ask, decision: Decision[Backend] | str, full: Explanation
    ) -> dict[str, Any]:
        """The decision about a request, as values for JSON. It is not noted.

        Arguments:
            decision: the decision, or why there is none.
        """
        record = request.record
        if isinstance(decision, str):
            return self.shown(_undecided(record, ask, decision, full))
        return self.shown(_decided(record, 1, ask, decision, full, True))

    def explained(self, since: float) -> None:
        """Note that an explanation that began at `since` has ended."""
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
        """A decision as values for JSON. Its `at` is still that of `time.monotonic`."""
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
        record.fallback,  # which may be more exact than the decision's own
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
    """Costs as values for JSON: times in seconds, to a tenth of a millisecond, and steps to a microsecond."""
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
    """The outcome of a request, as far as it is known. `outcome` is null while it runs."""
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
    """A decision as the value of a response header: JSON on one line, in ASCII, of at most `MOST_HEADER` bytes.

    Candidates and backends that do not fit are left out, those that were not chosen first, and counted in `omitted`.
    """
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
