"""`bench.instructions` counts the gateway's work on requests."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from bench import instructions


@pytest.mark.parametrize("flags", [[], ["resume=off"], ["long"], ["flood"], ["big", "resume=off"]])
@pytest.mark.slow
def test_the_counted_process_serves_its_requests_and_ends(flags: list[str]) -> None:
    command = [sys.executable, "-m", "bench.instructions", *flags]
    subprocess.run(command, env={**os.environ, "COUNTED_REQUESTS": "3 10"}, timeout=60, check=True)


def test_without_valgrind_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert instructions.main([]) == 2
    assert "apt-get install valgrind" in capsys.readouterr().err
