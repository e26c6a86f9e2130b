"""What the placement policy `auto` costs compared with `least_loaded`: CPU of a short request, over real sockets.

Eight prefill and eight decode engines serve three gateways: one with `least_loaded` for all pools, one with `auto`, and
a second one with `least_loaded`, which shows how far two equal gateways differ in this measurement. All of them run at
the same time, and the load goes to one of them at a time, in short rounds: to each in turn and then in the opposite
order. The CPU time of a gateway's process, user and kernel, in its two rounds of such a turn is divided by the
requests, and by the CPU time of the first gateway in the same turn. So whatever slows the machine for longer than a few
seconds is in both and cancels out. The gateways are bound to one core, the engines and the client to the others.
Gateways are started afresh several times, since two processes of the same program differ a little for as long as they
live.

`auto` does not look a short prompt up in the prefix index where every engine computes it in 5 ms. So there are loads
with engines that prefill at once, and loads with engines that take so long that every prompt is looked up. Needs Linux
and gcc.

    .venv/bin/python -m bench.policies            prints the table (a quarter of an hour)
    .venv/bin/python -m bench.policies --quick    a first estimate: few rounds, one start
    .venv/bin/python -m bench.policies --write    ... and write bench/POLICIES.md
    .venv/bin/python -m bench.policies --check    ends with 1 where `auto` is above the budget

Ends with 1 when a request failed, with 2 when something is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

from bench import load, machine
from bench.cases import BY_NAME, Case
from bench.cost import SETTLE_S, engine, last_lines, warm_up
from bench.process import BenchError, cpu_seconds, free_port, running, wait_ready
from bench.report import Table

FILE = Path(__file__).with_name("POLICIES.md")
ENGINES = 8  # of each pool
BUDGET = 1.04  # the most CPU relative to `least_loaded`
AGAIN = "least_loaded again"
GATEWAYS = {"least_loaded": "least_loaded", "auto": "auto", AGAIN: "least_loaded"}
"""The policy of each gateway, by its name; the others are compared with the first."""
WARMING = 2000  # requests that a new gateway serves before it is measured: speeds are learnt, caches have entries

_AT_ONCE = replace(BY_NAME["short"], what="engines prefill at once", requests=1500, budget=None)
_SLOW = replace(_AT_ONCE, what="a prompt takes 8 ms", requests=400, concurrency=64, prefill_us=8_000)
CASES = tuple(
    replace(timing, name=name, differ_at=differ_at, prefixes=prefixes)
    for timing in (_AT_ONCE, _SLOW)
    for name, differ_at, prefixes in (("all differ", 0, 1), ("16 prefixes of 800 bytes", 800, 16))
)


@dataclass(frozen=True, slots=True)
class Turn:
    """CPU microseconds of a request in one turn, by gateway, and how many requests failed."""

    cpu_us: Mapping[str, float]
    failed: int = 0

    def ratio(self, name: str) -> float:
        """CPU of a gateway relative to the first one."""
        return self.cpu_us[name] / next(iter(self.cpu_us.values()))


Starts = Sequence[Sequence[Turn]]
"""The turns of each start of the gateways."""


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of some ratios.

    Attributes:
        quartiles: of the ratios of single turns.
        interval: contains the median with 95 % confidence, by bootstrap.
    """

    median: float
    quartiles: tuple[float, float]
    interval: tuple[float, float]


# --------------------------------------------------------------------------------------------------- statistics


def spread(starts: Sequence[Sequence[float]], draws: int = 4000) -> Spread:
    """The spread of the ratios of several starts.

    The bootstrap draws starts, and turns of each start: the turns of one start have more in common than those of two.
    """
    chosen = random.Random(0)
    every = [ratio for start in starts for ratio in start]
    medians = []
    for _ in range(draws):
        drawn = [
            ratio for start in chosen.choices(starts, k=len(starts)) for ratio in chosen.choices(start, k=len(start))
        ]
        medians.append(statistics.median(drawn))
    medians.sort()
    quarters = statistics.quantiles(every, n=4) if len(every) > 1 else every * 3
    return Spread(
        statistics.median(every),
        (quarters[0], quarters[2]),
        (medians[int(0.025 * draws)], medians[int(0.975 * draws)]),
    )


# -------------------------------------------------------------------------------------------------- measurement


@dataclass(frozen=True, slots=True)
class Gateway:
    """A running gateway."""

    pid: int
    port: int


