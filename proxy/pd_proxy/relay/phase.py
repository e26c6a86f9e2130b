"""The phases of a relayed stream, and which leads to which.

Everything that happens to a stream (events and errors of the engine, the client's leaving, time limits) moves it along
this table or leaves it in its phase.
"""

from __future__ import annotations

from enum import Enum

from pd_proxy.transitions import table


class Phase(Enum):
    """How far a stream has come."""

    HOLDING = "holding"
    """The client has been sent nothing of this leg: the request can be tried elsewhere."""

    LIVE = "live"
    """The client sees what the engine sends."""

    CLOSING = "closing"
    """The engine has sent its last event; only the end of its answer is missing."""

    OVER = "over"
    """It has ended, with or without an error; nothing more is sent to the client."""

    __hash__ = object.__hash__  # `Enum.__hash__` is a call of Python, several times for each stream


TRANSITIONS = table(
    "a stream",
    {
        Phase.HOLDING: (Phase.LIVE, Phase.OVER),
        Phase.LIVE: (Phase.CLOSING, Phase.OVER),
        Phase.CLOSING: (Phase.OVER,),
        Phase.OVER: (),
    },
)
"""`TRANSITIONS[now][then]` is the phase that follows; `ImpossibleTransition` is raised where it does not."""
