"""Chooses the pairs of engines to try, where there are too many to try all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def choose_pairs(
    prefills: Sequence[T], decodes: Sequence[T], may_pair: Callable[[T, T], bool], most: int
) -> list[tuple[T, T]]:
    """At most `most` pairs of engines: first pairs that cover all engines, then others.

    The result depends only on the arguments. Where `most` is too small to cover all engines, the last ones are left
    out.
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
    """Every pair once: the first with the first, the second with the second, and so on; then each with the next one."""
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
    for p, prefill in enumerate(prefills):  # the pairs that diagonals leave out where the lengths differ
        for d, decode in enumerate(decodes):
            if (p, d) not in seen:
                yield prefill, decode
