"""The differences between engines that the doctor reports."""

from __future__ import annotations

from typing import Any

import pytest
from pd_proxy.doctor.differences import differences, together
from pd_proxy.doctor.report import Engine
from pd_proxy.fleet.findings import found


def engine(url: str, role: str = "prefill", **told: Any) -> Engine:
    return Engine(**{"url": url, "role": role, "group": "default", "kind": "vllm", "state": "up", **told})


@pytest.mark.parametrize(
    ("one", "other", "code", "severity", "said"),
    [
        ({"version": "1"}, {"version": "2"}, "versions_differ", "warning", "versions differ: 1 at p; 2 at d"),
        ({"models": ("a",)}, {"models": ("a", "b")}, "models_differ", "warning", "models differ: a at p; a, b at d"),
        ({"block_size": 16}, {"block_size": 32}, "blocks_differ", "warning", "block sizes differ: 16 at p; 32 at d"),
        ({"context": 8}, {"context": 9}, "contexts_differ", "warning", "context lengths differ: 8 at p; 9 at d"),
        ({"tp": 2}, {"tp": 4}, "parallel_differ", "note", "tensor-parallel sizes differ: 2 at p; 4 at d"),
    ],
)
def test_each_difference_is_reported_with_the_engines_that_have_each_value(
    one: dict[str, Any], other: dict[str, Any], code: str, severity: str, said: str
) -> None:
    [finding] = differences([engine("p", **one), engine("d", "decode", **other)])
    assert (finding.code, finding.severity, finding.backends) == (code, severity, ("p", "d"))
    assert finding.what == f"group default: {said}"
    assert not differences([engine("p", **one), engine("d", "decode")]), "what is not told is held against nobody"
    assert not differences([engine("p", **one), engine("d", "decode", **{**other, "state": "down"})])
    assert not differences([engine("p", **one), engine("d", "decode", **{**other, "group": "b"})])


def test_of_many_engines_only_some_are_named() -> None:
    many = [engine(f"p{number}", version="1") for number in range(5)]
    [finding] = differences([*many, engine("d", "decode", version="2")])
    assert finding.what == "group default: versions differ: 1 at p0, p1, p2 and 2 more; 2 at d"
    assert len(finding.backends) == 6


def test_pairs_that_fail_alike_because_of_one_engine_are_one_finding() -> None:
    pairs = [("bad", "d"), ("bad", "e"), ("bad", "f")]
    [finding] = together([found("side_channel", f"{p} and {d}", p, d) for p, d in pairs])
    assert finding.what == "bad and d. Likewise with e, f"
    assert finding.backends == ("bad", "d", "e", "f")
    [finding] = together([found("not_read", f"{p} and {d}", p, d) for p, d in [("p", "bad"), ("q", "bad")]])
    assert finding.what == "p and bad. Likewise with q"
    assert len(together([found("not_read", "x", "p", "d"), found("not_read", "y", "p", "e")])) == 2
    assert len(together([found("not_read", "x", "p", "d"), found("stalled", "y", "p", "d")])) == 2
