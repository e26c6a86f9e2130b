"""Memory that long prompts free is reused for the next ones."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

_FAULTS = """
import resource, sys
from pd_proxy.runtime import heap
if sys.argv[1] == "kept":
    heap.keep_free_memory()
def bodies():
    held = [bytearray(b"x" * 400_000) for _ in range(8)]
    held.clear()
for _ in range(20):
    bodies()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    bodies()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's heap is told")
def test_repeated_bodies_cause_no_page_faults_with_a_kept_heap() -> None:
    faults = {}
    for how in ("by itself", "kept"):
        command = [sys.executable, "-c", _FAULTS, how]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        faults[how] = int(done.stdout)
    assert faults["kept"] < 50, faults
    assert faults["by itself"] > 1000, faults
