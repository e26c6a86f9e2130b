"""The states of a connection to an engine, and which may follow which.

An exchange is one request and its answer; a connection serves one at a time. Two things are not part of the state,
since they change independently of the exchange: whether the socket is open, which the transport knows, and whether it
is being read (it may be paused for a slow client, or resting). `docs/states.svg` is drawn from the table.
"""

from __future__ import annotations

from enum import Enum

from pd_proxy.transitions import table


class ConnectionState(Enum):
    """How far the exchange on a connection has come."""

    IDLE = "idle"
    """There is no exchange, and one may begin. If the socket has been closed, that one is lost before it is sent."""

    UNSENT = "unsent"
    """The request is sent at the end of this turn of the event loop; the engine has read nothing of it."""

    HEAD = "head"
    """The request has been written, or is being written piece by piece (`upload.py`); the head of the answer is not
    whole."""

    BODY = "body"
    """The receiver has the head; the body is not whole."""

    WHOLE = "whole"
    """The answer is whole, and both sides keep the connection."""

    LAST = "last"
    """The answer is whole, and no exchange can follow on the connection."""

    OVER = "over"
    """The exchange was aborted or lost, or was the last. The connection is not used again."""

    __hash__ = object.__hash__  # `Enum.__hash__` is a call of Python, several times for each exchange


TRANSITIONS = table(
    "a connection",
    {
        ConnectionState.IDLE: (ConnectionState.UNSENT, ConnectionState.OVER),
        ConnectionState.UNSENT: (ConnectionState.HEAD, ConnectionState.OVER),
        ConnectionState.HEAD: (ConnectionState.BODY, ConnectionState.OVER),
        ConnectionState.BODY: (ConnectionState.WHOLE, ConnectionState.LAST, ConnectionState.OVER),
        ConnectionState.WHOLE: (ConnectionState.IDLE, ConnectionState.LAST, ConnectionState.OVER),
        ConnectionState.LAST: (ConnectionState.OVER,),
        ConnectionState.OVER: (ConnectionState.OVER,),
    },
)
"""`TRANSITIONS[now][then]` is the state that follows; `ImpossibleTransition` is raised where it does not."""
