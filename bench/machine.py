"""The machine, the versions and the commit on which a result depends."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

from bench.cost import nginx_path

ROOT = Path(__file__).resolve().parent.parent


def facts(command: str, rounds: int) -> dict[str, str]:
    """The lines of RESULTS.md about the source of its numbers, in order."""
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": f"`{command}` (rounds: {rounds}; the numbers are their medians)",
        "commit": commit(),
        "machine": f"{os.cpu_count()} cores, {cpu_model()}, Linux {platform.release()}",
        "versions": ", ".join(
            [
                f"Python {platform.python_version()}",
                *(f"{name} {version(name)}" for name in ("uvicorn", "uvloop", "httptools")),
                f"nginx {nginx_version()}",
            ]
        ),
    }


def output(*argv: str) -> str:
    """Standard output and error of a short command, stripped; empty if the command fails."""
    try:
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return (done.stdout + done.stderr).strip() if done.returncode == 0 else ""


def commit() -> str:
    """The checked-out commit, and whether the tree differs from it (results excepted)."""
    head = output("git", "rev-parse", "--short=12", "HEAD")
    if not head:
        return "none"
    changed = output("git", "--no-optional-locks", "status", "--porcelain", "--", ".", ":!bench/RESULTS.md")
    return head + (" with uncommitted changes" if changed else "")


def cpu_model() -> str:
    """The CPU's name as the kernel reports it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def version(package: str) -> str:
    """The version of a package in the interpreter that runs the bench, and so the default gateway."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def nginx_version() -> str:
    """The version that `nginx -v` prints."""
    return output(nginx_path(), "-v").rpartition("/")[2]
