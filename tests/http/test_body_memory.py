"""The bytes of request bodies that are held at a time, in sum."""

from __future__ import annotations

import pytest
from pd_proxy.errors import BodiesFull, GatewayError, RequestTimedOut
from pd_proxy.http import body_memory as module
from pd_proxy.http.body_memory import SHORT, Bodies

MB = 1 << 20


class Holder:
    def __init__(self) -> None:
        self.held = 0
        self.error: GatewayError | None = None

    def refuse(self, error: GatewayError) -> None:
        self.error = error


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(module, "monotonic", lambda: now[0])
    return now


def fill(bodies: Bodies, size: int, count: int) -> list[Holder]:
    holders = [Holder() for _ in range(count)]
    for holder in holders:
        for _ in range(size // (256 * 1024)):
            if not bodies.take(holder, 256 * 1024):
                break
    return holders


def test_what_is_held_is_never_more_than_the_limit(clock: list[float]) -> None:
    bodies = Bodies(limit=8 * MB, longest=2 * MB)
    holders = fill(bodies, 2 * MB, 20)
    assert bodies.held == sum(holder.held for holder in holders) == 6 * MB
    assert all(isinstance(holder.error, BodiesFull) for holder in holders if not holder.held)
    assert bodies.refused == {"full": sum(holder.error is not None for holder in holders), "stalled": 0}
    for holder in holders:
        bodies.release(holder)
    assert bodies.held == 0


def test_short_bodies_have_room_that_long_ones_never_fill(clock: list[float]) -> None:
    bodies = Bodies(limit=8 * MB, longest=2 * MB)
    fill(bodies, MB, 20)
    short = [Holder() for _ in range(16)]
    assert all(bodies.take(holder, SHORT) for holder in short)
    assert not bodies.take(Holder(), 1)
    bodies.release(short[0])
    assert bodies.take(Holder(), 1)


def test_an_upload_that_has_stalled_makes_room_for_one_that_has_not(clock: list[float]) -> None:
    bodies = Bodies(limit=8 * MB, longest=2 * MB)
    stalled, slow, whole, running = fill(bodies, MB + MB // 2, 4)
    bodies.whole(whole)
    bodies.whole(running)
    for _ in range(4):
        clock[0] += 2
        assert bodies.take(slow, SHORT)
    other = Holder()
    for _ in range(8):
        assert bodies.take(other, 256 * 1024)
    assert isinstance(stalled.error, RequestTimedOut)
    assert slow.error is whole.error is running.error is other.error is None
    assert bodies.refused == {"full": 0, "stalled": 1}


def test_bytes_that_trickle_are_no_progress(clock: list[float]) -> None:
    bodies = Bodies(limit=8 * MB, longest=2 * MB)
    trickling, _, _, _ = fill(bodies, MB + MB // 2, 4)
    for _ in range(60):
        clock[0] += 0.1
        assert bodies.take(trickling, 1)
    assert all(bodies.take(holder, 256 * 1024) for holder in [Holder()] * 8)
    assert isinstance(trickling.error, RequestTimedOut)


def test_there_is_always_room_for_one_body(clock: list[float]) -> None:
    bodies = Bodies(limit=1, longest=2 * MB)
    [one] = fill(bodies, 2 * MB, 1)
    assert one.error is None
    assert one.held == 2 * MB
    assert bodies.take(Holder(), SHORT)


def test_what_is_let_go_is_free_again(clock: list[float]) -> None:
    bodies = Bodies(limit=8 * MB, longest=8 * MB)
    holder = Holder()
    for _ in range(100):
        assert bodies.take(holder, MB)
        bodies.let_go(holder, MB)
    assert bodies.held == holder.held == 0
    clock[0] += 100
    fill(bodies, 7 * MB, 2)
    assert holder.error is None, "what holds nothing has not stalled"
