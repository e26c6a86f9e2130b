"""Tables of states: what leads from one to another, and what cannot happen."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import TypeVar

S = TypeVar("S", bound=Enum)
E = TypeVar("E", bound=Enum)


class ImpossibleTransition(Exception):
    """An event came in a state in which it cannot come. It is a fault in the gateway's code."""


def after(table: Mapping[S, Mapping[E, S]], state: S, event: E) -> S:
    """The state that an event leads to.

    Raises:
        ImpossibleTransition
    """
    try:
        return table[state][event]
    except KeyError:
        raise ImpossibleTransition(f"{event.value}: not possible in the state {state.value}") from None
