"""What is learnt of engines' speeds from their legs."""

from __future__ import annotations

from math import inf, isfinite
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pd_proxy.fleet.fit import Fit
from pd_proxy.fleet.pool_speeds import PoolSpeeds
from pd_proxy.fleet.speeds import Speeds, join_pool

ABSURD = st.one_of(
    st.integers(-(10**30), 10**30),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from([0, -1, 1e30, -1e30, inf]),
)


class Engine:
    """An engine that prefills first come, first served, and the speeds that are learnt of it.

    Arguments:
        rate: tokens a second; `growth`: tokens before a token at which attention costs as much as the rest.
        each: seconds that any leg takes besides.
    """

    def __init__(self, pool: PoolSpeeds, rate: float, growth: float = inf, each: float = 0.0) -> None:
        self.speeds = join_pool(pool)
        self.rate, self.growth, self.each = rate, growth, each
        self.now = 0.0

    def seconds(self, uncached: int, prompt: int) -> float:
        return self.each + uncached * (1 + (prompt - uncached / 2) / self.growth) / self.rate

    def prefill(self, uncached: int, prompt: int | None = None, noise: float = 1.0, queued: int = 1) -> None:
        """Some legs that are given at once and answered one after the other."""
        prompt = uncached if prompt is None else prompt
        for _ in range(queued):
            self.speeds.given(uncached, self.now, prompt)
        for _ in range(queued):
            self.now += self.seconds(uncached, prompt) * noise
            self.speeds.answered(uncached, uncached, prompt, self.now)

    def decode(self, seconds: float, sequences: int = 10, tokens: int = 20_000) -> None:
        self.now += 1.0
        self.speeds.stepped(seconds, sequences, tokens, self.now)


def settled(rate: float = 10_000.0, legs: int = 40) -> Engine:
    engine = Engine(PoolSpeeds(), rate)
    for _ in range(legs):
        engine.prefill(1000)
    return engine


# Prefill


@pytest.mark.parametrize("rate", [500.0, 8_000.0, 60_000.0])
@pytest.mark.parametrize("queued", [1, 5])
def test_the_rate_is_uncached_tokens_over_busy_seconds(rate: float, queued: int) -> None:
    engine, random = Engine(PoolSpeeds(), rate), Random(1)
    for _ in range(60):
        engine.prefill(random.randint(200, 4000), noise=random.uniform(0.8, 1.2), queued=queued)
        engine.now += random.random()  # it has nothing to do
    assert engine.speeds.rate == pytest.approx(rate, rel=0.1)


def test_only_what_was_not_cached_counts() -> None:
    engine = Engine(PoolSpeeds(), 10_000.0)
    for _ in range(40):
        engine.speeds.given(8000, engine.now, 8000)  # believed to be new
        engine.now += 0.1
        engine.speeds.answered(8000, 1000, 8000, engine.now)
    assert engine.speeds.rate == pytest.approx(10_000, rel=0.05)


def test_legs_that_are_computed_in_one_step_are_one_observation() -> None:
    engine = Engine(PoolSpeeds(), 10_000.0)
    for _ in range(30):
        for _ in range(4):
            engine.speeds.given(500, engine.now, 500)
        engine.now += 0.2
        for _ in range(4):  # all at the end of the step
            engine.speeds.answered(500, 500, 500, engine.now)
    assert engine.speeds.rate == pytest.approx(10_000, rel=0.02)


