"""Starts and reliably ends the processes of the bench, and reads their resource use from /proc (Linux)."""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

TICK_S = 1 / os.sysconf("SC_CLK_TCK")
STOP_S = 10.0  # the most that an ordered shutdown may take before the group is killed


class BenchError(Exception):
    """The bench cannot go on. The message says what is missing or went wrong, and what to do."""


# ------------------------------------------------------------------------------------------------- start and end


@contextlib.contextmanager
def running(argv: Sequence[str], log: IO[str]) -> Iterator[subprocess.Popen[str]]:
    """Run `argv` in a process group of its own while the block runs; afterwards the whole group has ended.

    Programs beside the running interpreter (a virtualenv's `bin`) are found first.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    try:
        process = subprocess.Popen(
            argv, stdout=log, stderr=log, text=True, start_new_session=True, env={**os.environ, "PATH": path}
        )
    except OSError as error:
        raise BenchError(f"cannot start {argv[0]}: {error.strerror}; is it installed in {path}?") from error
    try:
        yield process
    finally:
        end_group(process)


def end_group(process: subprocess.Popen[str]) -> None:
    """End the process and all that it started: SIGTERM first, SIGKILL after `STOP_S` seconds."""
    signal_group(process.pid, signal.SIGTERM)
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        pass
    finally:  # also after a second Ctrl-C, which interrupts the wait
        signal_group(process.pid, signal.SIGKILL)
        process.wait()  # SIGKILL cannot be refused, but a busy machine may take some time


def signal_group(group: int, number: signal.Signals) -> None:
    """Signal a process group that this program started, if any process of it is left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


# ------------------------------------------------------------------------------------------------------- ports


def free_port() -> int:
    """A port on which nothing listens, below the ephemeral range: within that range, a poll of a closed port can
    connect to itself."""
    for port in random.sample(range(20_000, 30_000), 200):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise BenchError("no free port between 20000 and 30000 on 127.0.0.1")


def get(port: int, path: str, timeout_s: float = 2.0) -> tuple[int, bytes]:
    """Status and body of one GET on 127.0.0.1. Raises OSError or HTTPException when there is no answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        connection.request("GET", path, headers={"Connection": "close"})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def wait_ready(process: subprocess.Popen[str], port: int, path: str, timeout_s: float = 60.0) -> float:
    """Poll `path` until it answers 200; returns the seconds that took. Raises BenchError if the process ends first."""
    start = time.monotonic()
    seen = "no answer"
    while (waited := time.monotonic() - start) < timeout_s:
        if process.poll() is not None:
            raise BenchError(f"it ended with status {process.returncode} before it was ready")
        try:
            status, _ = get(port, path)
        except (OSError, http.client.HTTPException) as error:
            seen = f"no answer ({error})"
        else:
            if status == 200:
                return time.monotonic() - start
            seen = f"status {status}"
        time.sleep(0.01)
    raise BenchError(f"GET {path} on port {port} did not become 200 in {waited:.0f} s; last: {seen}")


# ------------------------------------------------------------------------------------------------ CPU and memory


def tree(pid: int) -> Iterator[int]:
    """The process and its living descendants."""
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in children.read_text().split():
                yield from tree(int(child))


def cpu_seconds(pid: int) -> float:
    """CPU seconds, user and kernel, that the process tree has used so far."""
    return sum(_cpu_seconds_of_one(member) for member in tree(pid))


def _cpu_seconds_of_one(pid: int) -> float:
    # stat counts ended threads and ended children too, but in steps of 10 ms, which is coarse for a short run of nginx;
    # schedstat counts in ns, but only living threads. Each can only be too small, so the larger is taken.
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0  # it has just ended; its CPU time is in its parent's count
    own = (int(fields[11]) + int(fields[12])) * TICK_S
    ended_children = (int(fields[13]) + int(fields[14])) * TICK_S
    return max(own, _scheduled_seconds(pid)) + ended_children


def _scheduled_seconds(pid: int) -> float:
    total_ns = 0
    for thread in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):
            total_ns += int(thread.read_text().split()[0])
    return total_ns / 1e9


def rss_mib(pid: int) -> float:
    """Resident memory of the process tree in MiB; pages shared between its processes count once for each."""
    return sum(_rss_kib_of_one(member) for member in tree(pid)) / 1024


def _rss_kib_of_one(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:")), 0)
