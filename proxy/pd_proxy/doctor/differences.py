"""Findings about differences between the engines of a group; and one finding for several pairs with the same
failure."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

from pd_proxy.doctor.report import Engine
from pd_proxy.fleet.findings import Finding, Severity, found

K = TypeVar("K", bound=Hashable)
_MAX_NAMED = 3


def differences(engines: Sequence[Engine]) -> list[Finding]:
    """The differences between the engines that are up. Values that an engine does not report are ignored."""
    findings: list[Finding] = []
    for group in dict.fromkeys(engine.group for engine in engines):
        members = [engine for engine in engines if engine.group == group and engine.state == "up"]
        answering = [engine for engine in members if engine.role != "encode"]
        pairs = [engine for engine in members if engine.role in ("prefill", "decode")]
        findings += _unlike(group, "models", answering, lambda engine: engine.models, "models_differ")
        findings += _unlike(group, "versions", answering, lambda engine: engine.version, "versions_differ")
        findings += _unlike(group, "block sizes", pairs, lambda engine: engine.block_size, "blocks_differ")
        findings += _unlike(group, "context lengths", answering, lambda engine: engine.context, "contexts_differ")
        findings += _unlike(group, "tensor-parallel sizes", pairs, lambda engine: engine.tp, "parallel_differ", "note")
    return findings


def together(findings: Sequence[Finding]) -> list[Finding]:
    """Merge the findings of pairs that fail in the same way because of the same engine.

    Arguments:
        findings: findings about pairs, with prefill first.
    """
    kept: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        culprit = finding.backends[1 if finding.code in _OF_DECODE else 0]
        kept.setdefault((finding.code, culprit), []).append(finding)
    return [_one(alike) for alike in kept.values()]


_OF_DECODE = {"not_read", "decode_failed"}
"""The codes of failures that are more likely caused by the decode engine."""


def _one(alike: Sequence[Finding]) -> Finding:
    first = alike[0]
    if len(alike) == 1:
        return first
    urls = list(dict.fromkeys(url for finding in alike for url in finding.backends))
    others = [url for url in urls if url not in first.backends]
    return replace(first, backends=tuple(urls), what=f"{first.what}. Likewise with {_some(others)}")


def _unlike(
    group: str,
    what: str,
    engines: Iterable[Engine],
    read: Callable[[Engine], K],
    code: str,
    severity: Severity = "warning",
) -> list[Finding]:
    """A finding where engines differ in a value."""
    values: dict[K, list[str]] = {}
    for engine in engines:
        if value := read(engine):
            values.setdefault(value, []).append(engine.url)
    if len(values) < 2:
        return []
    shown = "; ".join(f"{_value(value)} at {_some(urls)}" for value, urls in values.items())
    backends = [url for urls in values.values() for url in urls]
    return [found(code, f"group {group}: {what} differ: {shown}", *backends, severity=severity)]


def _value(value: object) -> str:
    return _some([str(part) for part in value]) if isinstance(value, tuple) else str(value)


def _some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = len(names) - _MAX_NAMED
    return ", ".join(names[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
