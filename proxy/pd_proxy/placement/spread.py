"""Distributes a request's media over the encoders. Each medium goes to the encoder with the least work, the media
already distributed included."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from pd_proxy.placement.policies import Candidate

C = TypeVar("C", bound=Candidate)


def spread(
    images: Sequence[bool], candidates: Sequence[C], weight: int, random: Callable[[], float]
) -> list[tuple[C, list[int]]]:
    """Distribute media over encoders. Returns the legs: for each its backend, and the positions of its media.

    Arguments:
        images: for each medium, whether it is an image. Images on one backend share a leg; other media have a leg each.
        candidates: at least one.
        weight: the tokens that a medium counts on its backend.
        random: returns a number in [0, 1).
    """
    start = int(random() * len(candidates))  # so that ties do not always go to the same encoder
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
