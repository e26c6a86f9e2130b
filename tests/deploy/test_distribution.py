"""What is in the distributions: enough to run, and in the source one enough to test."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_the_project_says_what_it_needs_to_be_built_and_what_it_is() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["build-system"]["requires"] == ["setuptools>=77"]
    assert "Typing :: Typed" in project["project"]["classifiers"]
    assert not [name for name in project["project"]["classifiers"] if name.startswith("License ::")]
    assert (ROOT / "proxy" / "pd_proxy" / "py.typed").exists()


@pytest.mark.slow
def test_the_source_distribution_holds_every_file_of_the_checkout(tmp_path: Path) -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("this is no checkout")
    files = listed.stdout.split("\n")[:-1]
    source = tmp_path / "src"
    for name in files:  # a copy, since building leaves files behind
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    program = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", program, tmp_path], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    with tarfile.open(tmp_path / done.stdout.splitlines()[-1]) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {name for name in files if (ROOT / name).is_file()} - held == set()
