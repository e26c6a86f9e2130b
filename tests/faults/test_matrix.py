"""The fault matrix: every fault at every stage, for each shape of request.

The table of what is to come is in `expected.py`. The document that shows what came is docs/fault-matrix.md; when the
table changes for a reason, `WRITE_FAULT_MATRIX=1 .venv/bin/pytest tests/faults/test_matrix.py` writes it anew.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.cells import ENDPOINTS, FAULTS, STAGES, Cell
from tests.faults.expected import EXPECTED, REASONS, expected_of
from tests.faults.matrix import Result, run
from tests.faults.report import FILE, WRITE, render

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("matrix")]  # they share one run

CELLS = [
    Cell(fault, stage, endpoint, stream, ahead)
    for (fault, stage, stream, ahead), outcome in EXPECTED.items()
    if not outcome.startswith("-")
    for endpoint in ENDPOINTS
]


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> dict[Cell, Result]:
    """What came of the cells that this session asks for."""
    ours = [item for item in request.session.items if item.path == request.path]
    if any(item.name == test_the_document_is_the_result_of_the_run.__name__ for item in ours):
        return run(CELLS)
    return run([item.callspec.params["cell"] for item in ours if hasattr(item, "callspec")])


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.id)
def test_cell(cell: Cell, results: dict[Cell, Result]) -> None:
    result = results[cell]
    assert not result.left, result.left
    assert result.outcome == expected_of(cell), result.detail


def test_every_cell_is_run_or_has_a_reason() -> None:
    both = (True, False)
    assert set(EXPECTED) == {(f, s, stream, a) for f in FAULTS for s in STAGES for stream in both for a in both}
    given = {outcome[1:] for outcome in EXPECTED.values() if outcome.startswith("-")}
    assert given == set(REASONS)


def test_the_document_is_the_result_of_the_run(results: dict[Cell, Result]) -> None:
    text = render({cell: result.outcome for cell, result in results.items()})
    if os.environ.get(WRITE):
        FILE.write_text(text, encoding="utf-8")
    assert FILE.read_text(encoding="utf-8") == text, f"the outcome has changed: run this again with {WRITE}=1"


def test_the_gateway_never_asks_for_the_time_of_day() -> None:
    """So that a wall clock which jumps, as it does in the matrix, cannot matter. A time may be shown to people."""
    proxy = Path(__file__).parents[2] / "proxy" / "pd_proxy"
    files = list(proxy.rglob("*.py"))
    assert len(files) > 30
    allowed = proxy / "api" / "admin" / "backends.py"  # GET /admin/backends says when a hand-off was last tried
    assert [use for file in files if file != allowed for use in _wall_clock_uses(file)] == []
    assert len(list(_wall_clock_uses(allowed))) == 1


def _wall_clock_uses(file: Path) -> Iterator[str]:
    names = {"time", "time_ns", "now", "utcnow", "today", "localtime", "gmtime"}
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "time":
            found = {alias.name for alias in node.names} & names
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found = {node.attr} & names if node.value.id in ("time", "datetime", "date") else set()
        else:
            continue
        yield from (f"{file.name}:{node.lineno} {name}" for name in found)
