"""`make demo`, started as make starts it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from bench.process import free_port

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 90.0
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not Path(sys.executable).with_name("pd-proxy").exists(), reason="pd-proxy is not installed beside this Python"
    ),
]


@contextmanager
def demo(port: int, *flags: str) -> Iterator[subprocess.Popen[str]]:
    argv = [sys.executable, "deploy/demo.py", "--port", str(port), *flags]
    # A setting for another gateway must not reach this one.
    environment = {**os.environ, "PD_PROXY_API_KEYS": "secret", "PD_PROXY_NONSENSE": "1"}
    with subprocess.Popen(
        argv, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(SECONDS)


def started_pids(text: str) -> list[int]:
    return [int(pid) for pid in re.findall(r"engine, pid (\d+)", text)]


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def is_listening(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """The output up to and including the line with the text."""
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    pytest.fail(f"the demo ended without saying {text!r}:\n{seen}")


def test_once_streams_an_answer_says_how_fast_and_leaves_nothing_running() -> None:
    port = free_port()
    with demo(port, "--once") as process:
        text, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, text
    assert re.search(r"TTFT \d+ ms, then [\d.]+ tokens/s \(96 tokens", text), text
    assert f"http://127.0.0.1:{port}/metrics" in text
    pids = started_pids(text)
    assert len(pids) == 4
    assert not any(map(is_running, pids))
    assert not is_listening(port)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl_c", "sigterm"])
def test_a_signal_ends_everything(number: signal.Signals) -> None:
    port = free_port()
    with demo(port) as process:
        seen = read_until(process, "The demo stays up")
        assert httpx.get(f"http://127.0.0.1:{port}/ready", trust_env=False, verify=False).status_code == 200
        process.send_signal(number)
        text, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, text
    assert not any(map(is_running, started_pids(seen)))
    assert not is_listening(port)


def test_a_signal_while_it_starts_leaves_nothing_running() -> None:
    port = free_port()
    with demo(port) as process:
        seen = read_until(process, "prefill-1")
        process.send_signal(signal.SIGTERM)
        text, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, text
    assert "nothing was left running" in text
    assert not any(map(is_running, started_pids(seen + text)))


def test_killing_a_decode_engine_fails_no_request() -> None:
    port = free_port()
    with demo(port) as process:
        seen = read_until(process, "The demo stays up")
        os.kill(started_pids(seen)[-1], signal.SIGKILL)
        read_until(process, "decode-2 ended")
        body = {"model": "demo-model", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
        for _ in range(4):
            answer = httpx.post(
                f"http://127.0.0.1:{port}/v1/chat/completions", json=body, trust_env=False, timeout=30, verify=False
            )
            assert answer.status_code == 200, answer.text


def test_a_taken_port_is_named_before_anything_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, demo(taken.getsockname()[1]) as process:
        text, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 1
    assert re.fullmatch(r"demo: port \d+ cannot be used \(Address already in use\). Choose another: .*\n", text), text