def test_attention_makes_long_prompts_dearer_and_what_each_leg_costs_is_told_apart() -> None:
    pool, random = PoolSpeeds(), Random(2)
    engine = Engine(pool, 12_000.0, growth=40_000.0, each=0.01)
    for n in range(300):
        prompt = 100_000 if n % 20 == 0 else random.choice([300, 600, 1000, 2000, 5000])
        engine.prefill(prompt if n % 3 else prompt // 8, prompt, noise=random.uniform(0.95, 1.05))
    for uncached, prompt in ((500, 500), (4000, 4000), (100_000, 100_000), (2000, 100_000), (50, 5000)):
        assert engine.speeds.seconds(uncached, prompt) == pytest.approx(engine.seconds(uncached, prompt), rel=0.2)


def test_until_it_was_seen_work_is_tokens() -> None:
    pool = PoolSpeeds()
    assert [pool.work(tokens, tokens) for tokens in (0, 1, 777, 100_000)] == [0, 1, 777, 100_000]
    engine = Engine(pool, 10_000.0)
    for _ in range(100):
        engine.prefill(1000)
    assert pool.work(1000, 1000) == pytest.approx(1000, rel=0.15)


@given(freak=st.one_of(st.floats(1e-9, 1e-3), st.floats(1e3, 1e9)), legs=st.integers(5, 60))
def test_one_freak_leg_moves_the_rate_little(freak: float, legs: int) -> None:
    engine = settled(legs=legs)
    before = engine.speeds.rate
    engine.prefill(1000, noise=freak)
    assert 1 / 1.3 < engine.speeds.rate / before < 1.3
    for _ in range(15):
        engine.prefill(1000)
    assert engine.speeds.rate == pytest.approx(before, rel=0.1)


@pytest.mark.parametrize("change", [0.2, 0.5, 3.0])
def test_an_engine_that_has_changed_is_followed(change: float) -> None:
    engine = settled()
    engine.rate *= change
    for _ in range(25):
        engine.prefill(1000)
    assert engine.speeds.rate == pytest.approx(engine.rate, rel=0.2)


def test_an_engine_that_was_warming_up_at_its_first_leg_is_known_soon() -> None:
    engine = Engine(PoolSpeeds(), 10_000.0)
    engine.prefill(1000, noise=200.0)  # it compiled its kernels
    for _ in range(25):
        engine.prefill(1000)
    assert engine.speeds.rate == pytest.approx(10_000, rel=0.2)


# What is outstanding


def test_what_is_ahead_is_the_work_that_is_left_of_what_was_given() -> None:
    engine = settled()
    speeds, now = engine.speeds, engine.now
    assert speeds.ahead(now) == 0.0
    speeds.given(20_000, now, 20_000)
    speeds.given(1_000, now, 1_000)
    each = speeds.seconds(1_000, 1_000)
    total = speeds.ahead(now)
    assert total == pytest.approx(speeds.seconds(20_000, 20_000) + each, rel=0.01)
    assert speeds.ahead(now + 0.5) == pytest.approx(total - 0.5)
    # The second leg cannot have begun while the first has not ended, however long that takes.
    assert speeds.ahead(now + total) == pytest.approx(each, rel=0.05)
    speeds.answered(20_000, 20_000, 20_000, now + 2.0)
    assert speeds.ahead(now + 2.0) == pytest.approx(each, rel=0.1)


def test_an_engine_that_does_not_answer_is_not_taken_for_idle() -> None:
    engine = settled()
    engine.speeds.given(1000, engine.now, 1000)
    waits = [engine.speeds.ahead(engine.now + late) for late in (0.1, 5.0, 20.0)]
    assert waits[0] < 0.1
    assert waits[1] > 1.0
    assert waits[2] > 15.0
    assert engine.speeds.ahead(engine.now + 10_000.0) == 0.0, "it was lost, not late"


@given(st.lists(st.tuples(st.integers(0, 5000), st.booleans()), max_size=20), st.randoms(use_true_random=False))
def test_what_has_ended_is_not_outstanding(legs: list[tuple[int, bool]], random: Random) -> None:
    speeds, now = join_pool(PoolSpeeds()), 0.0
    for tokens, _ in legs:
        speeds.given(tokens, now, tokens)
    random.shuffle(legs)
    for n, (tokens, well) in enumerate(legs):
        assert speeds.outstanding == sum(left for left, _ in legs[n:])
        now += 0.01
        if well:
            speeds.answered(tokens, tokens, tokens, now)
        else:
            speeds.withdrawn(tokens, now)
    assert speeds.outstanding == 0
    assert speeds.ahead(now) == 0.0


def test_a_leg_that_was_withdrawn_says_nothing_of_the_rate() -> None:
    engine = settled()
    before = engine.speeds.rate
    engine.speeds.given(1000, engine.now, 1000)
    engine.speeds.withdrawn(1000, engine.now + 100.0)
    assert engine.speeds.rate == before


def test_what_other_workers_have_outstanding_is_ahead_too() -> None:
    engine = settled()
    speeds, now = engine.speeds, engine.now
    speeds.note_elsewhere(5000, now)
    assert speeds.ahead(now) == pytest.approx(5000 / speeds.rate)
    speeds.given(1000, now, 1000)
    assert speeds.ahead(now) == pytest.approx(5000 / speeds.rate + speeds.seconds(1000, 1000), rel=0.01)
    speeds.withdrawn(1000, now)
    speeds.note_elsewhere(0, 0.0)
    assert speeds.ahead(now) == 0.0


def test_what_other_workers_have_outstanding_is_done_in_time_too() -> None:
    engine = settled()
    speeds, now = engine.speeds, engine.now
    whole = 5000 / speeds.rate
    speeds.note_elsewhere(5000, now - 0.5 * whole)
    assert speeds.ahead(now) == pytest.approx(0.5 * whole)
    assert speeds.ahead(now + 0.6 * whole) == 0.0
    speeds.note_elsewhere(50_000, now)  # only the first can be partly done
    assert speeds.ahead(now + 20 * whole) >= 40_000 / speeds.rate


def test_the_engines_time_is_shared_with_what_other_workers_have_it_do() -> None:
    engine = Engine(PoolSpeeds(), 10_000.0)
    for _ in range(60):
        engine.speeds.note_elsewhere(1000, engine.now)
        engine.speeds.given(1000, engine.now, 1000)
        engine.now += 0.2  # for both
        engine.speeds.answered(1000, 1000, 1000, engine.now)
    assert engine.speeds.rate == pytest.approx(10_000, rel=0.05)


def test_the_time_of_other_workers_legs_that_went_before_is_theirs() -> None:
    engine = Engine(PoolSpeeds(), 10_000.0)
    for _ in range(60):
        engine.speeds.note_elsewhere(1000, engine.now)
        engine.speeds.given(1000, engine.now, 1000)
        engine.now += 0.1
        engine.speeds.note_elsewhere(0, engine.now)
        assert engine.speeds.ahead(engine.now) == pytest.approx(0.1, rel=0.5)
        engine.now += 0.1
        engine.speeds.answered(1000, 1000, 1000, engine.now)
    assert engine.speeds.rate == pytest.approx(10_000, rel=0.05)


# Decode


def test_a_step_is_fitted_for_the_pool_and_each_engine_has_its_factor() -> None:
    pool, random = PoolSpeeds(), Random(3)
    engines = [(Engine(pool, 1.0), factor) for factor in (1.0, 1.0, 1.0, 2.0)]
    for _ in range(150):
        for engine, factor in engines:
            sequences = random.randint(1, 64)
            tokens = sequences * random.randint(300, 4000)
            seconds = factor * (0.012 + 1e-4 * sequences + 5e-8 * tokens)
            engine.decode(seconds * random.uniform(0.9, 1.1), sequences, tokens)
    for engine, factor in engines:
        assert engine.speeds.slowness == pytest.approx(factor, rel=0.1)
        assert engine.speeds.step(32, 60_000) == pytest.approx(factor * 0.0182, rel=0.1)
        assert engine.speeds.step(1, 500) == pytest.approx(factor * 0.0121, rel=0.15)
        assert engine.speeds.step_base <= engine.speeds.step(1, 500)


def test_one_freak_gap_moves_the_step_little_and_a_slower_engine_is_followed() -> None:
    engine = Engine(PoolSpeeds(), 1.0)
    for _ in range(30):
        engine.decode(0.02)
    before = engine.speeds.step(10, 20_000)
    assert before == pytest.approx(0.02, rel=0.02)
    engine.decode(30.0)
    assert engine.speeds.step(10, 20_000) < 1.15 * before
    for _ in range(12):
        engine.decode(0.06)
    assert engine.speeds.step(10, 20_000) == pytest.approx(0.06, rel=0.15)
    assert engine.speeds.gap == pytest.approx(0.06, rel=0.15)


def test_hand_offs_are_fitted_by_tokens() -> None:
    speeds = join_pool(PoolSpeeds())
    assert speeds.handoff(10_000) == 0.0, "nothing is known"
    for n in range(60):
        tokens = (1000, 8000, 50_000)[n % 3]
        speeds.handed_over(0.02 + tokens * 4e-6, tokens, float(n))
    assert speeds.handoff(20_000) == pytest.approx(0.1, rel=0.2)
    assert speeds.handoff(1000) == pytest.approx(0.024, rel=0.3)


# Coming and going


def test_a_new_engine_is_the_pools_median_until_its_own_speed_is_known() -> None:
    pool = PoolSpeeds()
    old = [Engine(pool, rate) for rate in (4_000.0, 10_000.0, 11_000.0)]
    for engine, step in zip(old, (0.05, 0.02, 0.018), strict=True):
        for _ in range(20):
            engine.prefill(1000)
            engine.decode(step)
    new = Engine(pool, 5_000.0)
    assert new.speeds.rate == pytest.approx(10_000, rel=0.05)
    assert new.speeds.slowness == pytest.approx(1.0)
    new.prefill(1000, noise=100.0)
    assert new.speeds.rate > 2_500, "its first leg says something, but not everything"
    for _ in range(25):
        new.prefill(1000)
    assert new.speeds.rate == pytest.approx(5_000, rel=0.2)


def test_engines_that_nothing_is_known_of_follow_the_first_one_that_is_known() -> None:
    pool = PoolSpeeds()
    known, idle = Engine(pool, 3_000.0), Engine(pool, 1.0)
    for _ in range(10):
        known.prefill(1000)
    assert idle.speeds.rate == pytest.approx(known.speeds.rate, rel=0.2)


def test_speeds_are_kept_through_a_short_outage_and_forgotten_in_a_long_one() -> None:
    pool = PoolSpeeds()
    slow, *others = [Engine(pool, rate) for rate in (2_000.0, 10_000.0, 10_000.0)]
    for engine in (slow, *others):
        for _ in range(20):
            engine.prefill(1000)
    slow.speeds.given(5000, slow.now, 5000)
    slow.speeds.left(slow.now)
    assert slow.speeds.ahead(slow.now) == 0.0, "what it had is lost"
    slow.speeds.returned(slow.now + 5.0)
    assert slow.speeds.rate == pytest.approx(2_000, rel=0.05)
    slow.speeds.left(slow.now)
    slow.speeds.returned(slow.now + 1000.0)
    assert slow.speeds.rate == pytest.approx(10_000, rel=0.05)


def test_an_engine_that_has_left_is_no_part_of_the_median() -> None:
    pool = PoolSpeeds()
    engines = [Engine(pool, rate) for rate in (2_000.0, 10_000.0)]
    for engine in engines:
        for _ in range(20):
            engine.prefill(1000)
    pool.leave(engines[0].speeds)
    pool.leave(engines[0].speeds)
    assert 1 / pool.pace == pytest.approx(10_000, rel=0.05)


# Bounds


@given(
    calls=st.lists(
        st.tuples(st.sampled_from(["given", "answered", "withdrawn", "stepped", "handed_over", "elsewhere"]), ABSURD)
        .flatmap(lambda pair: st.tuples(st.just(pair[0]), st.just(pair[1]), ABSURD, ABSURD, st.floats(-1e3, 1e9)))
        .map(tuple),
        max_size=30,
    )
)
def test_absurd_reports_are_bounded(calls: list[tuple[str, float, float, float, float]]) -> None:
    speeds = join_pool(PoolSpeeds())
    for name, one, two, three, now in calls:
        if name == "given":
            speeds.given(one, now, two)  # type: ignore[arg-type]
        elif name == "answered":
            speeds.answered(one, two, three, now)  # type: ignore[arg-type]
        elif name == "withdrawn":
            speeds.withdrawn(one, now)  # type: ignore[arg-type]
        elif name == "stepped":
            speeds.stepped(one, two, three, now)  # type: ignore[arg-type]
        elif name == "handed_over":
            speeds.handed_over(one, two, now)  # type: ignore[arg-type]
        else:
            speeds.note_elsewhere(one, now)  # type: ignore[arg-type]
    sane(speeds)


def sane(speeds: Speeds) -> None:
    assert 1.0 <= speeds.rate <= 1e8
    assert 0 < speeds.slowness < 1e9
    assert 0 <= speeds.seconds(1000, 1000) < 1e9
    assert 0 < speeds.step(10, 10_000) < 1e9
    assert 0 <= speeds.handoff(1000) < 1e9
    for value in (speeds.step_base, speeds.step_token, speeds.free_at, speeds.rest, speeds.ahead(1e9)):
        assert isfinite(value)
    assert speeds.rest >= 0 <= speeds.ahead(0.0)


def test_more_cached_than_there_was_prompt_counts_as_all_of_it() -> None:
    speeds = settled().speeds
    before = speeds.rate
    speeds.given(1000, 100.0, 1000)
    speeds.answered(1000, -50, 1000, 100.1)
    assert speeds.rate == before, "nothing was computed"


# The fit


@given(
    true=st.tuples(st.floats(0, 5), st.floats(0, 5), st.floats(0, 5)).filter(lambda each: sum(each) > 0.5),
    seed=st.integers(0, 100),
)
def test_a_fit_finds_the_coefficients_and_none_is_negative(true: tuple[float, float, float], seed: int) -> None:
    fit, random = Fit((1.0, 1.0, 1.0), (1.0, 1.0, 1.0)), Random(seed)
    for _ in range(400):
        x = [random.random(), random.random(), random.random()]
        value = sum(a * b for a, b in zip(true, x, strict=True))
        expected = sum(a * b for a, b in zip(fit.coefficients, x, strict=True))
        fit.note(x[0], x[1], x[2], value, max(expected, 1e-6))
    assert all(each >= 0 for each in fit.coefficients)
    for each, found in zip(true, fit.coefficients, strict=True):
        assert found == pytest.approx(each, abs=0.15 * sum(true))


def test_gaps_with_prefills_chunks_in_them_do_not_make_an_engine_slow() -> None:
    engine = Engine(PoolSpeeds(), 10_000.0)
    for _ in range(20):
        engine.decode(0.02)
    before = engine.speeds.step(10, 20_000)
    for _ in range(20):
        engine.speeds.given(2000, engine.now, 2000)
        engine.decode(0.2)
        engine.speeds.answered(2000, 2000, 2000, engine.now)
    assert engine.speeds.step(10, 20_000) == before
    assert engine.speeds.gap > 0.15, "they are what its streams have"
    assert engine.speeds.disturbed(engine.now) > 0.5
    assert engine.speeds.disturbed(engine.now + 100.0) < 0.01


def test_a_first_leg_beside_other_workers_is_counted_from_now() -> None:
    speeds = join_pool(PoolSpeeds())
    speeds.note_elsewhere(4000, 40.0)
    speeds.given(1000, 50.0, 1000)
    assert isfinite(speeds.free_at) and speeds.ahead(50.0) > 0


def test_engines_that_differ_by_a_few_per_cent_are_alike_and_others_are_not() -> None:
    pool = PoolSpeeds()
    some = [Engine(pool, 10_000.0) for _ in range(4)]
    for _ in range(60):
        for engine, step in zip(some, (0.0200, 0.0203, 0.0198, 0.0300), strict=True):
            engine.decode(step)
    first, second, third, slow = (engine.speeds.step_base for engine in some)
    assert first == second == third
    assert slow > 1.2 * first
