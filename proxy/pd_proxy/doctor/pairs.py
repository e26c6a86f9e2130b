"""Which pairs of engines to try, where there are more than one wants to wait for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def choose_pairs(
    prefills: Sequence[T], decodes: Sequence[T], may_pair: Callable[[T, T], bool], most: int
) -> list[tuple[T, T]]:
    """Pairs of engines, `most` of them: first such that each engine is in one, then others.

    The same engines give the same pairs. Where `most` is too small for each engine to be in a pair, the last ones are
    in none.
    """
    unmet, first, rest = {*prefills, *decodes}, [], []
    for pair in _diagonals(prefills, decodes):
        if not may_pair(*pair):
            continue
        if unmet.isdisjoint(pair):
            rest.append(pair)
        else:
            first.append(pair)
            unmet.difference_update(pair)
    return [*first, *rest][:most]


def _diagonals(prefills: Sequence[T], decodes: Sequence[T]) -> Iterator[tuple[T, T]]:
    """Every pair once: the first with the first, the second with the second, then each with its neighbour."""
    if not prefills or not decodes:
        return
    longest = max(len(prefills), len(decodes))
    seen = set()
    for shift in range(len(decodes)):
        for number in range(longest):
            at = number % len(prefills), (number + shift) % len(decodes)
            if at not in seen:
                seen.add(at)
                yield prefills[at[0]], decodes[at[1]]
    for p, prefill in enumerate(prefills):  # what the diagonals of unlike lengths leave out
        for d, decode in enumerate(decodes):
            if (p, d) not in seen:
                yield prefill, decode
