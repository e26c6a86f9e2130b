"""Turns runs into figures, and figures into tables."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import NamedTuple

from bench.fleet.kinds import BY_NAME, HELD_OUT, TUNING

ORACLE = "oracle"
AUTO = "auto"
WANTED = 0.97
"""The share of the oracle's goodput that `auto` has to reach on every kind."""
POINT = 0.01
"""The most by which another policy's goodput may exceed `auto`'s."""

WHY = {
    "tutorial": "factors learnt of like engines differ by a few percent: it shows where each step is near the target",
}
"""Known reasons why `auto` misses its target on a kind."""


class Figures(NamedTuple):
    """One policy on one trace. Shares are of all requests; times are in seconds.

    Attributes:
        variant: the best variant of the oracle.
        missed_ttft, missed_tpot: share that missed its target.
        local: share whose prompt decode computed.
        reasons: how many requests were placed for each reason.
    """

    kind: str
    seed: int
    policy: str
    requests: int
    goodput: float
    missed_ttft: float
    missed_tpot: float
    ttft_p50: float
    ttft_p99: float
    hit_rate: float
    local: float
    preemptions: int
    seconds: float
    variant: str = ""
    reasons: str = ""


class Summary(NamedTuple):
    """One kind over its seeds."""

    kind: str
    goodput: dict[str, float]
    figures: list[Figures]

    @property
    def ratio(self) -> float:
        """Goodput of `auto` over the oracle's."""
        return self.goodput[AUTO] / self.goodput[ORACLE] if self.goodput[ORACLE] else 1.0

    @property
    def best_other(self) -> str:
        """The best policy except `auto` and the oracle."""
        others = [name for name in self.goodput if name not in (ORACLE, AUTO)]
        return max(others, key=self.goodput.__getitem__)

    @property
    def holds(self) -> bool:
        """Whether `auto` meets its target."""
        return self.ratio >= WANTED and self.goodput[AUTO] >= self.goodput[self.best_other] - POINT


def summarise(figures: Sequence[Figures]) -> list[Summary]:
    """Means over seeds, kind by kind, in the order in which they were run."""
    found = []
    for kind in dict.fromkeys(one.kind for one in figures):
        own = [one for one in figures if one.kind == kind]
        policies = dict.fromkeys(one.policy for one in own)
        found.append(
            Summary(kind, {name: mean(one.goodput for one in own if one.policy == name) for name in policies}, own)
        )
    return found


def table(rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; the first row is its head."""
    head, *body = rows
    widths = [max(len(row[place]) for row in rows) for place in range(len(head))]

    def line(row: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"

    return "\n".join([line(head), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(line, body)])


def goodput_table(summaries: Sequence[Summary]) -> str:
    """Goodput by kind and policy."""
    policies = list(summaries[0].goodput)
    rows = [["kind", *policies]]
    rows += [[one.kind, *(f"{100 * one.goodput[name]:.1f}" for name in policies)] for one in summaries]
    return table(rows)


def verdict_table(summaries: Sequence[Summary]) -> str:
    """The targets, and whether they are met."""
    rows = [["kind", "auto", "oracle", "auto/oracle", "best other", "its goodput", "on target"]]
    for one in summaries:
        goodput, other = one.goodput, one.best_other
        rows.append(
            [
                one.kind,
                f"{100 * goodput[AUTO]:.1f}",
                f"{100 * goodput[ORACLE]:.1f}",
                f"{one.ratio:.3f}",
                other,
                f"{100 * goodput[other]:.1f}",
                "yes" if one.holds else "**no**",
            ]
        )
    return table(rows)


def detail_table(summaries: Sequence[Summary], policies: Sequence[str]) -> str:
    """Times, hit rates and misses of a few policies."""
    rows = [
        ["kind", "policy", "TTFT p50", "TTFT p99", "missed TTFT %", "missed TPOT %", "hit rate", "local %", "preempted"]
    ]
    for one in summaries:
        for policy in policies:
            own = [figure for figure in one.figures if figure.policy == policy]
            if own:
                rows.append(
                    [
                        one.kind,
                        policy,
                        f"{mean(f.ttft_p50 for f in own):.2f} s",
                        f"{mean(f.ttft_p99 for f in own):.2f} s",
                        f"{100 * mean(f.missed_ttft for f in own):.1f}",
                        f"{100 * mean(f.missed_tpot for f in own):.1f}",
                        f"{mean(f.hit_rate for f in own):.2f}",
                        f"{100 * mean(f.local for f in own):.0f}",
                        f"{mean(f.preemptions for f in own):.0f}",
                    ]
                )
    return table(rows)


def markdown(summaries: Sequence[Summary], command: str, seeds: Sequence[int]) -> str:
    """The page bench/FLEET.md."""
    requests = sum(figure.requests for one in summaries for figure in one.figures)
    kinds = table([["kind", "what"], *([one.kind, BY_NAME[one.kind].what] for one in summaries)])
    short = [one.kind for one in summaries if not one.holds]
    where = "; ".join(f"{name} ({WHY[name]})" if name in WHY else name for name in short) if short else "none"
    return f"""# Placement in virtual time

This page is the output of `{command}`. A fleet's engines are simulated (`bench/fleet/`). The gateway's own placement,
prefix index and learnt speeds run unchanged. They are compared with other gateways' rules, written anew, and with an
oracle that knows exact caches, queues, present speeds and the length of answers. {requests:,} requests over all runs.

Seeds: {", ".join(map(str, seeds))}. Thresholds were tuned on {", ".join(map(str, TUNING))} only; {
        ", ".join(map(str, HELD_OUT))
    } are held out. Goodput is the share of requests inside both their targets, for the time to the first token
and for the mean time between tokens. The oracle is greedy, so it is no upper bound; the best of its
variants is taken on each trace.

Target on every kind: `auto` has at least {WANTED} of the oracle's goodput, and no other policy is better by more than a
point. Missed on: {where}.

{verdict_table(summaries)}

## Goodput, % of requests

{goodput_table(summaries)}

## Times, hit rates, misses

{detail_table(summaries, [AUTO, ORACLE, "least_loaded", "smg cache_aware"])}

## Kinds

Four prefill and four decode engines unless stated otherwise.

{kinds}

## What the model leaves out

One network for all pulls of KV cache, expert imbalance, ranks that wait for each other, speculative decoding, failures
of hand-offs, slow clients. Caches are simulated in blocks of 128 tokens. A decode engine's steps between two changes of
its batch are treated as continuous. Other gateways' rules get exact and immediate information.
"""
