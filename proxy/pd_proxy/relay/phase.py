"""The phases of a relayed stream, and which leads to which.

Whatever happens to a stream (the engine's events and errors, the client's leaving, time limits) moves it along this
table or leaves it where it is.
"""

from __future__ import annotations

from enum import Enum

from pd_proxy.transitions import ImpossibleTransition


class Phase(Enum):
    """How far a stream has come."""

    HOLDING = "holding"
    """The client has been given nothing of this leg: it can be begun anew elsewhere."""

    LIVE = "live"
    """The client sees what the engine sends."""

    CLOSING = "closing"
    """The engine has said its last event; what is left to see is how its answer ends."""

    OVER = "over"
    """It ended, well or not; nothing more goes to the client."""

    __hash__ = object.__hash__  # that of `Enum` is a call of Python's, several times for each stream


class _Next(dict[Phase, Phase]):
    """The phases that one leads to. A lookup costs no call, unless there is nothing to find."""

    def __init__(self, now: Phase, *phases: Phase) -> None:
        super().__init__({phase: phase for phase in phases})
        self._now = now

    def __missing__(self, then: Phase) -> Phase:
        raise ImpossibleTransition(f"a stream that is {self._now.value} cannot become {then.value}")


TRANSITIONS = {
    Phase.HOLDING: _Next(Phase.HOLDING, Phase.LIVE, Phase.OVER),
    Phase.LIVE: _Next(Phase.LIVE, Phase.CLOSING, Phase.OVER),
    Phase.CLOSING: _Next(Phase.CLOSING, Phase.OVER),
    Phase.OVER: _Next(Phase.OVER),
}
"""`TRANSITIONS[now][then]` is the phase that follows; `ImpossibleTransition` is raised where it does not."""
