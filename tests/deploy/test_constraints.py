"""constraints.txt pins what pyproject.toml requires."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PINS = {
    canonicalize_name(name): Version(version)
    for name, _, version in (
        line.partition("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
}


def direct_requirements() -> list[Requirement]:
    """The requirements of pyproject.toml, including those of the build and of all extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"].values()
    lines = [*project["build-system"]["requires"], *project["project"]["dependencies"], *(x for e in extras for x in e)]
    return [Requirement(line) for line in lines]


def test_every_line_is_a_name_and_an_exact_version() -> None:
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", line), line


def test_every_requirement_is_pinned_within_its_bounds() -> None:
    for requirement in direct_requirements():
        pinned = PINS.get(canonicalize_name(requirement.name))
        assert pinned is not None, f"{requirement.name} is not in constraints.txt: run `make constraints`"
        assert pinned in requirement.specifier, f"{requirement}: constraints.txt has {pinned}; run `make constraints`"


def test_indirect_requirements_are_pinned() -> None:
    seen: set[str] = set()
    waiting = [(requirement.name, requirement.extras) for requirement in direct_requirements()]
    while waiting:
        name, extras = waiting.pop()
        if (key := canonicalize_name(name)) in seen:
            continue
        seen.add(key)
        assert key in PINS, f"{name} is not in constraints.txt: run `make constraints`"
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # a requirement of the build, or of another platform
            continue
        for requirement in map(Requirement, lines):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in (*extras, "")):
                waiting.append((requirement.name, requirement.extras))
