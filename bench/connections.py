"""What an open connection costs: memory of a gateway with ten thousand idle clients, with ten thousand streams, and
with some that have long prompts.

    .venv/bin/python -m bench --case connections

Each kind is measured on a gateway of its own, with one worker: the growth of its resident memory, with all connections
open, divided by their number. The kernel's socket buffers are not included. Streams begin one after the other, so that
each holds two sockets of the gateway, and a third one, to prefill, only for a moment: ten thousand, or as many as the
limit on open files allows. Streams with long prompts begin at the same time. For them the peak from the first request
on is taken, since there may be several copies of a body for a while.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shlex
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from bench.cases import Case
from bench.cost import SETTLE_S, Contender, counted, engine, gateway_argv, last_lines, warm_up
from bench.process import BenchError, free_port, rss_mib, running, wait_ready
from bench.report import Table

IDLE = 10_000
STREAMS = 10_000
STARTS_A_SECOND = 500
OTHER_FILES = 200  # open files of a gateway: its own, those of prefill legs, and of health checks
LONG_STREAMS, LONG_PROMPT = 200, 400_000
HOLD_S = 3.0  # how long all connections are open while memory is read
LIMIT = "PD_PROXY_LIMITS__CONNECTIONS"  # the default allows as many connections as could all stream, which is fewer
REQUEST = b"GET /health HTTP/1.1\r\nhost: bench\r\nuser-agent: bench\r\naccept: */*\r\n\r\n"
STREAM = Case(
    name="connections",
    what="a token every second on each stream, 1 kB prompts",
    unit="token",
    tick_us=1_000_000,
    pad_bytes=0,
    concurrency=STREAMS,
    requests=STREAMS,
    tokens=30,  # the first streams must still run when the last begin
    prompt_bytes=1_000,
)


@dataclass(frozen=True, slots=True)
class Held:
    """The cost of connections of one kind. Memory in MiB of the process tree."""

    kind: str
    count: int
    before: float
    during: float
    after: float

    @property
    def kib_each(self) -> float:
        return (self.during - self.before) * 1024 / self.count


def table(program: Path, contender: Contender) -> Table:
    """Measure each kind."""
    rows = [
        (
            one.kind,
            f"{one.count:,}",
            f"{one.before:.0f}",
            f"{one.during:.0f}",
            f"{one.kib_each:.1f}",
            f"{one.after:.0f}",
        )
        for one in (measure(program, contender, kind) for kind in (idle, streaming, long_prompts))
    ]
    columns = ("connections", "open", "MiB before", "MiB with them", "KiB each", "MiB after")
    return Table("Memory of open connections", columns, rows)


def measure(program: Path, contender: Contender, kind: Callable[[Path, int, int, int], Held]) -> Held:
    """Start engines and a gateway, and let `kind` open its connections (program, gateway's pid, port, decode)."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(many_files())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pd-proxy-bench.")))
        prefill = stack.enter_context(engine(program, STREAM, folder))
        decode = stack.enter_context(engine(program, STREAM, folder))
        port, log_path = free_port(), folder / "gateway.log"
        log = stack.enter_context(log_path.open("w"))
        argv = gateway_argv(contender, folder, port, prefill, decode)
        process = stack.enter_context(running(argv, log))
        try:
            wait_ready(process, port, contender.ready_path)
            warm_up(program, port, replace(STREAM, tick_us=0))
            time.sleep(SETTLE_S)
            return kind(program, process.pid, port, decode)
        except BenchError as error:
            raise BenchError(f"{contender.name} ({shlex.join(argv)}): {error}\n{last_lines(log_path)}") from error


def idle(_program: Path, pid: int, port: int, _decode: int) -> Held:
    """Clients that have received one answer each and keep their connections open."""
    before = rss_mib(pid)
    with contextlib.ExitStack() as stack:
        for _ in range(IDLE):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
            client.sendall(REQUEST)
            if not client.recv(4096).startswith(b"HTTP/1.1 200"):
                raise BenchError("a connection was refused; are there enough files (ulimit -n)?")
        during = resident(pid)
    time.sleep(2 * SETTLE_S)
    return Held("idle, after one answer", IDLE, before, during, rss_mib(pid))


def streaming(program: Path, pid: int, port: int, decode: int) -> Held:
    """Streams that all run at the same time."""
    count = streams_that_fit()
    return _streams("streaming", program, pid, port, decode, count, STREAM.prompt_bytes, STARTS_A_SECOND)


def long_prompts(program: Path, pid: int, port: int, decode: int) -> Held:
    """Streams whose requests are large, all at the same time."""
    kind = f"streaming, prompts of {LONG_PROMPT // 1000} kB"
    return _streams(kind, program, pid, port, decode, LONG_STREAMS, LONG_PROMPT, 0)


def _streams(kind: str, program: Path, pid: int, port: int, decode: int, streams: int, prompt: int, rate: int) -> Held:
    before = most = rss_mib(pid)
    already = counted(decode)["decode"]
    argv = [str(program), "client", "--port", str(port), "--timeout-s", "120", "--tokens", str(STREAM.tokens)]
    argv += ["--concurrency", str(streams), "--requests", str(streams), "--prompt-bytes", str(prompt)]
    argv += ["--rate", str(rate)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as client:
        end = time.monotonic() + 60
        while counted(decode)["decode"] - already < streams:
            if client.poll() is not None or time.monotonic() > end:
                client.kill()
                raise BenchError(f"not all streams began: {client.communicate()[1]}")
            most = max(most, rss_mib(pid))
            time.sleep(0.1 if rate else 0.01)
        during = resident(pid)
        if not rate:
            during = max(most, during)
        said, complaints = client.communicate(timeout=120)
    if f'"ok":{streams},' not in said:
        raise BenchError(f"not all streams were whole: {complaints}{said}")
    time.sleep(2 * SETTLE_S)
    return Held(kind, streams, before, during, rss_mib(pid))


def streams_that_fit(workers: int = 1) -> int:
    """How many streams a gateway with this number of workers can hold here, at most `STREAMS`."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return min(STREAMS, workers * (files - OTHER_FILES) // 2)


def resident(pid: int) -> float:
    """Memory of the process tree, the median of some readings."""
    readings = []
    for _ in range(10):
        readings.append(rss_mib(pid))
        time.sleep(HOLD_S / 10)
    return statistics.median(readings)


@contextlib.contextmanager
def many_files() -> Iterator[None]:
    """Raise the limit on open files for this process and those that it starts, and the gateway's limit on
    connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < IDLE + OTHER_FILES:
        raise BenchError(f"{IDLE} clients need {IDLE + OTHER_FILES} open files, and ulimit -Hn says {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # Workers share the limit evenly, but the kernel does not share connections evenly.
    os.environ[LIMIT] = str(2 * (max(IDLE, STREAMS) + OTHER_FILES))
    try:
        yield
    finally:
        del os.environ[LIMIT]
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
