"""When a backend is ejected, for how long, and which backends never are; the tests move the clock."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from pd_proxy.errors import BackendBusy, BackendCut, BackendFailed, BackendUnreachable
from pd_proxy.fleet.backend import Backend
from pd_proxy.fleet.fleet import Fleet
from pd_proxy.fleet.outlier.breaker import Breaker
from pd_proxy.fleet.outlier.statistics import LegName, OutlierStats, Window
from pd_proxy.fleet.view import FleetView
from pd_proxy.settings.bounds import BreakerSettings
from pd_proxy.settings.tree import Settings


def breaker(**given_: Any) -> Breaker:
    return Breaker(BreakerSettings(**given_))


def outlier_stats(count: int) -> list[OutlierStats]:
    return [OutlierStats(30.0) for _ in range(count)]


def verdict(
    detector: Breaker, pool: list[OutlierStats], index: int, now: float = 0.0, leg: LegName = "decode"
) -> str | None:
    others = [stats for number, stats in enumerate(pool) if number != index]
    return detector.verdict(leg, pool[index], others, now)


def note(stats: OutlierStats, good: int, bad: int, now: float = 0.0) -> None:
    """Note `good` and `bad` legs in turn, so that bad ones are in a row only after the good ones."""
    while good or bad:
        if bad:
            bad -= 1
            stats.note(False, now)
        if good:
            good -= 1
            stats.note(True, now)


# The window


def test_a_window_counts_legs_that_are_not_too_old() -> None:
    window = Window(30.0)
    window.note(True, 100.0)
    window.note(False, 115.0)
    assert (window.good, window.bad) == (1, 1)
    window.roll(131.0)
    assert (window.good, window.bad) == (0, 1)
    window.roll(1000.0)
    assert (window.good, window.bad) == (0, 0)


@given(st.lists(st.tuples(st.floats(0, 40), st.booleans()), max_size=40))
def test_a_window_forgets_within_a_slice_of_its_length(steps: list[tuple[float, bool]]) -> None:
    window, now = Window(30.0), 0.0
    noted: list[tuple[float, bool]] = []
    for step, good in steps:
        now += step
        window.note(good, now)
        noted.append((now, good))
    young = [good for when, good in noted if now - when < 27.0]
    known = [good for when, good in noted if now - when <= 30.0]
    assert sum(young) <= window.good <= sum(known)
    assert len(young) - sum(young) <= window.bad <= len(known) - sum(known)


# Failures


def test_a_number_of_failures_in_a_row_ejects() -> None:
    detector, pool = breaker(consecutive_failures=3), outlier_stats(2)
    note(pool[0], 0, 2)
    assert verdict(detector, pool, 0) is None
    note(pool[0], 0, 1)
    assert verdict(detector, pool, 0) == "consecutive"
    note(pool[0], 1, 0)
    assert verdict(detector, pool, 0) is None


def test_a_small_share_of_good_legs_ejects_once_there_are_enough_to_tell() -> None:
    detector, pool = breaker(minimum_volume=10), outlier_stats(2)
    note(pool[1], 100, 0)
    note(pool[0], 5, 4)
    assert verdict(detector, pool, 0) is None, "nine are chance"
    note(pool[0], 1, 0)
    assert verdict(detector, pool, 0) == "success_rate"
    note(pool[0], 11, 0)
    assert verdict(detector, pool, 0) is None, "17 of 21 are good"


def test_bad_legs_are_forgotten_with_time() -> None:
    detector, pool = breaker(), outlier_stats(2)
    note(pool[0], 5, 9)
    assert verdict(detector, pool, 0) == "success_rate"
    assert verdict(detector, pool, 0, now=31.0) is None


def test_no_backend_is_ejected_if_all_fail_alike() -> None:
    detector, pool = breaker(), outlier_stats(4)
    for stats in pool:
        note(stats, 10, 10)
    assert [verdict(detector, pool, index) for index in range(4)] == [None] * 4
    note(pool[0], 0, 30)
    pool[0].note(True, 0.0)
    assert verdict(detector, pool, 0) == "success_rate", "unless it is worse than the rest even so"


# Slowness


def time(
    detector: Breaker,
    pool: list[OutlierStats],
    seconds: list[float],
    *,
    rounds: int = 20,
    leg: LegName = "decode",
    **more: Any,
) -> None:
    """Note legs of all backends in turn, which take `seconds`."""
    for _ in range(rounds):
        for stats, taken in zip(pool, seconds, strict=True):
            detector.timed("decode", leg, stats, taken, more.get("tokens", 100), more.get("now", 0.0))


def slow(detector: Breaker, pool: list[OutlierStats], now: float = 0.0, leg: LegName = "decode") -> list[int]:
    return [index for index in range(len(pool)) if verdict(detector, pool, index, now, leg) == "slow"]


@pytest.mark.parametrize(
    ("seconds", "odd"),
    [
        ([0.02, 0.02, 0.1], [2]),
        ([0.1, 0.02, 0.02, 0.02, 0.02], [0]),
        ([0.02, 0.02, 0.05], []),  # 2.5 times: uneven load may cause that
        ([0.02, 0.021, 0.019, 0.022], []),
        ([0.02, 0.1], []),  # of two backends, none can be called slow
        ([0.0001, 0.0001, 0.002], []),  # 20 times, but not noticeable
        ([0.02, 0.02, 0.0001], []),  # a fast backend is not ejected
        ([0.01, 0.01, 0.01, 0.1, 0.2], [3, 4]),
    ],
)
def test_a_backend_that_is_slower_than_at_least_two_others_is_slow(seconds: list[float], odd: list[int]) -> None:
    detector, pool = breaker(), outlier_stats(len(seconds))
    time(detector, pool, seconds)
    assert slow(detector, pool) == odd


def test_a_few_legs_or_one_extreme_time_are_not_slowness() -> None:
    detector, pool = breaker(minimum_volume=10), outlier_stats(3)
    time(detector, pool, [0.02, 0.02, 0.2], rounds=9)
    assert slow(detector, pool) == []
    detector, pool = breaker(), outlier_stats(3)
    time(detector, pool, [0.02, 0.02, 0.02])
    detector.timed("decode", "decode", pool[2], 3.0, 100, 0.0)
    assert slow(detector, pool) == []


def test_long_prompts_do_not_make_a_prefill_backend_slow() -> None:
    detector, pool = breaker(), outlier_stats(3)
    for _ in range(20):
        for stats, long in ((pool[0], 1), (pool[1], 1), (pool[2], 9)):  # one backend gets most of the long prompts
            for tokens, count in ((20_000, long), (200, 10 - long)):
                for _ in range(count):
                    detector.timed("prefill", "prefill", stats, 0.02 + tokens * 1e-4, tokens, 0.0)
    assert slow(detector, pool, leg="prefill") == []
    for _ in range(20):
        detector.timed("prefill", "prefill", pool[1], 5 * (0.02 + 200 * 1e-4), 200, 0.0)
    assert slow(detector, pool, leg="prefill") == [1]


def test_old_times_and_short_streams_do_not_count() -> None:
    detector, pool = breaker(), outlier_stats(3)
    time(detector, pool, [0.02, 0.02, 0.2])
    assert slow(detector, pool, now=100.0) == [2]
    detector.timed("decode", "decode", pool[2], 0.2, 100, 1000.0)
    assert slow(detector, pool, now=1000.0) == []
    detector, pool = breaker(), outlier_stats(3)
    time(detector, pool, [0.02, 0.02, 0.2], tokens=4)
    assert slow(detector, pool) == []


def test_slowness_can_be_switched_off() -> None:
    detector, pool = breaker(slow_ratio=None), outlier_stats(3)
    time(detector, pool, [0.02, 0.02, 2.0])
    assert slow(detector, pool) == []


@settings(deadline=None)  # it runs hundreds of legs
@given(st.integers(3, 8), st.floats(4, 100), st.floats(0.01, 1))
def test_an_outlier_always_looks_slow_enough_for_a_verdict(count: int, ratio: float, seconds: float) -> None:
    detector, pool = breaker(), outlier_stats(count)
    time(detector, pool, [seconds] * (count - 1) + [seconds * ratio], rounds=30)
    assert slow(detector, pool) == [count - 1]
    assert detector.timed("decode", "decode", pool[-1], seconds * ratio, 100, 0.0)
    assert not detector.timed("decode", "decode", pool[0], seconds, 100, 0.0)


# The length of ejections


def test_each_ejection_lasts_twice_as_long_up_to_a_bound_and_good_time_takes_that_back() -> None:
    detector, stats = breaker(ejection=10, longest_ejection=60, window=30), OutlierStats(30.0)
    now, lasted = 0.0, []
    for _ in range(6):
        lasted.append(detector.eject(stats, "slow", now))
        now = stats.ejected_until
    assert lasted == [10, 20, 40, 60, 60, 60]
    now += 61  # two windows in the rotation
    assert detector.eject(stats, "slow", now) == 20
    assert detector.eject(stats, "slow", stats.ejected_until + 1000) == 10


@given(
    st.lists(st.floats(0, 500), min_size=1, max_size=30),
    st.floats(0.1, 100),
    st.floats(0.1, 1000),
)
def test_ejections_are_within_their_bounds_and_grow_while_there_is_no_good_time(
    pauses: list[float], first: float, longest: float
) -> None:
    detector, stats = breaker(ejection=first, longest_ejection=longest), OutlierStats(30.0)
    now, before = 0.0, 0.0
    for pause in pauses:
        now = stats.ejected_until + pause
        seconds = detector.eject(stats, "consecutive", now)
        assert min(first, longest) <= seconds <= longest
        if pause < 30:
            assert seconds >= min(before, longest)
        assert seconds <= max(2 * before, first) + 1e-6
        assert stats.ejected(now) and not stats.ejected(now + seconds)
        before = seconds


# Slow start


@given(st.floats(0, 100), st.lists(st.floats(0, 200), min_size=2, max_size=10))
def test_the_factor_grows_from_a_tenth_to_one(duration: float, moments: list[float]) -> None:
    detector = breaker(slow_start=duration)
    factors = [detector.factor(0.0, moment) for moment in sorted(moments)]
    assert factors == sorted(factors)
    assert all(0.1 <= factor <= 1 for factor in factors)
    assert detector.factor(0.0, duration) == 1.0


def test_without_a_slow_start_a_backend_has_its_full_load_at_once() -> None:
    assert breaker(slow_start=0).factor(5.0, 5.0) == 1.0


# Invariants

COUNT = 6
MAX = 0.5
NUMBERS = st.integers(0, COUNT - 1)


class AnyFleet(RuleBasedStateMachine):
    """A pool with any events in any order."""

    @initialize(share=st.sampled_from([0.0, 0.34, MAX, 0.9, 1.0]), panic=st.sampled_from([0.0, 0.3, 1.0]))
    def begin(self, share: float, panic: float) -> None:
        self.now = 50.0
        self.share = share
        self.fleet = Fleet(
            Settings(
                decode=[f"http://d{number}" for number in range(COUNT)],
                breaker={
                    "consecutive_failures": 2,
                    "minimum_volume": 4,
                    "max_ejected": share,
                    "panic_threshold": panic,
                },  # type: ignore[arg-type]
            ),
            clock=lambda: self.now,
        )
        for backend in self.fleet:
            self.fleet.bring_in(backend)
        self.seen = 0

    def backend(self, number: int) -> Backend:
        return self.fleet.pool("decode")[number]

    def taking(self) -> list[Backend]:
        return [b for b in self.fleet.pool("decode") if b.up and not b.draining]

    def ejected(self) -> list[Backend]:
        return [b for b in self.taking() if b.outlier_stats["decode"].ejected(self.now)]

    @rule(number=NUMBERS, times=st.integers(1, 6), error=st.sampled_from(["cut", "failed", "busy", "unreachable"]))
    def fail(self, number: int, times: int, error: str) -> None:
        errors = {
            "cut": BackendCut("x"),
            "failed": BackendFailed("x", status=500),
            "busy": BackendBusy("x", status=503, retry_after=2),
            "unreachable": BackendUnreachable("x"),
        }
        for _ in range(times):
            self.fleet.failed(self.backend(number), errors[error], "decode")
            self.check_a_new_ejection()

    @rule(number=NUMBERS, times=st.integers(1, 6))
    def succeed(self, number: int, times: int) -> None:
        for _ in range(times):
            self.fleet.succeeded(self.backend(number), "decode")

    @rule(seconds=st.lists(st.sampled_from([0.01, 0.02, 0.5]), min_size=COUNT, max_size=COUNT))
    def run_streams(self, seconds: list[float]) -> None:
        for _ in range(5):
            for number, taken in enumerate(seconds):
                self.fleet.timed(self.backend(number), "decode", taken, 50)
                self.check_a_new_ejection()

    @rule(number=NUMBERS)
    def die(self, number: int) -> None:
        self.fleet.take_out(self.backend(number), "died")

    @rule(number=NUMBERS)
    def come_up(self, number: int) -> None:
        self.fleet.bring_in(self.backend(number))

    @rule(number=NUMBERS, back=st.booleans())
    def drain(self, number: int, back: bool) -> None:
        (self.fleet.undrain if back else self.fleet.drain)(self.backend(number))

    @rule(seconds=st.sampled_from([0.5, 5.0, 11.0, 40.0, 400.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    def check_a_new_ejection(self) -> None:
        count = sum(self.fleet.outlier_detector.ejections.values())
        if count > self.seen:
            self.seen = count
            assert len(self.ejected()) <= self.share * len(self.taking()), "never more than the share"
            assert len(self.ejected()) < len(self.taking()), "never the last"

    @invariant()
    def whoever_is_alive_can_be_used(self) -> None:
        taking, candidates = self.taking(), self.fleet.candidates("decode", None)
        assert set(candidates) <= set(taking)
        assert bool(candidates) == bool(taking)

    @invariant()
    def an_ejected_backend_gets_nothing_unless_the_pool_panics(self) -> None:
        if not dict(FleetView(self.fleet).panicking())["decode"]:
            assert not set(self.fleet.candidates("decode", None)) & set(self.ejected())

    @invariant()
    def factors_are_shares(self) -> None:
        self.fleet.candidates("decode", None)
        for backend in self.fleet:
            assert 0.1 <= backend.factor <= 1.0
            assert (backend.factor < 1.0) <= (backend.slow_since is not None)


AnyFleet.TestCase.settings = settings(
    max_examples=settings.default.max_examples * 3 // 5, stateful_step_count=40, deadline=None
)
TestAnyFleet = AnyFleet.TestCase
