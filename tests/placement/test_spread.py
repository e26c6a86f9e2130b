"""The distribution of media over encoders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st
from pd_proxy.placement.spread import spread


@dataclass(frozen=True)
class Encoder:
    url: str
    inflight_tokens: int = 0
    inflight_requests: int = 0
    factor: float = 1.0


def legs(images: Sequence[bool], encoders: Sequence[Encoder], drawn: float = 0.0) -> list[tuple[str, list[int]]]:
    return [(one.url, places) for one, places in spread(images, encoders, 10, lambda: drawn)]


IDLE = [Encoder("a"), Encoder("b")]


def test_images_of_one_encoder_share_a_leg_and_nothing_else_does() -> None:
    assert legs([True] * 4, IDLE) == [("a", [0, 2]), ("b", [1, 3])]
    assert legs([False, False, True, False], IDLE[:1]) == [("a", [0]), ("a", [1]), ("a", [2]), ("a", [3])]
    assert legs([True, False, True], IDLE[:1]) == [("a", [0, 2]), ("a", [1])]


def test_an_encoder_with_less_work_gets_more_media() -> None:
    assert legs([True] * 4, [Encoder("a", 25), Encoder("b")]) == [("b", [0, 1, 2]), ("a", [3])]


def test_among_equal_encoders_the_choice_varies() -> None:
    assert {legs([True], IDLE, drawn)[0][0] for drawn in (0.0, 0.5)} == {"a", "b"}


def test_an_encoder_in_its_slow_start_gets_fewer_media() -> None:
    assert legs([True] * 3, [Encoder("a", factor=0.3), Encoder("b")]) == [("b", [0, 1, 2])]


@given(st.lists(st.booleans(), min_size=1, max_size=20), st.integers(1, 5), st.floats(0, 1, exclude_max=True))
def test_every_medium_is_encoded_once(images: list[bool], count: int, drawn: float) -> None:
    found = legs(images, [Encoder(str(n)) for n in range(count)], drawn)
    assert sorted(place for _, places in found for place in places) == list(range(len(images)))