def gateway_argv(policy: str, port: int, prefill: Sequence[int], decode: Sequence[int]) -> list[str]:
    """The command of a gateway with one policy for all pools, before engines on the given ports."""
    # The mixed pool is empty; with `auto` for it, the gateway nevertheless learns what `auto` needs.
    policies = [part for role in ("prefill", "decode", "mixed") for part in (f"--policy.{role}", policy)]
    argv = ["pd-proxy", "serve", "--port", str(port), *policies]
    for role, ports in (("prefill", prefill), ("decode", decode)):
        argv += [part for engine_port in ports for part in (f"--{role}", f"http://127.0.0.1:{engine_port}")]
    return argv


@contextlib.contextmanager
def bound(cores: Set[int]) -> Iterator[None]:
    """Bind this process, and the processes that it starts in the block, to some cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def split_cores(cores: Set[int]) -> tuple[Set[int], Set[int]]:
    """A core for the gateways, and the other cores for everything else; a single core is used for both."""
    first = {max(cores)}
    return first, cores - first or first


@contextlib.contextmanager
def gateways(
    policies: Mapping[str, str], prefill: Sequence[int], decode: Sequence[int], folder: Path, cores: Set[int]
) -> Iterator[dict[str, Gateway]]:
    """Run a gateway for each policy on some cores while the block runs; yields them by name once they are ready."""
    with contextlib.ExitStack() as stack:
        started: dict[str, Gateway] = {}
        for name, policy in policies.items():
            port = free_port()
            log_path = folder / f"gateway-{port}.log"
            log = stack.enter_context(log_path.open("w"))
            with bound(cores):
                process = stack.enter_context(running(gateway_argv(policy, port, prefill, decode), log))
            try:
                wait_ready(process, port, "/ready")
            except BenchError as error:
                raise BenchError(f"gateway with {policy}: {error}\n{last_lines(log_path)}") from error
            started[name] = Gateway(process.pid, port)
        yield started


def turn(program: Path, running_ones: Mapping[str, Gateway], case: Case, numbers: Iterator[int]) -> Turn:
    """Run two rounds for each gateway: in turn, and then in the opposite order.

    Arguments:
        numbers: of the first request of each round, so that no prompt comes twice where all differ.
    """
    spent, answered, failed = dict.fromkeys(running_ones, 0.0), dict.fromkeys(running_ones, 0), 0
    for name in (*running_ones, *reversed(list(running_ones))):
        one = running_ones[name]
        before = cpu_seconds(one.pid)
        report = load.drive(program, one.port, replace(case, first=next(numbers)))
        spent[name] += cpu_seconds(one.pid) - before
        answered[name] += report["ok"]
        failed += report["bad"] + report["unfinished"]
    return Turn({name: spent[name] * 1e6 / max(1, answered[name]) for name in running_ones}, failed)


def measure(program: Path, case: Case, starts: int, turns: int) -> list[list[Turn]]:
    """The turns of each start of the gateways."""
    own, others = split_cores(os.sched_getaffinity(0))
    with bound(others), contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pd-proxy-bench.")))
        prefill = [stack.enter_context(engine(program, case, folder)) for _ in range(ENGINES)]
        decode = [stack.enter_context(engine(program, case, folder)) for _ in range(ENGINES)]
        numbers, measured = count(0, max(case.requests, WARMING)), []
        for start in range(starts):
            names = list(GATEWAYS)
            names = names[start % len(names) :] + names[: start % len(names)]  # no gateway is always started first
            with gateways({name: GATEWAYS[name] for name in names}, prefill, decode, folder, own) as found:
                time.sleep(SETTLE_S)
                for one in found.values():
                    warm_up(program, one.port, case)
                    load.drive(
                        program, one.port, replace(case, requests=min(WARMING, 4 * case.requests), first=next(numbers))
                    )
                in_order = {name: found[name] for name in GATEWAYS}
                measured.append([turn(program, in_order, case, numbers) for _ in range(turns)])
            ratios = [one.ratio("auto") for one in measured[-1]]
            print(
                f"{case.what}, {case.name}: start {start + 1} of {starts}: {statistics.median(ratios):.3f}",
                file=sys.stderr,
                flush=True,
            )
    return measured


# ------------------------------------------------------------------------------------------------------- report


def row(case: Case, measured: Starts) -> tuple[str, ...]:
    """A case's line of the table."""
    every = [one for start in measured for one in start]
    reference = statistics.median(one.cpu_us["least_loaded"] for one in every)
    auto = spread([[one.ratio("auto") for one in start] for start in measured])
    again = spread([[one.ratio(AGAIN) for one in start] for start in measured])
    return (
        case.what,
        case.name,
        f"{reference:.0f} µs",
        f"{auto.median - 1:+.1%}",
        _span(auto.interval),
        _span(auto.quartiles),
        f"{again.median - 1:+.1%} ({_span(again.interval)})",
    )


