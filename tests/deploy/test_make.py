"""The Makefile and its helper, up to where they would install something."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
TARGETS = {
    *("help", "install", "demo", "test", "test-all", "test-random", "test-real", "test-versions", "soak"),
    *("coverage", "lint", "types", "bench", "constraints", "release-notes", "clean"),
}
needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def program(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def make_venv(folder: Path, python: str | Path, *more: Path) -> subprocess.CompletedProcess[str]:
    """Run deploy/venv.sh with the programs in `folder` before all others on the PATH."""
    return subprocess.run(
        [ROOT / "deploy" / "venv.sh", folder / "venv"],
        env={"PATH": ":".join(map(str, (folder, *more, "/usr/bin", "/bin"))), "PYTHON": str(python)},
        capture_output=True,
        text=True,
    )


def make(*arguments: str) -> str:
    """The output of make. The flags that `make test` passes to the programs it starts are removed: they are not for
    this make."""
    foreign = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")
    environment = {name: value for name, value in os.environ.items() if name not in foreign}
    done = subprocess.run(["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_make
def test_make_without_a_target_prints_the_help_which_names_every_target() -> None:
    assert set(re.findall(r"^  ([a-z-]+) ", make(), re.MULTILINE)) == TARGETS


@needs_make
@pytest.mark.parametrize("target", sorted(TARGETS - {"help"}))
def test_every_target_can_be_made(target: str) -> None:
    assert make("-n", target) != ""


@needs_make
def test_the_whole_suite_excludes_real_engines_and_the_everyday_suite_also_excludes_slow_tests() -> None:
    assert '-m "not real"' in make("-n", "test-all").splitlines()[-1]
    assert '-m "not real and not slow"' in make("-n", "test").splitlines()[-1]


@needs_make
def test_pre_commit_hooks_run_what_the_targets_run() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert {repo["repo"] for repo in hooks} == {"local"}
    entries = {hook["id"]: hook["entry"] for repo in hooks for hook in repo["hooks"]}
    linted, typed = make("-n", "lint"), make("-n", "types")
    assert entries["lint"].replace(" --force-exclude", "") in linted
    assert entries["format"].replace(" --force-exclude", "") in linted
    assert entries["types"] in typed
    for entry in entries.values():
        files = [word for word in entry.split() if word.endswith(".py")]
        assert [file for file in files if not (ROOT / file).exists()] == []


@needs_make
def test_every_python_that_is_named_is_tested() -> None:
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    named = [name.rpartition(" ")[2] for name in classifiers if re.fullmatch(r"Programming .* :: 3\.\d+", name)]
    assert named[0] == "3.11"
    pattern = re.search(r"sed -nE '(.*)' pyproject.toml", (ROOT / "deploy" / "test_versions.sh").read_text())
    assert pattern is not None
    found = subprocess.run(
        ["sed", "-nE", pattern[1], ROOT / "pyproject.toml"], capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == named


@needs_make
def test_random_examples_come_from_a_seed_that_is_printed_and_may_be_given() -> None:
    asked = make("-n", "test-random", "SEED=7")
    assert "PROPERTIES=random" in asked and "--hypothesis-seed=$seed" in asked


def test_an_old_python_is_refused_with_the_command_to_type(tmp_path: Path) -> None:
    # Answers the two questions as Python 3.9 would: its version, and whether it is recent enough.
    old = program(tmp_path / "python3", 'case "$2" in *print*) echo 3.9 ;; *) exit 1 ;; esac')
    done = make_venv(tmp_path, old)
    assert done.returncode == 1
    assert (
        done.stderr
        == f"{old} is Python 3.9 and pd-proxy needs 3.11 or newer; name another with: make PYTHON=python3.11 ...\n"
    )


def test_a_missing_python_is_named(tmp_path: Path) -> None:
    done = make_venv(tmp_path, "python-that-is-not-there")
    assert done.returncode == 1
    assert "No python-that-is-not-there found" in done.stderr


def python_built(path: Path, *, optimised: bool) -> Path:
    """A Python in a folder of its own that reports a build with optimisations, or without."""
    path.mkdir()
    unoptimised = f'case "$2" in *CONFIG_ARGS*) exit {int(optimised)} ;; esac'
    return program(path / "python3", f'{unoptimised}\nexec {sys.executable} "$@"')


@pytest.mark.slow
def test_an_optimised_python_is_preferred_unless_one_is_named(tmp_path: Path) -> None:
    slow, quick = (python_built(tmp_path / name, optimised=name == "quick") for name in ("slow", "quick"))
    found = make_venv(slow.parent, "", quick.parent)
    assert found.returncode == 0, found.stderr
    assert f"{slow} was built without optimisations, so {quick} is taken" in found.stdout
    assert (slow.parent / "venv" / "bin" / "python").exists()
    named = make_venv(quick.parent, slow)
    assert named.returncode == 0, named.stderr
    assert "optimisations" not in named.stdout


@pytest.fixture
def debian(tmp_path: Path) -> Path:
    """A folder of programs as on Debian: its Python 3.12 lacks ensurepip until apt-get has installed it."""
    program(tmp_path / "apt-get", f'echo "apt-get $*" >>{tmp_path}/asked')
    program(
        tmp_path / "python3",
        f"""case "$2" in
            *print*) echo 3.12 ;;
            *ensurepip*) grep -q python3.12-venv {tmp_path}/asked 2>/dev/null ;;
            venv) exec {sys.executable} "$@" ;;
        esac""",
    )
    return tmp_path


@pytest.mark.slow
def test_without_ensurepip_root_gets_debians_package_without_questions(debian: Path) -> None:
    program(debian / "id", "echo 0")
    done = make_venv(debian, "python3")
    assert done.returncode == 0, done.stderr
    assert (debian / "asked").read_text().splitlines() == [
        "apt-get update -qq",
        "apt-get install -y --no-install-recommends python3.12-venv -qq",
    ]
    assert os.access(debian / "venv" / "bin" / "python", os.X_OK)


def test_without_ensurepip_other_users_are_told_what_to_type(debian: Path) -> None:
    program(debian / "id", "echo 1000")
    done = make_venv(debian, "python3")
    assert done.returncode == 1
    assert "  sudo apt-get install -y --no-install-recommends python3.12-venv" in done.stderr
    assert not (debian / "asked").exists()


@pytest.mark.slow
def test_a_virtual_environment_that_works_is_kept(debian: Path) -> None:
    program(debian / "id", "echo 0")
    make_venv(debian, "python3")
    mark = debian / "venv" / "mark"
    mark.touch()
    assert make_venv(debian, "python-that-is-not-there").returncode == 0
    assert mark.exists()
