"""Draw docs/states.svg: the states of a backend, a connection and a stream, from the tables in the code.

python docs/states.py            writes the picture, beside this file
python docs/states.py --check    exits 1 when the picture is not what the tables say now
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from enum import Enum
from html import escape
from pathlib import Path
from textwrap import wrap
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "proxy"))

from pd_proxy.fleet.state import DUTY, FITNESS, HEALTH  # noqa: E402 - the checkout's own package, installed or not
from pd_proxy.http.connection_state import TRANSITIONS as CONNECTION  # noqa: E402
from pd_proxy.relay.phase import TRANSITIONS as STREAM  # noqa: E402

FILE = HERE / "states.svg"
WIDTH = 980
HEIGHT = 34  # of a state's box
# The width of a state's box, and the space to the next one; for few states, and for many
WIDE, NARROW = (120, 150), (90, 45)
LINE, LEVEL = 14, 22  # between two lines of text; between an arrow and the text of the one within
COLUMN = 24  # characters of a line of events
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
STYLE = """
    .page { fill: #ffffff; }
    .state { fill: #e8f1fe; stroke: #2f6fce; }
    .title { fill: #17202b; font-size: 14px; font-weight: 600; }
    .name { fill: #17202b; font-size: 13px; font-weight: 600; }
    .event { fill: #4a5868; font-size: 11px; }
    .way { stroke: #3c4a5a; stroke-width: 1.5; fill: none; }
    .tip { fill: #3c4a5a; }
    @media (prefers-color-scheme: dark) {
      .page { fill: #0d1117; }
      .state { fill: #15294a; stroke: #5b9bf5; }
      .title, .name { fill: #eef2f7; }
      .event { fill: #aebacb; }
      .way { stroke: #aebacb; }
      .tip { fill: #aebacb; }
    }
"""


class Machine(NamedTuple):
    """One table: its title, and for each state the events that lead to each other state."""

    title: str
    states: Sequence[str]
    ways: Mapping[tuple[int, int], Sequence[str]]

    @property
    def box(self) -> int:
        """The width of a state's box."""
        return (WIDE if len(self.states) < 5 else NARROW)[0]

    def left(self, number: int) -> int:
        """Where a state's box begins."""
        return 40 + number * sum(WIDE if len(self.states) < 5 else NARROW)


def machine(title: str, table: Mapping[Enum, Mapping[Enum, Enum]]) -> Machine:
    """A table of events. Where every state knows an event, and it leads to one state, that is what it shows."""
    states = list(table)
    ways: dict[tuple[int, int], list[str]] = {}
    for state, row in table.items():
        for event, then in row.items():
            if state is not then:
                ways.setdefault((states.index(state), states.index(then)), []).append(str(event.value))
    return Machine(title, [str(state.value) for state in states], ways)


def phases(title: str, table: Mapping[Enum, Mapping[Enum, Enum]]) -> Machine:
    """A table without events: which state may follow which."""
    states = list(table)
    ways = {
        (states.index(now), states.index(then)): [""] for now, row in table.items() for then in row if now is not then
    }
    return Machine(title, [str(state.value) for state in states], ways)


def draw(one: Machine, top: int) -> tuple[list[str], int]:
    """One machine's part of the picture, and where it ends."""
    step = LEVEL + LINE * max(len(lines_of(events)) for events in one.ways.values())
    ahead = max((j - i for i, j in one.ways if j > i), default=0)
    back = max((i - j for i, j in one.ways if j < i), default=0)
    middle = top + 30 + ahead * step
    parts = [f'<text class="title" x="20" y="{top + 16}">{escape(one.title)}</text>']
    for number, state in enumerate(one.states):
        x = one.left(number)
        parts.append(f'<rect class="state" x="{x}" y="{middle}" width="{one.box}" height="{HEIGHT}" rx="6"/>')
        middle_x, baseline = x + one.box / 2, middle + HEIGHT / 2 + 5
        parts.append(f'<text class="name" x="{middle_x}" y="{baseline}" text-anchor="middle">{escape(state)}</text>')
    for (start, end), events in sorted(one.ways.items()):
        parts += arrow(one, start, end, lines_of(events), middle, step)
    return parts, middle + HEIGHT + back * step + 20


def lines_of(events: Sequence[str]) -> list[str]:
    """Events as lines of text."""
    return wrap(", ".join(events), COLUMN)


def arrow(one: Machine, start: int, end: int, text: Sequence[str], middle: int, step: int) -> list[str]:
    """From one box to another: above to a later one, below to an earlier one, and the farther the higher."""
    forward, far = end > start, abs(end - start)
    edge = middle if forward else middle + HEIGHT
    away = (far - 1) * step + LEVEL
    level = edge - away / 0.75 if forward else edge + away / 0.75
    peak = edge - away if forward else edge + away
    x0 = one.left(start) + one.box * (0.7 if forward else 0.3)
    x1 = one.left(end) + one.box * (0.3 if forward else 0.7)
    way = f"M{x0} {edge} C{x0} {level:.0f} {x1} {level:.0f} {x1} {edge}"
    parts = [f'<path class="way" d="{way}" marker-end="url(#tip)"/>']
    first = peak - 5 - (len(text) - 1) * LINE if forward else peak + 13
    for number, line in enumerate(text):
        at = f'x="{(x0 + x1) / 2}" y="{first + number * LINE:.0f}"'
        parts.append(f'<text class="event" {at} text-anchor="middle">{escape(line)}</text>')
    return parts


def picture() -> str:
    """The whole file."""
    machines = (
        machine("A backend's health: what probes and requests find (fleet/state.py)", HEALTH),
        machine("A backend's duty: what operators set", DUTY),
        machine("A backend's fitness for one kind of leg: what the outlier detector decides", FITNESS),
        phases("A connection to an engine, and the exchange on it (http/connection_state.py)", CONNECTION),
        phases("A relayed stream (relay/phase.py)", STREAM),
    )
    parts: list[str] = []
    top = 10
    for one in machines:
        drawn, top = draw(one, top)
        parts += drawn
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}" width="{WIDTH}" height="{top}" '
        f'role="img" aria-labelledby="t" font-family="{FONT}">'
    )
    tip = (
        '<marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        '<path class="tip" d="M0 0 L10 5 L0 10 z"/></marker>'
    )
    return "\n".join(
        [
            head,
            '<title id="t">States of a backend, of a connection to an engine and of a stream</title>',
            "<!-- Drawn by docs/states.py from the tables in the code. Do not edit; run it again. -->",
            f"<style>{STYLE}</style>",
            f"<defs>{tip}</defs>",
            f'<rect class="page" width="{WIDTH}" height="{top}"/>',
            *parts,
            "</svg>\n",
        ]
    )


def main(argv: Sequence[str]) -> int:
    if list(argv) == ["--check"]:
        fresh = FILE.exists() and FILE.read_text(encoding="utf-8") == picture()
        if not fresh:
            print("docs/states.svg is stale; run: python docs/states.py", file=sys.stderr)
        return 0 if fresh else 1
    FILE.write_text(picture(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
