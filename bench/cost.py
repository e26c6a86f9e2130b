"""Measures one gateway, or nginx, under one load: mock engines behind it, the load client before it."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench import load
from bench.cases import Case
from bench.process import BenchError, cpu_seconds, free_port, get, rss_mib, running, wait_ready

SETTLE_S = 0.5  # after it reports ready: start-up work ends before CPU is read

NGINX_CONF = """
{user}worker_processes 1; daemon off; pid {folder}/pid; error_log {folder}/error.log; worker_rlimit_nofile 16384;
events {{ worker_connections 8192; }}
http {{
  access_log off; keepalive_requests 1000000;
  client_max_body_size 64m; client_body_buffer_size 1m; client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fcgi; uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  upstream decode {{ server 127.0.0.1:{decode}; keepalive 1024; keepalive_requests 1000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://decode; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_buffering off; proxy_read_timeout 600;
    }}
  }}
}}
"""


@dataclass(frozen=True, slots=True)
class Contender:
    """A gateway to measure.

    Arguments:
        name: its name in the report.
        command: its command line, in which {port}, {prefill} and {decode} are filled in (the last two are URLs).
        ready_path: the path that answers 200 once it accepts requests.
    """

    name: str
    command: str
    ready_path: str = "/ready"


NGINX = Contender("nginx", "", "/health")  # its command line needs a configuration file: see nginx_argv

PEERS = (
    # The flags are those of vllm-project/router's scripts for a NIXL pair on one machine.
    Contender(
        "vllm-router",
        "vllm-router --vllm-pd-disaggregation --policy round_robin --prefill {prefill} --decode {decode}"
        " --host 127.0.0.1 --port {port} --intra-node-data-parallel-size 1",
        "/health",
    ),
)


@dataclass(frozen=True, slots=True)
class Measurement:
    """The cost of one run of one case. Times are in microseconds unless the name says seconds; memory is in MiB.

    The CPU time is that of the gateway's whole process tree; `handed_off` is how many decode legs carried a hand-off.
    """

    cpu_per_token: float
    cpu_per_request: float
    token_delay_p50: float
    token_delay_p99: float
    ttft_p50: float
    ttft_p99: float
    tokens_per_s: float
    requests_per_s: float
    ok: float
    failed: float
    handed_off: float
    rss: float
    idle_rss: float
    ready_seconds: float
    run_seconds: float
    client_cpu_seconds: float


def nginx_path() -> str:
    """The path of nginx, which Debian installs outside a user's PATH. Raises BenchError, which says how to install
    it."""
    path = shutil.which("nginx", path=os.environ.get("PATH", "") + os.pathsep + "/usr/sbin")
    if path is None:
        raise BenchError("nginx, with which every gateway is compared, is not installed: apt-get install nginx-light")
    return path


def nginx_argv(folder: Path, port: int, decode_port: int) -> list[str]:
    """The command of nginx as a plain reverse proxy of the decode engine, configured in `folder`."""
    user = "user root;\n" if os.geteuid() == 0 else ""  # otherwise its worker could not enter the temporary folder
    configuration = folder / "nginx.conf"
    configuration.write_text(NGINX_CONF.format(user=user, folder=folder, port=port, decode=decode_port))
    return [nginx_path(), "-e", str(folder / "error.log"), "-c", str(configuration)]


def gateway_argv(contender: Contender, folder: Path, port: int, prefill_port: int, decode_port: int) -> list[str]:
    """The contender's command in front of the two engines."""
    if contender is NGINX:
        return nginx_argv(folder, port, decode_port)
    filled = contender.command
    for name, value in (
        ("{port}", str(port)),
        ("{prefill}", f"http://127.0.0.1:{prefill_port}"),
        ("{decode}", f"http://127.0.0.1:{decode_port}"),
    ):
        filled = filled.replace(name, value)  # not str.format: a command may hold JSON
    return shlex.split(filled)


