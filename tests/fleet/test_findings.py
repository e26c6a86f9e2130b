"""Findings: the texts that operators read."""

from __future__ import annotations

import ast
from pathlib import Path

from pd_proxy.fleet.findings import ADVICE, MEANING, SIDE_ADVICE, Finding, found, in_order
from pd_proxy.handoff.connectors.registry import CONNECTORS

PROXY = Path(__file__).parents[2] / "proxy" / "pd_proxy"


def test_a_finding_comes_with_its_codes_advice() -> None:
    finding = found("refused", "http://a is not up", "http://a")
    assert finding == Finding("refused", "fault", ("http://a",), "http://a is not up", ADVICE["refused"])
    assert found("refused", "x", advice="Do that.").advice == "Do that."


def test_the_most_severe_findings_come_first_and_each_once() -> None:
    note, fault = found("uncached", "x", severity="note"), found("refused", "y")
    warning = found("not_tried", "z", severity="warning")
    assert in_order([note, warning, fault, note, warning]) == [fault, warning, note]


def test_every_advice_is_one_or_two_sentences() -> None:
    for code, advice in {**ADVICE, **SIDE_ADVICE}.items():
        assert advice[0].isupper() and advice.endswith("."), code
        assert advice.count(". ") <= 1, code


def test_every_code_that_the_gateway_uses_has_an_advice() -> None:
    used = set()
    for file in PROXY.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                continue
            place = {"found": 0, "ProbeFailed": 1}.get(node.func.id)
            if place is not None and len(node.args) > place and isinstance(code := node.args[place], ast.Constant):
                used.add(code.value)
    assert len(used) > 5
    assert used <= ADVICE.keys()
    assert MEANING.keys() == ADVICE.keys()
    assert SIDE_ADVICE.keys() <= CONNECTORS.keys()
