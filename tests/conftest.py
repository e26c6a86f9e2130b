"""What all tests share: settings that come from the test alone, property tests that repeat, and which tests are slow.

**Property tests** draw the same examples each time, so that a failure is about the change at hand, and fewer of them
where slow tests are left out. With PROPERTIES=random they draw new ones, from pytest's `--hypothesis-seed` (`make
test-random`, which prints it).

**Cross products.** A test with several `parametrize` has each row of one with each row of the others. The everyday
suite runs as many of these combinations as are needed to include every row once; the others are slow tests. Where the
test is marked `cross_product`, every value of every parameter is included once instead.

**Rows.** An asynchronous test of `STARTS_GATEWAYS` costs 20 to 60 ms of CPU for each of its rows, since each starts
engines and a gateway. The everyday suite runs the first row and the last; those between are slow tests.
"""

from __future__ import annotations

import gc
import os
import re
from inspect import iscoroutinefunction
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes depends on other load of the machine.
settings.register_profile("same", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
settings.register_profile("quick", settings.get_profile("same"), max_examples=20)
settings.register_profile("random", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.load_profile(os.environ.get("PROPERTIES") or "same")


def pytest_configure(config: pytest.Config) -> None:
    if "not slow" in _unwanted(config) and "PROPERTIES" not in os.environ:
        settings.load_profile("quick")  # before any test module is imported


def pytest_sessionstart() -> None:
    gc.disable()  # objects that are imported and collected stay


def pytest_collection_finish() -> None:
    # A full collection of garbage would visit all modules and all tests: half a second in some test, a hundred times in
    # a run.
    gc.freeze()
    gc.enable()


def _unwanted(config: pytest.Config) -> set[str]:
    """The terms of `-m`."""
    return {term.strip() for term in config.getoption("markexpr").split(" and ")}


@pytest.hookimpl(optionalhook=True)  # optional, since pytest may be run without xdist, to debug
def pytest_xdist_auto_num_workers() -> int:
    """Processes for `pytest -n auto`: one for each core that this process may use."""
    return len(os.sched_getaffinity(0))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not import modules of which `-m` selects nothing: tests of real engines, and modules whose every test is
    slow."""
    unwanted = _unwanted(config)
    if "not real" in unwanted and collection_path == Path(__file__).parent / "real":
        return True
    if "not slow" in unwanted and collection_path.name.startswith("test_") and collection_path.suffix == ".py":
        return True if _SLOW.search(collection_path.read_bytes()) else None
    return None


STARTS_GATEWAYS = ("tests/api/", "tests/contract/", "tests/flow/")

_SLOW = re.compile(rb"^pytestmark = (\[|)pytest\.mark\.slow\b", re.MULTILINE)


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what the cross products have beyond each row, or each value, once."""
    products: dict[str, list[tuple[pytest.Item, set[tuple[str, str]]]]] = {}
    for item in items:
        if item.get_closest_marker("slow") is None and (parts := _parts(item)):
            products.setdefault(item.nodeid.partition("[")[0], []).append((item, parts))
    for combinations in products.values():
        unseen = set().union(*(parts for _, parts in combinations))
        while unseen:
            best = max(combinations, key=lambda combination: len(combination[1] & unseen))
            combinations.remove(best)
            unseen -= best[1]
        for item, _ in combinations:
            item.add_marker(pytest.mark.slow)
    rows: dict[str, list[pytest.Item]] = {}
    for item in items:
        starts = item.nodeid.startswith(STARTS_GATEWAYS) and iscoroutinefunction(getattr(item, "function", None))
        if starts and item.get_closest_marker("slow") is None:
            rows.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for several in rows.values():
        for item in several[1:-1]:
            item.add_marker(pytest.mark.slow)


def _parts(item: pytest.Item) -> set[tuple[str, str]]:
    """The parameters of one item of a cross product; empty for any other test."""
    callspec = getattr(item, "callspec", None)
    if callspec is None:
        return set()
    if item.get_closest_marker("cross_product") is not None:
        return {(name, repr(value)) for name, value in callspec.params.items()}
    tables: list[list[str]] = []
    for mark in item.iter_markers("parametrize"):
        names = mark.args[0]
        tables.append([name.strip() for name in names.split(",")] if isinstance(names, str) else list(names))
    if len(tables) < 2:
        return set()
    return {(",".join(names), repr([callspec.params.get(name) for name in names])) for names in tables}


# Settings come from the environment too; a developer's own must not change the tests.
for name in [name for name in os.environ if name.startswith("PD_PROXY_")]:
    del os.environ[name]
