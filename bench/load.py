"""Builds and runs the load program (load*.c): mock engines and the client that drives a gateway."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.cases import Case
from bench.process import BenchError

HERE = Path(__file__).resolve().parent
SOURCES = tuple(sorted(HERE.glob("load*.c")))
CACHE = HERE.parent / ".cache" / "bench"
FLAGS = ("-O2", "-std=gnu11", "-Wall", "-Wextra")
_OPTIONS = ("concurrency", "requests", "tokens", "prompt_bytes", "rate", "differ_at", "prefixes", "first")
"""Fields of a case that are options of the client."""


def build(folder: Path = CACHE, flags: tuple[str, ...] = FLAGS) -> Path:
    """Compile the load program into `folder` unless it is newer there than its sources; returns its path."""
    program = folder / "load"
    newest = max(path.stat().st_mtime for path in (*SOURCES, HERE / "load.h"))
    if program.exists() and program.stat().st_mtime > newest:
        return program
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise BenchError("no C compiler found; install one: apt-get install gcc libc6-dev")
    folder.mkdir(parents=True, exist_ok=True)
    # Compiled under another name and then moved, so that two benches at the same time never run an incomplete program.
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        built = Path(aside) / "load"
        done = subprocess.run([compiler, *flags, "-o", built, *SOURCES], capture_output=True, text=True)
        if done.returncode:
            raise BenchError(f"{compiler} did not compile the load program:\n{done.stderr}")
        built.replace(program)
    return program


def engine_argv(program: Path, port: int, case: Case) -> list[str]:
    """The command of a mock engine for this case."""
    load = ["--tick-us", str(case.tick_us), "--prefill-us", str(case.prefill_us), "--pad-bytes", str(case.pad_bytes)]
    return [str(program), "engine", "--port", str(port), *load]


def drive(program: Path, port: int, case: Case, timeout_s: int = 120) -> dict[str, Any]:
    """Run the case's load against 127.0.0.1:`port` to its end; returns the client's report (times in microseconds)."""
    argv = [str(program), "client", "--port", str(port), "--timeout-s", str(timeout_s)]
    for option in _OPTIONS:
        argv += ["--" + option.replace("_", "-"), str(getattr(case, option))]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=timeout_s + 30)
    if done.returncode:
        raise BenchError(f"the load client ended with status {done.returncode}: {done.stderr.strip()}")
    sys.stderr.write(done.stderr)  # describes the first bad answer
    report: dict[str, Any] = json.loads(done.stdout)
    return report
