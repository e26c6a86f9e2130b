"""Processes of the real tests: each in a process group of its own, with a log, and always ended.

Invariant: nothing outlives a test run; a block of `started` leaves no process behind.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

LOGS: list[Path] = []
"""Every log that was opened in this run; conftest.py names them under a failed test."""


def free_port() -> int:
    """A loopback port that nothing listens on, outside the range from which the kernel chooses ports.

    An engine binds its ports up to a minute after this choice, and by then the other engines have opened a dozen random
    ports each: a port of the kernel's own range would sometimes be taken.
    """
    kernel_low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.randrange(10_000, max(kernel_low, 20_000))
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Check every 50 ms until `condition` holds.

    Raises:
        TimeoutError: it did not hold within `seconds`; the message names `what` was waited for.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:g} s in vain for: {what}")
        time.sleep(0.05)


class Group:
    """A child process, its process group and its log."""

    def __init__(self, command: Sequence[str], log: Path, extra_environment: Mapping[str, str] | None = None) -> None:
        self.log = log
        LOGS.append(log)
        log.write_bytes(b"")
        self._command = command
        self._environment = {**os.environ, **(extra_environment or {})}
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as output:
            return subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )

    def start_again(self) -> None:
        """Run the same command again after it has ended; its log is continued."""
        assert self.process.poll() is not None, f"process {self.pid} still runs"
        self.process = self._start()

    @property
    def pid(self) -> int:
        return self.process.pid

    def log_tail(self, lines: int = 40) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def logged(self, since: int = 0) -> str:
        """The content of its log from byte `since` on."""
        return self.log.read_bytes()[since:].decode(errors="replace")

    def check_alive(self) -> None:
        """Raises RuntimeError with the end of the log where the process has ended."""
        if self.process.poll() is not None:
            raise RuntimeError(f"exit code {self.process.returncode}; log {self.log} ends with:\n{self.log_tail()}")

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to every process of the group; a group that has ended is no error."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL to the whole group, and wait until its first process has ended."""
        self.signal(signal.SIGKILL)
        self.process.wait(timeout=10)

    def stop(self, seconds: float) -> int:
        """Send SIGTERM to the first process, and SIGKILL to the rest of the group after `seconds`; returns the exit
        code."""
        try:
            self.process.terminate()
            return self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return -signal.SIGKILL
        finally:
            self.kill()


@contextmanager
def ended(group: Group, seconds: float = 5.0) -> Iterator[Group]:
    """End `group` when the block is left, for any reason."""
    try:
        yield group
    finally:
        group.stop(seconds)
