"""The notes of a release are its section of CHANGELOG.md."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from pd_proxy import __version__

ROOT = Path(__file__).resolve().parents[2]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()


def notes(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "deploy/release_notes.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_version_has_its_section_and_no_other_ones() -> None:
    done = notes("0.2.0")
    assert done.returncode == 0
    assert done.stdout.strip() in CHANGELOG
    assert done.stdout.startswith("### Added")
    assert "\n## " not in done.stdout
    assert notes("v0.2.0").stdout == done.stdout


def test_without_a_version_the_notes_are_those_of_the_newest() -> None:
    newest = CHANGELOG.split("\n## ")[1].partition("\n")[2].strip()
    assert notes().stdout.strip() == newest


def test_this_version_has_notes() -> None:
    assert notes(__version__).returncode == 0


def test_an_unknown_version_is_named_with_the_known_ones() -> None:
    done = notes("9.9.9")
    assert done.returncode == 1
    assert "no version 9.9.9; it has " in done.stderr
    assert __version__ in done.stderr
