"""The systemd units, as `systemd-analyze` reads them without a running systemd."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SERVICE = ROOT / "deploy" / "systemd" / "pd-proxy@.service"


def options() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in SERVICE.read_text().splitlines():
        name, sign, value = line.partition("=")
        if sign and not line.startswith("#"):
            found.setdefault(name, []).append(value)
    return found


def test_the_service_reads_variables_if_there_are_any_and_reloads_by_sighup() -> None:
    unit = options()
    assert unit["EnvironmentFile"] == ["-/etc/pd-proxy/environment"]
    assert unit["ExecReload"] == [
        "/opt/pd-proxy/bin/pd-proxy check /etc/pd-proxy/pd-proxy.yaml",
        "/bin/kill -HUP $MAINPID",
    ]
    assert unit["Type"] == ["notify"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_the_services_exposure_score_is_the_one_in_the_docs() -> None:
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(SERVICE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    measured = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
    if measured is None:
        pytest.skip(f"this systemd-analyze cannot judge a file: {done.stderr[:200]}")
    told = re.search(r"exposure of ([0-9.]+)", (ROOT / "docs" / "operating.md").read_text().replace("\n", " "))
    assert told is not None
    # The weights of the score differ a little between versions of systemd.
    assert float(measured[1]) <= float(told[1]) + 0.5
