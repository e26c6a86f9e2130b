"""The gateway under test: `pd-proxy serve` as its user starts it, in a process of its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from .metrics import series
from .processes import Group, ended, free_port, wait_until

READY_SECONDS = 90.0  # /ready waits for a first hand-off, and a first connection may take half a minute (UCX)
STOP_SECONDS = 20.0
COMMAND = Path(sys.executable).with_name("pd-proxy")
"""The console script beside the Python that runs pytest."""


@dataclass(frozen=True, slots=True)
class Gateway:
    url: str
    group: Group

    def is_ready(self) -> bool:
        """Whether /ready answers 200 now. Raises RuntimeError where the gateway's process has ended."""
        self.group.check_alive()
        try:
            return httpx.get(f"{self.url}/ready", timeout=2).status_code == 200
        except httpx.TransportError:
            return False

    def metrics(self) -> dict[str, float]:
        """The gateway's own series, without the `pd_proxy_` prefix: `{'resumes_total{reason="cut"}': 1.0}`."""
        return series(httpx.get(f"{self.url}/metrics", timeout=10).raise_for_status().text, "pd_proxy_")


@contextmanager
def serving(prefill_url: str, decode_urls: str | Sequence[str], log: Path, *flags: str) -> Iterator[Gateway]:
    """A gateway in front of one prefill engine and one or more decode engines, from readiness to its end by SIGTERM.

    Arguments:
        flags: settings as on the command line, `--timeouts.idle 2` as two arguments.
    Raises:
        RuntimeError: it ended before it was ready.
        TimeoutError: it was not ready within `READY_SECONDS`.
        AssertionError: it did not end with exit code 0 within `STOP_SECONDS` of SIGTERM.
    """
    port = free_port()
    command = [str(COMMAND), "serve", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--prefill", prefill_url, *flags]
    for url in [decode_urls] if isinstance(decode_urls, str) else decode_urls:
        command += ["--decode", url]
    with ended(Group(command, log), STOP_SECONDS) as group:
        gateway = Gateway(f"http://127.0.0.1:{port}", group)
        wait_until(gateway.is_ready, READY_SECONDS, f"{gateway.url}/ready to answer 200, log {log}")
        yield gateway
        code = group.stop(STOP_SECONDS)
        assert code == 0, f"SIGTERM ended the gateway with {code}; log {log} ends with:\n{group.log_tail()}"
