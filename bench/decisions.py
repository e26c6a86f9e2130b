"""What a placement decision costs: placement alone, without a gateway around it.

Fleets of several sizes, half prefill and half decode, with loads and speeds as after some traffic; one process, no I/O.
The measured decision is that of an ordinary try: which backends are eligible, which decode backend and which prefill
backend serve it, and whether decode should prefill. Run from the repository's root:

    .venv/bin/python -m bench.decisions            the table
    .venv/bin/python -m bench.decisions --check    ends with 1 where `auto` is above its budget

The fastest of several rounds is printed, since other load on the machine only makes a round longer.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from random import Random
from timeit import repeat

from pd_proxy.fleet.backend import Backend, Lease, Role
from pd_proxy.fleet.pool_speeds import PoolSpeeds
from pd_proxy.fleet.speeds import join_pool
from pd_proxy.placement.ask import Ask
from pd_proxy.placement.decide import decide
from pd_proxy.placement.eligibility import Members, Needs, Rules, eligible

SIZES = (2, 8, 16, 64, 512)
BUDGETS = {16: 25.0, 512: 150.0}
"""The most microseconds that a decision of `auto` may take, by the number of engines."""
POLICIES = ("least_loaded", "auto", "prefix", "session", "round_robin", "power_of_two")
RULES = Rules({}, {}, frozenset({"nixl"}), frozenset(), True, frozenset(), frozenset(), frozenset({"chat"}))
NOW = 1000.0
ROUNDS = 7


def pool(role: Role, size: int, random: Random) -> list[Backend]:
    """A pool that has served for a while and is busy now."""
    speeds = PoolSpeeds()
    backends = [Backend(f"http://10.0.{n // 250}.{n % 250}:8000", role, speeds=join_pool(speeds)) for n in range(size)]
    for backend in backends:
        one, pace = backend.speeds, random.uniform(0.8, 1.2) / 10_000
        for leg in range(20):
            tokens = random.randint(200, 4000)
            one.given(tokens, leg)
            one.answered(tokens, tokens, tokens, leg + tokens * pace)
            one.stepped(random.uniform(0.01, 0.02), random.randint(1, 60), random.randint(1_000, 100_000), leg)
        for _ in range(random.randint(0, 3)):
            tokens = random.randint(200, 4000)
            one.given(tokens, NOW - random.random() * 0.1)
            Lease(backend, tokens)
    return backends


def asks(size: int, cached: str, random: Random) -> Ask:
    """A request of which nothing is cached, or a part on one engine, or a part on all of them."""
    urls = [f"http://10.0.{n // 250}.{n % 250}:8000" for n in range(size)]
    holders = {"nothing": [], "one engine": urls[: size // 8 + 1][:1], "every engine": urls}[cached]
    found: Mapping[str, int] = dict.fromkeys(holders, 1024)
    return Ask(random.random, 7, NOW, 3000, 3500, cached=found, session=b"u-1", ttft=1.0, tpot=0.05)


def decision(prefill: Sequence[Backend], decode: Sequence[Backend], policy: str, ask: Ask) -> Callable[[], object]:
    """Returns a function that makes one decision."""
    policies = dict.fromkeys(("prefill", "decode", "mixed"), policy)
    sizes = {"prefill": len(prefill), "decode": len(decode), "mixed": 0}

    def decided() -> object:
        needs: Needs[Backend] = Needs("m", ask.prompt_tokens, ask.decode_tokens, "chat", "/v1/chat/completions")
        members: Members[Backend] = Members(
            [b for b in prefill if b.up and not b.draining],
            [b for b in decode if b.up and not b.draining],
            (),
            sizes,
        )
        found = eligible(members, needs, RULES)
        return decide(found.view, ask, unsplittable=found.unsplittable, policies=policies, allow_local_prefill=True)

    return decided


def microseconds(call: Callable[[], object]) -> float:
    """Microseconds of one call, in the fastest of some rounds."""
    number = 20
    while (took := min(repeat(call, number=number, repeat=1))) < 0.004 and number < 2000:
        number *= 2
    del took
    return min(repeat(call, number=number, repeat=ROUNDS)) / number * 1e6


def main(arguments: Sequence[str]) -> int:
    """Print the table; returns the exit status."""
    parser = argparse.ArgumentParser(
        "bench.decisions", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="end with 1 where a budget is missed")
    chosen = parser.parse_args(arguments)
    print("Microseconds of one decision, by the number of engines (half of them prefill)\n")
    print("| policy | cached on | " + " | ".join(str(size) for size in SIZES) + " |")
    print("|---|---|" + "---|" * len(SIZES))
    missed = []
    for policy in POLICIES:
        for cached in ("nothing", "one engine", "every engine") if policy in ("auto", "prefix") else ("nothing",):
            row = []
            for size in SIZES:
                random = Random(size)
                prefill, decode = pool("prefill", size // 2, random), pool("decode", size // 2, random)
                for backend in (*prefill, *decode):
                    backend.mark_up()
                took = microseconds(decision(prefill, decode, policy, asks(size // 2, cached, random)))
                row.append(took)
                if policy == "auto" and took > BUDGETS.get(size, took):
                    missed.append(f"auto, {size} engines, cached on {cached}: {took:.0f} µs > {BUDGETS[size]:.0f} µs")
            print(f"| {policy} | {cached} | " + " | ".join(f"{took:.1f}" for took in row) + " |", flush=True)
    for line in missed:
        print(line, file=sys.stderr)
    return 1 if missed and chosen.check else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
