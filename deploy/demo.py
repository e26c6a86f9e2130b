"""The demonstration behind `make demo`: simulated pools, the gateway before them, one streamed chat completion.

It runs until Ctrl-C or SIGTERM; with --once it ends after the answer. It always ends every process that it started.
It runs the ordinary commands `pd-proxy simulate` and `pd-proxy serve`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import httpx

PD_PROXY = str(Path(sys.executable).with_name("pd-proxy"))
HOST = "127.0.0.1"
MODEL = "demo-model"
POOLS = (("prefill", 2), ("decode", 2))
QUESTION = "Why do prefill and decode run on separate engines?"
TOKENS = 96
START_SECONDS = 60.0  # generous: five Python processes start at once, perhaps on a small machine
STOP_SECONDS = 10.0  # the gateway lets running requests finish for 2 s and then exits; engines exit at once


class DemoError(Exception):
    """The demonstration cannot continue; the message says why and what to do."""


class Ended(BaseException):
    """A signal that ends the demonstration was received."""


class Processes:
    """The processes of the demonstration, as a context: none of them runs after its end."""

    def __init__(self) -> None:
        self._running: list[tuple[str, subprocess.Popen[str]]] = []
        self._held = False
        self._asked = False

    def __enter__(self) -> Processes:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._signalled)
        return self

    def __exit__(self, *_: object) -> None:
        self._held = True
        for _name, process in reversed(self._running):  # the gateway first, so that it does not lose backends
            process.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        for name, process in reversed(self._running):
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                print(f"{name} (pid {process.pid}) did not leave within {STOP_SECONDS:g} s and is killed")
                process.kill()
                process.wait()

    def start(self, name: str, argv: list[str], log: Path | None = None) -> subprocess.Popen[str]:
        """Start a process.

        Arguments:
            log: where its output goes; None for this terminal.
        """
        # The demonstration shows the defaults, so settings that this shell exports for another gateway are removed.
        environment = {key: value for key, value in os.environ.items() if not key.upper().startswith("PD_PROXY_")}
        with contextlib.ExitStack() as stack, self._signals_held():
            output = stack.enter_context(log.open("w")) if log else None
            # In a session of its own, since Ctrl-C reaches all of a terminal's processes, and the order matters.
            process = subprocess.Popen(  # noqa: S603 - the demonstration's own command lines
                argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=True,
                text=True,
            )
            self._running.append((name, process))
        return process

    def take_ended(self) -> list[tuple[str, int]]:
        """Names and exit statuses of the processes that have ended since the last call."""
        ended = [(name, process.returncode) for name, process in self._running if process.poll() is not None]
        self._running = [(name, process) for name, process in self._running if process.returncode is None]
        return ended

    @contextlib.contextmanager
    def _signals_held(self) -> Iterator[None]:
        """Hold signals back: a process that is started but not listed yet would be left running."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._asked:
            raise Ended

    def _signalled(self, _number: int, _frame: FrameType | None) -> None:
        self._asked = True
        if not self._held:
            self._held = True  # a second signal must not interrupt the clean-up
            raise Ended


def main() -> int:
    """Run the demonstration; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8000, help="the gateway's port; 0: any (default: %(default)s)")
    parser.add_argument("--connector", default="nixl", help="the connector of the engines (default: %(default)s)")
    parser.add_argument("--once", action="store_true", help="end after the answer")
    arguments = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    try:
        with tempfile.TemporaryDirectory(prefix="pd-proxy-demo-") as logs, Processes() as processes:
            demonstrate(processes, arguments.port, arguments.connector, Path(logs), once=arguments.once)
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except Ended:
        print("\ndemo: asked to end; nothing was left running")
    return 0


def demonstrate(processes: Processes, port: int, connector: str, logs: Path, *, once: bool) -> None:
    """Start everything, stream one answer, and print what to try next. Raises DemoError."""
    port = free_port(port)
    pools = start_engines(processes, connector, logs)
    url = start_gateway(processes, pools, connector, port)
    with httpx.Client(base_url=url, timeout=START_SECONDS, trust_env=False) as client:
        wait_until_ready(client, processes)
        stream_one(client)
        print(f"It was {handed_over(client)}, with the connector {connector}.")
    print(where_to_go_on(url))
    if once:
        return
    print("The demo stays up. Ctrl-C ends it.")
    stay(processes)


def free_port(port: int) -> int:
    """The port, or a free one for 0. Raises DemoError where the gateway could not listen on it."""
    try:
        with socket.create_server((HOST, port)) as listener:
            return int(listener.getsockname()[1])
    except (OSError, OverflowError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        other = 8001 if port == 8000 else 8000
        raise DemoError(f"port {port} cannot be used ({reason}). Choose another: make demo PORT={other}") from None


def start_engines(processes: Processes, connector: str, logs: Path) -> dict[str, list[str]]:
    """Start the simulated engines on free ports; returns their URLs by role."""
    started = []
    for role, count in POOLS:
        for number in range(1, count + 1):
            name, log = f"{role}-{number}", logs / f"{role}-{number}.log"
            argv = [PD_PROXY, "simulate", "--role", role, "--port", "0", "--model", MODEL, "--connector", connector]
            started.append((role, name, log, processes.start(name, argv, log)))
    pools: dict[str, list[str]] = {role: [] for role, _ in POOLS}
    for role, name, log, process in started:
        url = listening_url(name, log, process)
        pools[role].append(url)
        print(f"{name:10} {url}   a simulated vLLM engine, pid {process.pid}")
    return pools


def listening_url(name: str, log: Path, process: subprocess.Popen[str]) -> str:
    """The URL that the engine prints when it listens. Raises DemoError."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        text = log.read_text()
        if "listening on " in text and text.endswith("\n"):
            return text.partition("listening on ")[2].split()[0]
        if process.poll() is not None:
            raise DemoError(f"{name} ended with status {process.returncode}: {text.strip()}")
        time.sleep(0.05)
    raise DemoError(f"{name} did not start within {START_SECONDS:g} s")


