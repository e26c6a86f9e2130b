"""The engines of `bench.fleet`, its traffic, and its results by policy."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from bench.fleet import report
from bench.fleet.__main__ import measure, run
from bench.fleet.blocks import BLOCK, BlockCache
from bench.fleet.clock import Clock
from bench.fleet.decode import DecodeEngine, DecodeModel
from bench.fleet.fleet import simulate
from bench.fleet.gateway import POLICIES, Gateway
from bench.fleet.jobs import Job, Request
from bench.fleet.kinds import ALL, BY_NAME, HELD_OUT, TUNING, Change, Kind, trace
from bench.fleet.oracle import VARIANTS, Oracle
from bench.fleet.peers import PEERS
from bench.fleet.prefill import PrefillEngine, PrefillModel
from bench.fleet.prompts import Part, Prompt
from bench.fleet.traffic import agents, plain, tenants

PREFILL = PrefillModel(rate=1000.0, attention=0.0, chunk=1000, overhead=0.0, capacity=10 * BLOCK)
DECODE = DecodeModel(
    base=0.010,
    sequence=0.001,
    token=0.0,
    capacity=100_000,
    latency=0.1,
    pull=1000.0,
    prefill=replace(PREFILL, chunk=500),
)


def job(tokens: int, output: int = 10, stem: int = 1, time: float = 0.0) -> Job:
    return Job(Request(time, Prompt([Part(stem, tokens)]), output, 1.0, 1.0), time)


def test_events_of_one_time_are_handled_in_the_order_in_which_they_were_added() -> None:
    clock, seen = Clock(), list[str]()
    clock.at(2.0, seen.append, "c")
    clock.at(1.0, seen.append, "a")
    clock.at(1.0, seen.append, "b")
    clock.run(until=1.0)
    assert (seen, clock.now) == (["a", "b"], 1.0)


def test_prompts_share_exactly_the_blocks_before_their_first_difference() -> None:
    common, other = Part(1, 10 * BLOCK + 5), Part(2, 3 * BLOCK)
    first, second = Prompt([common, Part(3, 900)]), Prompt([common, Part(4, 900)])
    assert first.blocks[:10] == second.blocks[:10]
    assert not set(first.blocks[10:]) & set(second.blocks)
    # the same text at another place is another block
    assert not set(Prompt([other, common]).blocks[3:]) & set(first.blocks)
    assert not set(Prompt([common], "adapter").blocks) & set(first.blocks)
    longer = Prompt([common, Part(3, 5000)])
    assert longer.blocks[: len(first.blocks)] == first.blocks
    assert longer.chain.hashes[: len(first.chain.hashes)] == first.chain.hashes


def test_the_gateway_takes_four_bytes_for_a_token() -> None:
    assert Prompt([Part(1, 1000, 2.5)]).estimate == 625
    assert Prompt([Part(1, 1000, 6.0)]).estimate == 1500


def test_the_cache_evicts_the_end_of_the_least_recently_used_prompt() -> None:
    cache = BlockCache(6 * BLOCK)
    old, new = Prompt([Part(1, 4 * BLOCK)]).blocks, Prompt([Part(2, 4 * BLOCK)]).blocks
    cache.touch(old)
    cache.touch(new)
    assert (cache.matched(old), cache.matched(new)) == (2 * BLOCK, 4 * BLOCK)
    cache.touch(new[:1], taken=4 * BLOCK)
    assert (cache.matched(old), cache.matched(new)) == (0, 2 * BLOCK)


def test_prefill_is_first_come_first_served_in_chunks() -> None:
    clock, done = Clock(), list[tuple[int, float]]()
    engine = PrefillEngine(clock, PREFILL, lambda job: done.append((job.request.prompt.tokens, clock.now)))
    for tokens, stem in ((1500, 1), (300, 2), (300, 3)):
        engine.submit(job(tokens, stem=stem))
    assert engine.ahead() == pytest.approx(2.1)
    clock.run()
    # The second step has the rest of the first prompt, all of the second, and the beginning of the third.
    assert done == [(1500, pytest.approx(2.0)), (300, pytest.approx(2.0)), (300, pytest.approx(2.1))]


def test_prefill_computes_what_its_cache_lacks_and_always_the_last_token() -> None:
    clock, done = Clock(), list[Job]()
    engine = PrefillEngine(clock, PREFILL, done.append)
    for tokens in (8 * BLOCK, 8 * BLOCK, 9 * BLOCK):
        engine.submit(job(tokens))
    clock.run()
    assert [one.cached for one in done] == [0, 8 * BLOCK - 1, 8 * BLOCK]
    assert engine.restart() == []
    engine.submit(job(8 * BLOCK))
    clock.run()
    assert done[-1].cached == 0


def test_attention_makes_a_token_of_a_long_prompt_cost_more() -> None:
    model = PrefillModel()
    assert model.seconds(0, 100_000) == pytest.approx(100_000 / 6000 + 5.0)
    assert model.seconds(0, 50_000) + model.seconds(50_000, 50_000) == pytest.approx(model.seconds(0, 100_000))


def engine_of(clock: Clock, model: DecodeModel = DECODE) -> tuple[DecodeEngine, list[Job]]:
    ended: list[Job] = []
    return DecodeEngine(clock, model, lambda job: None, ended.append), ended


def remote(tokens: int, output: int, stem: int) -> Job:
    one = job(tokens, output, stem)
    one.prefill = 0
    return one


def test_decode_pulls_what_its_cache_lacks_and_takes_a_step_for_each_token() -> None:
    clock = Clock()
    engine, ended = engine_of(clock)
    one = remote(5 * BLOCK, 100, 1)
    engine.submit(one)
    clock.run()
    assert one.pulled == pytest.approx(0.1 + 5 * BLOCK / 1000)
    assert one.first == pytest.approx(one.pulled + 0.011)
    assert ended == [one]
    assert one.ended == pytest.approx(one.pulled + 100 * 0.011)
    again = remote(5 * BLOCK, 1, 1)
    begun = clock.now
    engine.submit(again)
    clock.run()
    assert again.pulled == pytest.approx(begun + 0.1)
    assert engine.used == pytest.approx(0.0, abs=1e-6)


def test_decode_steps_take_as_long_in_closed_form_as_computed_one_by_one() -> None:
    model = replace(DECODE, token=1e-5, latency=0.0, pull=1e12)
    clock = Clock()
    engine, ended = engine_of(clock, model)
    for stem, output in ((1, 50), (2, 100)):
        engine.submit(remote(1000, output, stem))
    clock.run()
    now, held, expected = 0.0, 2000.0, dict[int, float]()
    for number in range(100):
        count = 2 if number < 50 else 1
        now += model.step(count, held)
        held += count
        if number == 49:
            expected[50] = now
            held -= 1050
    expected[100] = now
    for one in ended:
        assert one.ended == pytest.approx(expected[one.request.output], rel=0.01)


def test_a_prompt_that_decode_computes_delays_its_streams() -> None:
    clock = Clock()
    engine, _ = engine_of(clock)
    stream, local = remote(128, 100, 1), job(1000, 5, 2)
    engine.submit(stream)
    clock.at(0.5, lambda _: engine.submit(local))
    clock.run()
    assert local.first == pytest.approx(0.5 + 1.0 + 2 * 0.011, rel=0.01)  # two steps of 500 tokens
    assert stream.ended == pytest.approx(stream.pulled + 100 * 0.011 + 1.0 + 5 * 0.001, rel=0.02)


def test_a_full_kv_cache_puts_the_youngest_sequence_back() -> None:
    clock = Clock()
    engine, ended = engine_of(clock, replace(DECODE, capacity=2 * 640 + 100, latency=0.0, pull=1e12))
    first, second = remote(640, 200, 1), remote(640, 200, 2)
    engine.submit(first)
    engine.submit(second)
    clock.run()
    assert (first.preempted, second.preempted) == (0, 1)
    assert ended == [first, second]
    assert second.first < second.ended - 1.0
    assert engine.preemptions == 1
    assert engine.used == pytest.approx(0.0, abs=1e-6)


def test_blocks_that_sequences_share_are_held_once() -> None:
    clock = Clock()
    engine, ended = engine_of(clock, replace(DECODE, capacity=1000, latency=0.0, pull=1e12))
    for _ in range(3):
        engine.submit(remote(640, 20, 1))
    assert engine.used == 640
    clock.run()
    assert len(ended) == 3


def test_a_slower_engine_takes_longer_from_then_on() -> None:
    clock = Clock()
    engine, _ = engine_of(clock, replace(DECODE, latency=0.0, pull=1e12))
    one = remote(128, 100, 1)
    engine.submit(one)
    clock.at(50 * 0.011, lambda _: engine.slow(3.0))
    clock.run()
    assert one.ended == pytest.approx(50 * 0.011 + 50 * 0.033, rel=1e-3)


SMALL = Kind(
    "small",
    "some of everything",
    lambda rng: tenants(rng, 60, 8.0, prompts=6, length=2000),
    prefill=(PrefillModel(),) * 2,
    decode=(DecodeModel(),) * 2,
    changes=(Change(2.0, "restart", "prefill", 0, 1.0), Change(3.0, "slow", "decode", 0, 2.0)),
)


@pytest.mark.parametrize("policy", [*POLICIES, *PEERS, "oracle"])
def test_every_request_is_answered_once_by_every_policy_and_a_restart_loses_none(policy: str) -> None:
    requests = SMALL.trace(Random(1))
    router = (
        Oracle(VARIANTS["greedy"]) if policy == "oracle" else PEERS[policy]() if policy in PEERS else Gateway(policy)
    )
    outcome = simulate(SMALL, requests, router)
    assert sorted(job.sent for job in outcome.jobs) == [request.time for request in requests]
    assert all(job.sent < job.first <= job.ended for job in outcome.jobs)
    if isinstance(router, Gateway):
        backends = (*router.prefill, *router.decode)
        assert [(one.inflight_requests, one.inflight_tokens, one.speeds.outstanding) for one in backends] == [
            (0, 0, 0)
        ] * 4


def test_a_run_is_the_same_each_time() -> None:
    found = [simulate(SMALL, SMALL.trace(Random(1)), Gateway("auto")) for _ in range(2)]
    assert [job.ended for job in found[0].jobs] == [job.ended for job in found[1].jobs]


def test_a_turn_of_a_session_comes_after_the_answer_before_it_and_begins_with_it() -> None:
    requests = agents(Random(1), 20, 1.0, turns=(3, 3))
    for request in requests:
        follow = request.follow
        assert follow is not None
        whole = (request.prompt.tokens + request.output) // BLOCK
        assert follow.prompt.blocks[: len(request.prompt.blocks)] == request.prompt.blocks
        assert len(follow.prompt.blocks) >= whole
    outcome = simulate(replace(SMALL, changes=()), requests, Gateway("auto"))
    sent = {job.request: job for job in outcome.jobs}
    assert all(
        sent[job.request.follow].sent == pytest.approx(job.ended + job.request.pause)
        for job in outcome.jobs
        if job.request.follow is not None
    )


def test_seeds_for_tuning_and_held_out_ones_are_different_and_make_different_traces() -> None:
    assert not set(TUNING) & set(HELD_OUT)
    assert len({kind.name for kind in ALL}) == len(ALL)
    one, two = (plain(Random(seed), 5, 1.0) for seed in (1, 2))
    assert [request.time for request in one] != [request.time for request in two]


def test_auto_misses_its_target_where_another_policy_is_better_by_more_than_a_point() -> None:
    def summary(auto: float, oracle: float, other: float) -> report.Summary:
        return report.Summary("tutorial", {"auto": auto, "oracle": oracle, "prefix": other}, [])

    assert summary(0.97, 1.0, 0.975).holds
    assert not summary(0.96, 1.0, 0.5).holds
    assert not summary(0.97, 1.0, 0.99).holds
    assert "**no**" in report.verdict_table([summary(0.96, 1.0, 0.5)])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tutorial", "mixed", "unlike", "shared", "agents", "ranks"])
def test_auto_is_near_the_oracle_on_held_out_seeds(kind: str) -> None:
    figures = [found for seed in HELD_OUT for found in measure((kind, seed, ("auto", "oracle", "least_loaded")))]
    (summary,) = report.summarise(figures)
    assert summary.ratio >= report.WANTED, f"{summary.goodput}"


@pytest.mark.slow
def test_the_command_prints_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        run(["--kind", "tutorial", "--policy", "auto", "--policy", "oracle", "--policy", "random", "--seed", "1"]) == 0
    )
    assert "auto/oracle" in capsys.readouterr().out
    assert set(BY_NAME) >= {"tutorial", "large"}
    assert trace(BY_NAME["tutorial"], 1)


def test_the_command_lists_its_kinds_of_traffic(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        run(["--help"])
    assert left.value.code == 0
    said = capsys.readouterr().out
    assert all(f"{kind.name}:" in said.replace("\n", "") for kind in ALL if " " not in kind.name)
