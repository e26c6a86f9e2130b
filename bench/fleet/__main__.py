"""Compares placement policies in virtual time: hours of a fleet in seconds. Run from the repository's root:

    .venv/bin/python -m bench.fleet                      all kinds of traffic, all policies, held-out seeds (minutes)
    .venv/bin/python -m bench.fleet --quick              a few kinds and policies, one seed (seconds)
    .venv/bin/python -m bench.fleet --write              ... and write bench/FLEET.md
    .venv/bin/python -m bench.fleet --tuning             on the seeds that thresholds may be tuned on
    .venv/bin/python -m bench.fleet --kind agents --policy auto --policy oracle

Exit status: 0; with --check, 1 when `auto` misses its target on some kind.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from time import process_time

from bench.fleet import report
from bench.fleet.fleet import Outcome, Router, simulate
from bench.fleet.gateway import POLICIES, Gateway
from bench.fleet.kinds import ALL, BY_NAME, HELD_OUT, QUICK, TUNING, trace
from bench.fleet.oracle import VARIANTS, Oracle
from bench.fleet.peers import PEERS
from bench.fleet.report import Figures

RESULTS = Path(__file__).resolve().parents[1] / "FLEET.md"
EVERY = (report.AUTO, report.ORACLE, *(name for name in POLICIES if name != report.AUTO), *PEERS)
QUICK_POLICIES = (report.AUTO, report.ORACLE, "least_loaded", "smg cache_aware")


def routers(policy: str, seed: int) -> Iterator[tuple[str, Router]]:
    """The routers that run under a policy's name: one, or all variants of the oracle."""
    if policy == report.ORACLE:
        for name, variant in VARIANTS.items():
            yield name, Oracle(variant)
    elif policy in PEERS:
        yield "", PEERS[policy]()
    else:
        yield "", Gateway(policy, seed=seed)


def measure(case: tuple[str, int, Sequence[str]]) -> list[Figures]:
    """Run policies on one trace."""
    name, seed, policies = case
    kind = BY_NAME[name]
    requests = trace(kind, seed)
    found = []
    for policy in policies:
        best: tuple[Outcome, str, Router] | None = None
        begun = process_time()
        for variant, router in routers(policy, seed):
            outcome = simulate(kind, requests, router)
            if best is None or outcome.goodput > best[0].goodput:
                best = outcome, variant, router
        assert best is not None
        outcome, variant, router = best
        reasons = router.reasons if isinstance(router, Gateway) else {}
        found.append(
            Figures(
                name,
                seed,
                policy,
                len(outcome.jobs),
                outcome.goodput,
                *outcome.missed(),
                outcome.ttft(0.5),
                outcome.ttft(0.99),
                outcome.hit_rate,
                outcome.local,
                outcome.preemptions,
                process_time() - begun,
                variant,
                ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items())),
            )
        )
    return found


def options(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        "bench.fleet", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = "; ".join(f"{kind.name}: {kind.what}" for kind in ALL).replace("%", "%%")
    parser.add_argument("--kind", action="append", choices=list(BY_NAME), help=f"may be repeated. {what}")
    parser.add_argument("--policy", action="append", choices=EVERY, help="may be repeated; default: all")
    parser.add_argument("--seed", action="append", type=int, help=f"may be repeated; default: {HELD_OUT}, held out")
    parser.add_argument("--tuning", action="store_true", help=f"seeds {TUNING}, which thresholds may be tuned on")
    parser.add_argument("--quick", action="store_true", help=f"{', '.join(QUICK)}; a few policies, one seed")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON, not tables")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    parser.add_argument("--check", action="store_true", help="end with 1 when `auto` misses its target")
    return parser.parse_args(arguments)


def run(arguments: Sequence[str]) -> int:
    """Simulate and print; returns the exit status."""
    chosen = options(arguments)
    kinds = chosen.kind or (QUICK if chosen.quick else [kind.name for kind in ALL])
    seeds = chosen.seed or (TUNING if chosen.tuning else HELD_OUT)[: 1 if chosen.quick else None]
    policies = chosen.policy or (QUICK_POLICIES if chosen.quick else EVERY)
    cases = [(kind, seed, policies) for kind in kinds for seed in seeds]
    figures: list[Figures] = []
    with ProcessPoolExecutor(chosen.jobs) as pool:
        for found in pool.map(measure, cases) if chosen.jobs > 1 else map(measure, cases):
            figures += found
            seconds = sum(one.seconds for one in found)
            print(f"{found[0].kind}, seed {found[0].seed}: {seconds:.0f} s of CPU", file=sys.stderr)
    if chosen.json:
        print(json.dumps([one._asdict() for one in figures], indent=1))
        return 0
    summaries = report.summarise(figures)
    print(report.goodput_table(summaries), end="\n\n")
    print(report.detail_table(summaries, policies))
    requests, seconds = sum(one.requests for one in figures), sum(one.seconds for one in figures)
    print(f"\n{requests} requests in {seconds:.1f} s of CPU, the oracle's variants counted as one", file=sys.stderr)
    if not {report.AUTO, report.ORACLE} < set(policies):
        return 0
    print("\n" + report.verdict_table(summaries))
    if chosen.write:
        command = shlex.join(["python", "-m", "bench.fleet", *arguments])
        RESULTS.write_text(report.markdown(summaries, command, seeds))
        print(f"wrote {RESULTS}", file=sys.stderr)
    return 1 if chosen.check and not all(one.holds for one in summaries) else 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
