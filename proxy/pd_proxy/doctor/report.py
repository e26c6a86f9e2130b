"""The report of an examination: as values, as text of at most 100 columns, and as JSON.

The text contains no times and no ids, so the same engines in the same state give the same text.
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
_LEAST = 12  # the least width of a column that can be shortened


@dataclass(frozen=True, slots=True)
class Engine:
    """One engine, as far as it reports on itself.

    Attributes:
        role, group: its role and group in the settings.
        state: `up`, `down` or `unknown`.
        says: the role that it reports: `prefill`, `decode`, `both`, or empty.
        connector: the hand-off protocol that the gateway will use; empty where that is not known.
        tells: the connectors that it reports, by its own names.
        block_size, context, tp: the tokens of a block, the tokens of prompt and answer, and the tensor-parallel ranks;
            0 where it does not report them.
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
        side: host and port of prefill's side; empty where they are not known.
        reachable: whether this machine can connect to them; None where that is not known.
        seconds: the time that it took, the engines' handshake included.
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
    """The whole report.

    Attributes:
        pairs: the number of possible pairs.
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
        """The report as one JSON object."""
        said: dict[str, Any] = {
            "exit_status": self.exit_status,
            "engines": [asdict(engine) for engine in self.engines],
            "pairs": self.pairs,
            "handoffs": [{**asdict(one), "seconds": round(one.seconds, 3)} for one in self.handoffs],
            "findings": [asdict(finding) for finding in self.findings],
        }
        return json.dumps(said, indent=2)

    def as_text(self) -> str:
        """The report as text: tables of engines and hand-offs, then the findings by severity, each with its advice."""
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
        summary = ", ".join(_many(counts[severity], severity) for severity in SEVERITIES if counts[severity])
        return f"{scope}: {summary or 'all is well'}."


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
    """A table whose columns are as wide as their cells. Where it is too wide, the widest columns of text are
    shortened."""
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
    """Shorten a cell in the middle, since hosts differ mostly at the end, and models at the beginning."""
    if len(cell) <= width:
        return cell
    head = (width - 2) // 2
    return f"{cell[:head]}..{cell[len(cell) - (width - 2 - head) :]}"


def _printable(text: str) -> str:
    """The text with a question mark for each control character, since engines' texts are not trusted."""
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
