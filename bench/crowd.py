"""How late a token is among many streams: ten thousand streams, twenty thousand tokens a second, over one and two
workers.

    .venv/bin/python -m bench --case connections

A decode engine emits the tokens of all its streams on one tick, and no engine has ten thousand streams: here there are
eight engines, whose ticks do not coincide. Streams begin one after the other and last long enough that all of them run
at the same time for a while. Engines, gateway and client share the machine's cores, so each of them may cause a delay.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from bench import load
from bench.cases import Case
from bench.connections import STARTS_A_SECOND, many_files, streams_that_fit
from bench.cost import SETTLE_S, Contender, engine, gateway_argv, last_lines, warm_up
from bench.process import BenchError, cpu_seconds, free_port, rss_mib, running, wait_ready
from bench.report import Table

WORKERS = (1, 2)
ENGINES = 8  # decode engines
TOKENS_A_SECOND = 2  # tokens of one stream


@dataclass(frozen=True, slots=True)
class Crowd:
    """What was measured with one number of workers.

    Attributes:
        offered: tokens a second while all streams run.
        delays: of a token, in ms: p50, p99, p99.9 and the maximum.
        cpu_per_token: of the whole process tree, in µs.
        kib_each: growth of the process tree's memory from start to end, divided by the streams.
    """

    workers: int
    streams: int
    offered: int
    delays: tuple[float, float, float, float]
    cpu_per_token: float
    kib_each: float


def case(streams: int) -> Case:
    """The load."""
    ramp = streams / STARTS_A_SECOND
    return Case(
        name="crowd",
        what=f"{streams} streams, {TOKENS_A_SECOND} tokens a second on each, 1 kB prompts",
        unit="token",
        tick_us=1_000_000 // TOKENS_A_SECOND,
        pad_bytes=0,
        concurrency=streams,
        requests=streams,
        tokens=int((ramp + 20) * TOKENS_A_SECOND),
        prompt_bytes=1_000,
        rate=STARTS_A_SECOND,
    )


def measure(program: Path, contender: Contender, workers: int) -> Crowd:
    """Run the load once through a gateway with this number of workers."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(many_files())
        streams = streams_that_fit(workers)
        crowd = case(streams)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pd-proxy-bench.")))
        prefill = stack.enter_context(engine(program, crowd, folder))
        decodes, began = [], time.monotonic()
        for number in range(ENGINES):  # an engine's ticks are counted from its start
            time.sleep(max(0.0, began + number / ENGINES / TOKENS_A_SECOND - time.monotonic()))
            decodes.append(stack.enter_context(engine(program, crowd, folder)))
        port, log_path = free_port(), folder / "gateway.log"
        log = stack.enter_context(log_path.open("w"))
        argv = gateway_argv(contender, folder, port, prefill, decodes[0])
        for decode in decodes[1:]:
            argv += ["--decode", f"http://127.0.0.1:{decode}"]
        process = stack.enter_context(running([*argv, "--workers", str(workers)], log))
        try:
            wait_ready(process, port, contender.ready_path)
            time.sleep(SETTLE_S)
            warm_up(program, port, replace(crowd, tick_us=0, rate=0))
            before, cpu = rss_mib(process.pid), cpu_seconds(process.pid)
            report = load.drive(program, port, crowd, 180)
            spent_us, after = (cpu_seconds(process.pid) - cpu) * 1e6, rss_mib(process.pid)
            if report["ok"] != streams:
                raise BenchError(f"{streams - report['ok']} of {streams} streams were not whole")
        except BenchError as error:
            raise BenchError(f"{contender.name}, {workers} workers: {error}\n{last_lines(log_path)}") from error
    delay = report["token_delay_us"]
    return Crowd(
        workers,
        streams,
        streams * TOKENS_A_SECOND,
        tuple(delay[name] / 1000 for name in ("p50", "p99", "p999", "max")),
        spent_us / report["tokens"],
        (after - before) * 1024 / streams,
    )


def table(program: Path, contender: Contender) -> Table:
    """Measure each number of workers."""
    rows = [
        (
            f"{one.workers}",
            f"{one.streams:,}",
            f"{one.offered:,}",
            " / ".join(f"{ms:.1f}" for ms in one.delays),
            f"{one.cpu_per_token:.1f} µs",
            f"{one.kib_each:.1f}",
        )
        for one in (measure(program, contender, workers) for workers in WORKERS)
    ]
    columns = ("workers", "streams", "tokens/s", "delay p50 / p99 / p99.9 / latest, ms", "CPU a token", "KiB each")
    return Table("Delay of tokens among many streams", columns, rows)
