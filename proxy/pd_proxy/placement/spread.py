"""Which encoder gets which of a request's media: each goes to the one with the least to do, the others counted in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from pd_proxy.placement.policies import Candidate

C = TypeVar("C", bound=Candidate)


def spread(
    images: Sequence[bool], candidates: Sequence[C], weight: int, random: Callable[[], float]
) -> list[tuple[C, list[int]]]:
    """The legs to encoders: for each, its backend and the positions of its media.

    Arguments:
        images: for each medium whether it is an image; those of one backend share a leg, anything else has its own.
        candidates: never empty.
        weight: tokens that a medium puts on its backend.
    """
    start = int(random() * len(candidates))  # among equals not always the same
    order = [*candidates[start:], *candidates[:start]]
    given = dict.fromkeys(range(len(order)), 0)
    shared: dict[int, list[int]] = {}
    legs: list[tuple[C, list[int]]] = []
    for position, image in enumerate(images):
        place = min(given, key=lambda n: (order[n].inflight_tokens + given[n] + weight) / order[n].factor)
        given[place] += weight
        if image and place in shared:
            shared[place].append(position)
            continue
        leg = [position]
        legs.append((order[place], leg))
        if image:
            shared[place] = leg
    return legs
