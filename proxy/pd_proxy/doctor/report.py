"""What a doctor has found, as values, as a text of at most 100 columns, and as JSON.

The text has no times and no ids in it: the same engines in the same state make the same text.
"""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pd_proxy.fleet.findings import SEVERITIES, Finding

WIDTH = 100
_GAP = "  "
_NONE = "-"
_LEAST = 12  # columns that a column of text keeps, however long the others are


@dataclass(frozen=True, slots=True)
class Engine:
    """One engine, as far as it tells.

    Attributes:
        role, group: as the settings say.
        state: `up`, `down` or `unknown`.
        says: its role as it tells it: `prefill`, `decode`, `both`, or empty.
        connector: what the gateway will speak with it; empty where nobody has told.
        tells: the connectors that it was started with, in its own words.
        block_size, context, tp: tokens in a block, tokens of prompt and answer, tensor-parallel ranks; 0: not told.
    """

    url: str
    role: str
    group: str
    kind: str
    state: str
    says: str = ""
    version: str = ""
    connector: str = ""
    tells: tuple[str, ...] = ()
    block_size: int = 0
    context: int = 0
    prefix_caching: bool | None = None
    tp: int = 0
    models: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Handoff:
    """One hand-off that was tried.

    Attributes:
        found: `ok`, or the code of what is wrong.
        side: host and port of prefill's side of it; empty where it does not say.
        reachable: whether these can be connected to from here; None where that is not known.
        seconds: how long it took, the engines' handshake included.
    """

    group: str
    prefill: str
    decode: str
    found: str
    side: str = ""
    reachable: bool | None = None
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Report:
    """All of it.

    Attributes:
        pairs: how many pairs there are to try.
    """

    engines: tuple[Engine, ...]
    handoffs: tuple[Handoff, ...]
    findings: tuple[Finding, ...]
    pairs: int = 0

    @property
    def exit_status(self) -> int:
        """2 with a fault, 1 with a warning, 0 without either."""
        severities = {finding.severity for finding in self.findings}
        return 2 if "fault" in severities else 1 if "warning" in severities else 0

    def as_json(self) -> str:
        """One object, indented."""
        said: dict[str, Any] = {
            "exit_status": self.exit_status,
            "engines": [asdict(engine) for engine in self.engines],
            "pairs": self.pairs,
            "handoffs": [{**asdict(one), "seconds": round(one.seconds, 3)} for one in self.handoffs],
            "findings": [asdict(finding) for finding in self.findings],
        }
        return json.dumps(said, indent=2)

    def as_text(self) -> str:
        """Tables of engines and hand-offs, then what is wrong and what to do, the gravest first."""
        parts = []
        if self.engines:
            parts.append(_table(_ENGINE_COLUMNS, [_engine_row(engine) for engine in self.engines]))
        if self.handoffs:
            parts.append(_table(_HANDOFF_COLUMNS, [_handoff_row(handoff) for handoff in self.handoffs]))
        if self.findings:
            parts.append("\n".join(_paragraph(finding) for finding in self.findings))
        return "\n\n".join([*parts, self._summary()]) + "\n"

    def _summary(self) -> str:
        tried = _many(len(self.handoffs), "hand-off")
        scope = f"{_many(len(self.engines), 'engine')}, {tried} tried of {_many(self.pairs, 'pair')}"
        counts = Counter(finding.severity for finding in self.findings)
        told = ", ".join(_many(counts[severity], severity) for severity in SEVERITIES if counts[severity])
        return f"{scope}: {told or 'all is well'}."


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


_ENGINE_COLUMNS = (
    *("ROLE", "BACKEND", "STATE", "SAYS", "VERSION", "CONNECTOR"),
    *("BLOCK", "CONTEXT", "CACHE", "TP", "MODELS"),
)
_HANDOFF_COLUMNS = ("PREFILL", "DECODE", "HAND-OFF", "SIDE CHANNEL", "FROM HERE")
_ELASTIC = {"BACKEND", "MODELS", "CONNECTOR", "VERSION", "PREFILL", "DECODE", "SIDE CHANNEL"}


def _engine_row(engine: Engine) -> tuple[str, ...]:
    caching = _NONE if engine.prefix_caching is None else "on" if engine.prefix_caching else "off"
    return (
        engine.role,
        _short(engine.url),
        engine.state,
        engine.says or _NONE,
        engine.version or _NONE,
        engine.connector or _NONE,
        str(engine.block_size or _NONE),
        str(engine.context or _NONE),
        caching,
        str(engine.tp or _NONE),
        ", ".join(engine.models) if engine.models else _NONE,
    )


def _handoff_row(handoff: Handoff) -> tuple[str, ...]:
    reached = _NONE if handoff.reachable is None else "reachable" if handoff.reachable else "unreachable"
    prefill, decode = _short(handoff.prefill), _short(handoff.decode)
    return prefill, decode, handoff.found, handoff.side or _NONE, reached


def _short(url: str) -> str:
    return url.removeprefix("http://")


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as what is in them; where that is too wide, the widest of texts gives way."""
    cells = [[_printable(cell) for cell in row] for row in (columns, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    while sum(widths) + len(_GAP) * (len(widths) - 1) > WIDTH:
        elastic = [at for at, name in enumerate(columns) if name in _ELASTIC and widths[at] > _LEAST]
        if not elastic:
            break
        widths[max(elastic, key=widths.__getitem__)] -= 1
    lines = (
        _GAP.join(_cut(cell, width).ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells
    )
    return "\n".join(line[:WIDTH].rstrip() for line in lines)


def _cut(cell: str, width: int) -> str:
    """A cell's end is what tells hosts and ports apart, and its beginning what tells models apart: the middle goes."""
    if len(cell) <= width:
        return cell
    head = (width - 2) // 2
    return f"{cell[:head]}..{cell[len(cell) - (width - 2 - head) :]}"


def _printable(text: str) -> str:
    """Engines say what they like; a terminal is told nothing but text."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _paragraph(finding: Finding) -> str:
    indent = " " * 9
    what = textwrap.fill(
        _printable(finding.what), WIDTH, initial_indent=finding.severity.ljust(9), subsequent_indent=indent
    )
    advice = textwrap.fill(
        _printable(finding.advice), WIDTH, initial_indent=indent + "> ", subsequent_indent=indent + "  "
    )
    return f"{what}\n{advice}"