@contextlib.contextmanager
def engine(program: Path, case: Case, folder: Path) -> Iterator[int]:
    """Run a mock engine for this case while the block runs; yields its port."""
    port = free_port()
    argv = load.engine_argv(program, port, case)
    with (folder / f"engine-{port}.log").open("w") as log, running(argv, log) as process:
        wait_ready(process, port, "/health", 10)
        yield port


def measure(program: Path, contender: Contender, case: Case) -> Measurement:
    """Start engines and contender afresh, run the case once and end them all."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pd-proxy-bench.")))
        prefill = stack.enter_context(engine(program, case, folder))
        decode = stack.enter_context(engine(program, case, folder))
        port, log_path = free_port(), folder / "gateway.log"
        log = stack.enter_context(log_path.open("w"))
        argv = gateway_argv(contender, folder, port, prefill, decode)
        process = stack.enter_context(running(argv, log))
        try:
            ready_seconds = wait_ready(process, port, contender.ready_path)
            measurement = observe(program, process.pid, port, decode, case, ready_seconds)
        except BenchError as error:
            raise BenchError(f"{contender.name} ({shlex.join(argv)}): {error}\n{last_lines(log_path)}") from error
        if measurement.failed:
            print(f"{measurement.failed:.0f} requests failed; its log ends with:", file=sys.stderr)
            print(last_lines(log_path), file=sys.stderr)
        return measurement


def observe(program: Path, pid: int, port: int, decode: int, case: Case, ready_seconds: float) -> Measurement:
    """Run the case against a gateway that is ready.

    Arguments:
        pid: the gateway's first process.
        port: where the gateway listens.
        decode: where the decode engine listens.
        ready_seconds: how long its start took; it is recorded with the rest.
    """
    time.sleep(SETTLE_S)
    idle_rss = rss_mib(pid)
    warm_up(program, port, case)
    handed_off, cpu, start = counted(decode)["handed_off"], cpu_seconds(pid), time.monotonic()
    report = load.drive(program, port, case)
    spent_us, run_seconds = (cpu_seconds(pid) - cpu) * 1e6, time.monotonic() - start
    return Measurement(
        cpu_per_token=spent_us / max(1, report["tokens"]),
        cpu_per_request=spent_us / max(1, report["ok"]),
        token_delay_p50=report["token_delay_us"]["p50"],
        token_delay_p99=report["token_delay_us"]["p99"],
        ttft_p50=report["ttft_us"]["p50"],
        ttft_p99=report["ttft_us"]["p99"],
        tokens_per_s=report["tokens_per_s"],
        requests_per_s=report["requests_per_s"],
        ok=report["ok"],
        failed=report["bad"] + report["unfinished"],
        handed_off=counted(decode)["handed_off"] - handed_off,
        rss=rss_mib(pid),
        idle_rss=idle_rss,
        ready_seconds=ready_seconds,
        run_seconds=run_seconds,
        client_cpu_seconds=report["client_cpu_s"],
    )


def warm_up(program: Path, port: int, case: Case) -> None:
    """Send a few short requests of the same kind, so that one-time work is not measured."""
    load.drive(program, port, replace(case, concurrency=16, requests=64, tokens=2), timeout_s=30)


def counted(engine_port: int) -> dict[str, Any]:
    """The counters of a mock engine since its start."""
    counts: dict[str, Any] = json.loads(get(engine_port, "/counted")[1])
    return counts


def last_lines(log: Path, count: int = 15) -> str:
    """The end of a log, for an error message."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-count:])


def rounds(program: Path, contenders: Sequence[Contender], case: Case, count: int) -> dict[str, list[Measurement]]:
    """Measure each contender `count` times, in turn, so that a slow minute of the machine affects all of them.

    Every other round has the opposite order, so that no contender is always first.
    """
    measured: dict[str, list[Measurement]] = {contender.name: [] for contender in contenders}
    for number in range(count):
        for contender in contenders if number % 2 == 0 else reversed(contenders):
            print(f"{case.name}: round {number + 1} of {count}: {contender.name}", file=sys.stderr, flush=True)
            load_of_it = case.for_nginx() if contender is NGINX else case
            measured[contender.name].append(measure(program, contender, load_of_it))
    return measured
