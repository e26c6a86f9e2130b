"""The fault matrix for every other connector: not its cost, but that no client notices a fault.

A client is given what `expected.py` says for `nixl`; what its engines cannot do is said by properties of the connector.
Nothing is left, on the gateway or on the engines, once the engines' leases have ended.
"""

from __future__ import annotations

import pytest
from pd_proxy.handoff.connectors.registry import CONNECTORS

from tests.contract.cases import CASES, Case
from tests.faults.cells import ENDPOINTS, Cell
from tests.faults.expected import EXPECTED, expected_of
from tests.faults.matrix import Result, run

pytestmark = pytest.mark.slow

CELLS = [
    Cell(fault, stage, endpoint, stream)
    for (fault, stage, stream, ahead), outcome in EXPECTED.items()
    if not (outcome.startswith("-") or ahead)
    for endpoint in ENDPOINTS
]
PARTICULAR = {
    "no params": "answers of other connectors need no parameters",
    "expired": "hand-offs of other connectors are not late in this way",
}
"""Faults of one connector."""
UNIMPORTANT = ("the fault did not come about", "at once")
"""What `matrix.py` says of a cell whose stage this connector does not have, or whose leases ended otherwise."""


@pytest.mark.parametrize("case", CASES[1:], ids=lambda case: case.name)
def test_whatever_happens_a_client_notices_as_little_as_with_nixl(case: Case) -> None:
    cells = [cell for cell in CELLS if cell.fault not in PARTICULAR and cell.fault not in case.spared]
    results = run(cells, case)
    wrong = {cell.id: found for cell in cells if (found := _wrong(cell, results[cell], case))}
    assert not wrong, "\n".join(f"{name}: {what}" for name, what in wrong.items())


def _wrong(cell: Cell, result: Result, case: Case) -> str:
    left = "; ".join(part for part in result.left.split("; ") if part and not part.startswith(UNIMPORTANT))
    if left:
        return f"left behind: {left}"
    verdict, expected = _verdict(result.outcome), _verdict(expected_of(cell))
    if verdict in ("ok", expected):
        return ""
    if not CONNECTORS[case.name].traits.resumable and cell.stream and verdict == "error event stream_interrupted":
        return ""
    return f"{verdict} instead of {expected}: {result.detail[:300]}"


def _verdict(outcome: str) -> str:
    """An outcome without its legs."""
    words = outcome.split(" ")
    while words and (words[-1] == "lease" or (words[-1][:-1].isdigit() and words[-1][-1:] in "PDLR")):
        words.pop()
    return " ".join(words)
