"""The connections of clients, counted for all servers of a process: how many may be open, and how many are."""

from __future__ import annotations

from dataclasses import dataclass, field

from proxy.relay.deadlines import Deadlines


@dataclass(slots=True)
class Connections:
    """What all connections of a process share.

    Arguments:
        limit: connections that may be open. Those beyond it, up to `limit + spare`, are served what `spared` names
            and told 503 otherwise; what comes on top of these is closed at once.
        spared: paths that are served even then, so that who runs the gateway still sees it.
    Attributes:
        open: connections that are open.
        refused: connections that were told 503 or closed because of the limit, since the start.
        leaving: the process is about to end, so every answer is the last of its connection.
    """

    limit: int = 1_000_000
    spared: frozenset[str] = frozenset()
    open: int = 0
    refused: int = 0
    leaving: bool = False
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
