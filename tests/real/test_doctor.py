"""`pd-proxy doctor` against real engines."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import httpx
import pytest

from .bed import Bed
from .engines import Engine
from .gateway import COMMAND
from .processes import free_port, wait_until

pytestmark = pytest.mark.real


def doctor(*flags: str) -> tuple[int, dict[str, Any]]:
    """Its exit status, and its report as JSON."""
    done = subprocess.run([COMMAND, "doctor", "--json", *flags], capture_output=True, text=True, timeout=180)
    return done.returncode, json.loads(done.stdout)


def test_engines_that_hand_over_are_good_and_no_block_stays_held(bed: Bed) -> None:
    status, said = doctor("--prefill", bed.prefill.url, "--decode", bed.decode.url)
    assert [handoff["found"] for handoff in said["handoffs"]] == ["ok"], said
    assert status < 2, said
    for engine in said["engines"]:
        assert engine["state"] == "up"
        assert engine["models"] and engine["version"] and engine["block_size"] and engine["context"]
    wait_until(bed.prefill.is_idle, 10, "prefill to free the blocks that decode has read")


def test_an_engine_that_is_not_there_is_a_fault(bed: Bed) -> None:
    status, said = doctor("--prefill", bed.prefill.url, "--decode", f"http://127.0.0.1:{free_port()}")
    assert status == 2
    assert [finding["code"] for finding in said["findings"]] == ["refused"]


def test_a_paused_engine_is_a_fault(bed: Bed, second_decode: Engine) -> None:
    httpx.post(f"{second_decode.url}/pause", params={"mode": "keep"}, timeout=30).raise_for_status()
    try:
        status, said = doctor("--prefill", bed.prefill.url, "--decode", second_decode.url)
    finally:
        httpx.post(f"{second_decode.url}/resume", timeout=30).raise_for_status()
    assert status == 2
    assert "asleep" in [finding["code"] for finding in said["findings"]], said