def _span(pair: tuple[float, float]) -> str:
    return f"{pair[0] - 1:+.1%} to {pair[1] - 1:+.1%}"


def table(rows: Sequence[tuple[str, ...]]) -> Table:
    """All cases."""
    columns = (
        "engines",
        "prompts",
        "CPU a request, `least_loaded`",
        "`auto`",
        "95 % interval",
        "quartiles of turns",
        "`least_loaded` again",
    )
    return Table("CPU of a short request", columns, rows)


def markdown(rows: Sequence[tuple[str, ...]], starts: int, turns: int) -> str:
    """The page."""
    versions = ", ".join(f"{name} {machine.version(name)}" for name in ("uvicorn", "uvloop", "httptools"))
    many, more, leg_ms = _AT_ONCE.concurrency, _SLOW.concurrency, _SLOW.prefill_us // 1000
    return f"""\
<!-- Written by `python -m bench.policies --write`. Do not edit; run it again. -->

# What the policy `auto` costs compared with `least_loaded`

CPU time of the gateway's process, user and kernel, for a request of 1 kB with a streamed answer of two tokens, over
loopback sockets, at {ENGINES} engines of each pool. There are {many} streams at once where engines prefill at once, and
{more} where they prefill one prompt after the other, each in {leg_ms} ms. In the former case `auto` seldom looks a
prompt up in the prefix index, since every engine computes it in less than 5 ms; in the latter it looks each up. The
mock engines do not report cached tokens. Budget: {BUDGET - 1:.0%} more than `least_loaded`.

Three gateways run at once on one core: two with `least_loaded` for all pools, one with `auto`. In a turn each has two
short rounds of load, in mirrored order, and its CPU time is divided by that of the first gateway in the same turn. The
second `least_loaded` shows how far two equal gateways differ. Each case has {starts} starts of the gateways with
{turns} turns each. Figures are medians, and their intervals are by bootstrap over starts and turns.

- machine: {os.cpu_count()} cores, {machine.cpu_model()}, Linux {platform.release()}
- versions: Python {platform.python_version()}, {versions}

{table(rows)}"""


def over_budget(measured: Starts) -> bool:
    """Whether the median of `auto` is above its budget."""
    return statistics.median(one.ratio("auto") for start in measured for one in start) > BUDGET


def main(arguments: Sequence[str]) -> int:
    """Measure and print; returns the exit status."""
    parser = argparse.ArgumentParser(
        "bench.policies", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--starts", type=int, default=4, help="starts of the gateways (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=20, help="turns a start (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one start, two turns")
    parser.add_argument("--write", action="store_true", help=f"write {FILE.name}")
    parser.add_argument("--check", action="store_true", help="end with 1 where `auto` is above the budget")
    chosen = parser.parse_args(arguments)
    starts, turns = (1, 2) if chosen.quick else (chosen.starts, chosen.turns)
    program = load.build()
    measured = [(case, measure(program, case, starts, turns)) for case in CASES]
    rows = [row(case, found) for case, found in measured]
    print(table(rows))
    if chosen.write:
        FILE.write_text(markdown(rows, starts, turns), encoding="utf-8")
        print(f"wrote {FILE}", file=sys.stderr)
    failed = sum(one.failed for _, found in measured for start in found for one in start)
    if failed:
        print(f"bench.policies: {failed} requests failed", file=sys.stderr)
    missed = chosen.check and any(over_budget(found) for _, found in measured)
    return 1 if failed or missed else 0


def _interrupted(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt  # left through the blocks that end the processes


def command(run: Callable[[Sequence[str]], int]) -> int:
    """Run the command; returns the exit status."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupted)
    try:
        return run(sys.argv[1:])
    except BenchError as error:
        print(f"bench.policies: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bench.policies: interrupted; all its processes have ended", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(command(main))
