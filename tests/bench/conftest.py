"""Makes `bench` importable from the repository's root, and builds its load program once."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench import load
from bench.cases import Case
from bench.cost import engine

SMALL = Case(
    name="small",
    what="24 streams, a token every 5 ms on each",
    unit="token",
    tick_us=5_000,
    pad_bytes=0,
    concurrency=24,
    requests=48,
    tokens=10,
    prompt_bytes=2_000,
)


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The load program, compiled with every warning as an error."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed, and the load program is C")
    return load.build(tmp_path_factory.mktemp("load"), (*load.FLAGS, "-Werror"))


@pytest.fixture
def small() -> Case:
    """A load that takes a fraction of a second."""
    return SMALL


@pytest.fixture
def engine_port(program: Path, tmp_path: Path) -> Iterator[int]:
    """The port of a mock engine with a tick of 5 ms."""
    with engine(program, SMALL, tmp_path) as port:
        yield port
