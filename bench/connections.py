"""What an open connection costs: memory of a gateway with ten thousand idle clients, with thousands of streams, and
with some that have long prompts.

  .venv/bin/python -m bench --case connections

Each kind is measured on a gateway of its own. Its resident memory with all connections open, less what it was before,
is divided by their number. The kernel's socket buffers are not in it. As many streams are opened as files allow: each
holds two sockets of the gateway, and a third for a while. Of streams with long prompts it is the most that was seen
from the first request on, since a body passes through more than one pair of hands on its way.
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

IDLE = 10_000
STREAMS = 6_000
LONG_STREAMS, LONG_PROMPT = 200, 400_000
HOLD_S = 3.0  # how long all are open while memory is read
LIMIT = "PD_PROXY_LIMITS__CONNECTIONS"  # the default allows as many as could all stream, which is fewer
REQUEST = b"GET /health HTTP/1.1\r\nhost: bench\r\nuser-agent: bench\r\naccept: */*\r\n\r\n"
STREAM = Case(
    name="connections",
    what="a token every second on each stream, 1 kB prompts",
    unit="token",
    tick_us=1_000_000,
    pad_bytes=0,
    concurrency=STREAMS,
    requests=STREAMS,
    tokens=30,
    prompt_bytes=1_000,
)


@dataclass(frozen=True, slots=True)
class Held:
    """What connections of one kind cost. Memory in MiB of the process tree."""

    kind: str
    count: int
    before: float
    during: float
    after: float

    @property
    def kib_each(self) -> float:
        return (self.during - self.before) * 1024 / self.count

    def __str__(self) -> str:
        return (
            f"| {self.kind} | {self.count:,} | {self.before:.0f} | {self.during:.0f} | **{self.kib_each:.1f}** "
            f"| {self.after:.0f} |"
        )


def report(program: Path, contender: Contender) -> str:
    """Measures each kind; gives a table."""
    rows = [measure(program, contender, kind) for kind in (idle, streaming, long_prompts)]
    head = "| connections | open | MiB before | MiB with them | KiB each | MiB after |\n|---|---|---|---|---|---|"
    return "\n".join([head, *map(str, rows)])


def measure(program: Path, contender: Contender, kind: Callable[[Path, int, int, int], Held]) -> Held:
    """Starts engines and a gateway, and lets `kind` open its connections (program, gateway's pid, port, decode)."""
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
    """Clients that have had one answer each and keep their connections."""
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
    """Streams that all run at once."""
    return _streams("streaming", program, pid, port, decode, STREAMS, STREAM.prompt_bytes)


def long_prompts(program: Path, pid: int, port: int, decode: int) -> Held:
    """Streams whose requests are large, all at once."""
    kind = f"streaming, prompts of {LONG_PROMPT // 1000} kB"
    return _streams(kind, program, pid, port, decode, LONG_STREAMS, LONG_PROMPT)


def _streams(kind: str, program: Path, pid: int, port: int, decode: int, streams: int, prompt: int) -> Held:
    before = most = rss_mib(pid)
    already = counted(decode)["decode"]
    argv = [str(program), "client", "--port", str(port), "--timeout-s", "120", "--tokens", str(STREAM.tokens)]
    argv += ["--concurrency", str(streams), "--requests", str(streams), "--prompt-bytes", str(prompt)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as client:
        end = time.monotonic() + 60
        while counted(decode)["decode"] - already < streams:
            if client.poll() is not None or time.monotonic() > end:
                client.kill()
                raise BenchError(f"not all streams began: {client.communicate()[1]}")
            most = max(most, rss_mib(pid))
            time.sleep(0.01 if streams < STREAMS else 0.1)
        during = resident(pid)
        if prompt >= LONG_PROMPT:
            during = max(most, during)
        said, complaints = client.communicate(timeout=120)
    if f'"ok":{streams},' not in said:
        raise BenchError(f"not all streams were whole: {complaints}{said}")
    time.sleep(2 * SETTLE_S)
    return Held(kind, streams, before, during, rss_mib(pid))


def resident(pid: int) -> float:
    """Memory of the process tree, the median of some readings."""
    readings = []
    for _ in range(10):
        readings.append(rss_mib(pid))
        time.sleep(HOLD_S / 10)
    return statistics.median(readings)


@contextlib.contextmanager
def many_files() -> Iterator[None]:
    """Lets this process and those it starts open as many files as may be, and the gateway as many connections."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 3 * STREAMS + 1_000:
        raise BenchError(f"{STREAMS} streams need {3 * STREAMS + 1_000} open files, and ulimit -Hn says {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    os.environ[LIMIT] = str(max(IDLE, STREAMS) + 100)
    try:
        yield
    finally:
        del os.environ[LIMIT]
