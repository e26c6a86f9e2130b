"""In what the engines of one group are not alike and what that means, and in what failed pairs are alike."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

from pd_proxy.doctor.report import Engine
from pd_proxy.fleet.findings import Finding, Severity, found

K = TypeVar("K", bound=Hashable)
_MOST_NAMED = 3


def differences(engines: Sequence[Engine]) -> list[Finding]:
    """What is not alike among the engines that are up. What an engine does not tell is held against nobody."""
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
    """One finding for the pairs that fail alike on account of one engine, with the names of the others.

    Arguments:
        findings: of pairs, prefill first.
    """
    kept: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        culprit = finding.backends[1 if finding.code in _OF_DECODE else 0]
        kept.setdefault((finding.code, culprit), []).append(finding)
    return [_one(alike) for alike in kept.values()]


_OF_DECODE = {"not_read", "decode_failed"}
"""The codes of pairs of which decode is likelier to be the cause."""


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
    """The finding that engines differ in something, if they do."""
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
    """Some names, and how many more there are."""
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
