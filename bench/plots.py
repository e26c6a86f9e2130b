"""The bench's plots, as SVG: what a token costs, and how late it is, against the number of streams.

Drawn without a library, since there are only two line plots. The colours can be told apart by readers who cannot tell
red from green, and each line has its name at its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, log10
from xml.sax.saxutils import escape

_WIDTH, _HEIGHT = 460, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 96, 56, 44
_COLOURS = ("#0b62a8", "#b35a00", "#5b7a12", "#7a3e9d")
_DASH = "5 4"


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a plot.

    Arguments:
        name: the label at its end.
        points: (x, y), by rising x.
        colour: index of the colour; lines of one contender share it.
        dashed: whether it is the second line of a contender.
    """

    name: str
    points: tuple[tuple[float, float], ...]
    colour: int
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Plot:
    """One plot: x is the number of streams, each twice the one before; y begins at 0."""

    title: str
    unit: str
    lines: tuple[Line, ...]


def svg(plots: Sequence[Plot], what: str) -> str:
    """The plots beside each other, as one picture.

    Arguments:
        what: the description for screen readers.
    """
    width = _WIDTH * len(plots)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {_HEIGHT}" width="{width}" height="{_HEIGHT}"'
        " role=\"img\" font-family=\"system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif\">",
        f"<title>{escape(what)}</title>",
        f'<rect width="{width}" height="{_HEIGHT}" fill="#ffffff"/>',
    ]
    for number, plot in enumerate(plots):
        parts.append(f'<g transform="translate({number * _WIDTH} 0)">')
        parts += _drawn(plot)
        parts.append("</g>")
    return "\n".join([*parts, "</svg>", ""])


def _drawn(plot: Plot) -> list[str]:
    xs = sorted({x for line in plot.lines for x, _ in line.points})
    top = _round_up(max(y for line in plot.lines for _, y in line.points))
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def across(x: float) -> float:
        return _LEFT + (right - _LEFT) * (xs.index(x) / max(1, len(xs) - 1))

    def up(y: float) -> float:
        return bottom - (bottom - _TOP) * y / top

    parts = [_text(_LEFT - 40, 22, plot.title, size=14, weight=600), _text(_LEFT - 40, 38, plot.unit, size=11)]
    for step in range(5):
        y = top * step / 4
        parts.append(f'<path d="M{_LEFT} {up(y):.1f}H{right}" stroke="#dde3ea"/>')
        parts.append(_text(_LEFT - 8, up(y) + 4, f"{y:g}", anchor="end"))
    parts += [_text(across(x), bottom + 18, f"{x:g}", anchor="middle") for x in xs]
    parts.append(_text((_LEFT + right) / 2, bottom + 36, "streams", anchor="middle"))
    ends = _apart([up(line.points[-1][1]) for line in plot.lines])
    for line, end in zip(plot.lines, ends, strict=True):
        colour = _COLOURS[line.colour % len(_COLOURS)]
        way = "L".join(f"{across(x):.1f} {up(y):.1f}" for x, y in line.points)
        dash = f' stroke-dasharray="{_DASH}"' if line.dashed else ""
        parts.append(f'<path d="M{way}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        parts += [f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="2.6" fill="{colour}"/>' for x, y in line.points]
        parts.append(_text(right + 8, end + 4, line.name, colour=colour))
    return parts


def _text(
    x: float, y: float, text: str, *, size: int = 11, anchor: str = "start", weight: int = 400, colour: str = "#37424f"
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}"'
        f' fill="{colour}">{escape(text)}</text>'
    )


def _round_up(value: float) -> float:
    """The smallest number above `value` that four steps divide evenly."""
    size = 10.0 ** (ceil(log10(value)) - 1) if value > 0 else 1.0
    return next(size * step for step in (1, 1.2, 1.6, 2, 2.4, 3.2, 4, 6, 8, 10, 12) if size * step >= value)


def _apart(heights: Sequence[float], least: float = 13.0) -> list[float]:
    """Heights of labels, moved down where they would overlap."""
    placed = list(heights)
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    for before, after in pairwise(order):
        placed[after] = max(placed[after], placed[before] + least)
    return placed
