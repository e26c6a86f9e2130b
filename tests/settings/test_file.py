"""Reading a settings file, and starting without one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pd_proxy.settings.file import read_file


def test_lines_are_noted_for_every_name(tmp_path: Path) -> None:
    path = tmp_path / "gateway.yaml"
    path.write_text("# top\nport: 1\ntimeouts:\n  # inner\n  idle: 2\ndecode:\n  - a:1\n  - b:1\n")
    file = read_file(path)
    assert file.values == {"port": 1, "timeouts": {"idle": 2}, "decode": ["a:1", "b:1"]}
    assert file.lines == {
        "port": 2,
        "timeouts": 3,
        "timeouts.idle": 5,
        "decode": 6,
        "decode.0": 7,
        "decode.1": 8,
    }


@pytest.mark.slow
def test_a_gateway_without_a_settings_file_does_not_import_yaml() -> None:
    said = "import sys, pd_proxy.cli, pd_proxy.process; pd_proxy.cli.gather({}); print('yaml' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "False\n"
