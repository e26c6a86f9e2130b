"""Tables of states: which transitions are possible, and the error for those that are not."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from enum import Enum
from typing import Generic, TypeVar

S = TypeVar("S", bound=Enum)
E = TypeVar("E", bound=Enum)


class ImpossibleTransition(Exception):
    """An event occurred in a state in which it is impossible. This is a defect in the gateway's code."""


def after(table: Mapping[S, Mapping[E, S]], state: S, event: E) -> S:
    """The state that an event leads to.

    Raises:
        ImpossibleTransition
    """
    try:
        return table[state][event]
    except KeyError:
        raise ImpossibleTransition(f"{event.value}: not possible in the state {state.value}") from None


class Successors(dict[S, S], Generic[S]):
    """The states that may follow one state. `successors[then]` is `then`, without a call of a Python function.

    Raises:
        ImpossibleTransition: by a lookup of a state that may not follow.
    """

    def __init__(self, what: str, now: S, successors: Collection[S]) -> None:
        super().__init__({state: state for state in successors})
        self._what = what
        self._now = now

    def __missing__(self, then: S) -> S:
        raise ImpossibleTransition(f"{self._what} that is {_word(self._now)} cannot become {_word(then)}")


def table(what: str, successors: Mapping[S, Collection[S]]) -> Mapping[S, Successors[S]]:
    """A table without events: `table[now][then]` is `then`, or raises `ImpossibleTransition`.

    Arguments:
        what: the thing that is in these states, with its article; for the error.
        successors: the states that may follow each state.
    """
    return {now: Successors(what, now, states) for now, states in successors.items()}


def _word(state: Enum) -> str:
    return state.name.lower().replace("_", " ")