def start_gateway(processes: Processes, pools: dict[str, list[str]], connector: str, port: int) -> str:
    """Start the gateway; returns its URL."""
    flags = [part for role, urls in pools.items() for url in urls for part in (f"--{role}", url)]
    flags += ["--connector", connector] if connector != "nixl" else []  # which is the default
    command = ["serve", "--host", HOST, "--port", str(port), *flags, "--shutdown.grace", "2"]
    print(f"\n$ pd-proxy {' '.join(command)}")
    processes.start("gateway", [PD_PROXY, *command])
    return f"http://{HOST}:{port}"


def wait_until_ready(client: httpx.Client, processes: Processes) -> None:
    """Wait until `/ready` is 200. Raises DemoError."""
    deadline, last = time.monotonic() + START_SECONDS, "no answer"
    while time.monotonic() < deadline:
        for name, status in processes.take_ended():
            raise DemoError(f"{name} ended with status {status} while it started")
        try:
            answer = client.get("/ready", timeout=2)
            if answer.status_code == 200:
                return
            last = answer.text
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise DemoError(f"the gateway was not ready within {START_SECONDS:g} s: {last}")


def stream_one(client: httpx.Client) -> None:
    """Stream a chat completion to the terminal, and print its latencies. Raises DemoError."""
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": TOKENS,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    print(f"\nPOST /v1/chat/completions: {QUESTION}\n(The engines are simulated: the words are drawn by chance.)\n")
    arrivals: list[float] = []
    tokens = 0
    began = time.perf_counter()
    try:
        with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            if answer.status_code != 200:
                raise DemoError(f"the gateway answered {answer.status_code}: {answer.read().decode()}")
            for event in events(answer.iter_lines()):
                if usage := event.get("usage"):
                    tokens = usage["completion_tokens"]
                for choice in event["choices"]:
                    if text := choice["delta"].get("content"):
                        arrivals.append(time.perf_counter())
                        print(text, end="", flush=True)
    except httpx.HTTPError as error:
        raise DemoError(f"the stream broke after {len(arrivals)} tokens: {error}") from None
    print("\n")
    if len(arrivals) < 2 or tokens < 2:
        raise DemoError("the stream ended without an answer")
    ttft = arrivals[0] - began
    tpot = (arrivals[-1] - arrivals[0]) / (tokens - 1)
    print(f"TTFT {ttft * 1000:.0f} ms, then {1 / tpot:.1f} tokens/s ({tokens} tokens, TPOT {tpot * 1000:.1f} ms)")


def handed_over(client: httpx.Client) -> str:
    """How the answer was made, by the gateway's own metrics."""
    samples = client.get("/metrics").text.splitlines()
    fallbacks = {line for line in samples if line.startswith("pd_proxy_fallbacks_total{") and not line.endswith(" 0.0")}
    if not fallbacks:
        return "prefilled by one engine and decoded by another"
    return f"served without a hand-off ({', '.join(sorted(fallbacks))})"


def events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The chunks in a stream of server-sent events. Raises DemoError for an error event."""
    for line in lines:
        if not line.startswith("data:") or line.endswith("[DONE]"):
            continue
        event = json.loads(line.removeprefix("data:"))
        if "error" in event:
            raise DemoError(f"the stream ended with an error: {event['error']}")
        yield event


def where_to_go_on(url: str) -> str:
    """Commands to copy, and where to find more."""
    return f"""
Try it:

  curl -N {url}/v1/chat/completions -H 'content-type: application/json' \\
    -d '{{"model": "{MODEL}", "stream": true, "max_tokens": 32, "messages": [{{"role": "user", "content": "Hello"}}]}}'

  from openai import OpenAI
  client = OpenAI(base_url="{url}/v1", api_key="none")
  for chunk in client.chat.completions.create(
      model="{MODEL}", stream=True, max_tokens=32, messages=[{{"role": "user", "content": "Hello"}}]
  ):
      print(chunk.choices[0].delta.content or "", end="", flush=True)

Kill a decode engine (its pid is above) and ask again: the other one answers.

Metrics      {url}/metrics
API          {url}/openapi.json
Documents    docs/ and README.md
"""


def stay(processes: Processes) -> None:
    """Wait for a signal. Prints which engines end meanwhile. Raises DemoError where the gateway ends."""
    while True:
        for name, status in processes.take_ended():
            if name == "gateway":
                raise DemoError(f"the gateway ended with status {status}")
            print(f"demo: {name} ended (status {status}); the gateway continues with the rest of its pool")
        time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(main())
