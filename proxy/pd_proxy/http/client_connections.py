"""The connections of clients, counted for all servers of a process: how many may be open, and how many are.

Whatever clients do, who runs the gateway must see it. So there are three sorts:

- up to `limit` connections are served;
- where there are more, one that has been idle for `_IDLE` seconds makes room for a new one; if none has, the new one
  is answered what is `spared` and told 503 otherwise, up to `spare` of them;
- what comes on top of these is a visitor: it has `VISIT` seconds to ask for what is spared, and the oldest visitor
  makes room for the next. Idle connections can take all other places for long, and these for a moment.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Protocol

from pd_proxy.http.body_memory import Bodies
from pd_proxy.http.deadlines import Deadlines

VISIT = 1.0
"""Seconds that a visitor has for its request."""
_IDLE = 3.0  # seconds after which an idle connection makes room; a client's next request may be on its way until then


class Visitor(Protocol):
    def leave_now(self) -> None: ...


@dataclass(slots=True)
class Connections:
    """What all connections of a process share.

    Arguments:
        limit: connections that are served.
        spared: paths that are served to all, so that who runs the gateway still sees it; one that ends in a slash with
            all below it.
        per_address: of `limit`, how many one client address may have, where that is bounded.
        bodies: of their requests.
    Attributes:
        open: connections that are open, visitors aside.
        refused: connections that came when there were too many, and were told 503, closed or served what is spared,
            since the start.
        leaving: the process is about to end, so every answer is the last of its connection.
    """

    limit: int = 1_000_000
    spared: frozenset[str] = frozenset()
    per_address: int | None = None
    bodies: Bodies = field(default_factory=Bodies)
    open: int = 0
    refused: int = 0
    leaving: bool = False
    visitors: dict[Visitor, None] = field(default_factory=dict)
    addresses: Counter[str] = field(default_factory=Counter)
    _idle: dict[float, Deadlines] = field(default_factory=dict)
    _headers: dict[float, Deadlines] = field(default_factory=dict)

    def headers(self, seconds: float) -> Deadlines:
        """For how long connections wait for the headers of a request."""
        return self._headers.setdefault(seconds, Deadlines(seconds))

    def idle(self, seconds: float) -> Deadlines:
        """For how long connections wait for another request: one limit for all that wait so long."""
        return self._idle.setdefault(seconds, Deadlines(seconds))

    @property
    def spare(self) -> int:
        """Connections beyond the limit that still get an answer."""
        return max(16, self.limit // 16)

    def is_spared(self, path: str) -> bool:
        """Whether a path is served to all."""
        return path in self.spared or any(path.startswith(name) for name in self.spared if name.endswith("/"))

    def make_room(self) -> bool:
        """Close the connection that has been idle longest, if that is long enough; whether there was one."""
        for deadlines in (*self._idle.values(), *self._headers.values()):
            waiting = deadlines.oldest(_IDLE)
            if waiting is not None and getattr(waiting, "make_room", bool)():
                return True
        return False

    def visit(self, visitor: Visitor) -> None:
        """One connection more than even the spare ones. The oldest of its kind leaves where there are too many."""
        self.refused += 1
        self.visitors[visitor] = None
        if len(self.visitors) > max(8, min(32, self.limit // 4)):
            oldest = next(iter(self.visitors))
            del self.visitors[oldest]
            oldest.leave_now()
