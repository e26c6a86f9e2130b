"""When one engine serves a request whole although a pair is available."""

from __future__ import annotations

from typing import Any

import pytest
from pd_proxy.placement.decide import REASONS, Decision, View, decide
from pd_proxy.placement.local import MOST, MOST_SPILT, SHORT, SPARE, has_time_to_spare

from tests.placement.support import Engine, ask, engines, learnt

NOW = 100.0
TARGETS: dict[str, Any] = {"ttft": 1.0, "tpot": 0.05}
AUTO = dict.fromkeys(("prefill", "decode", "mixed"), "auto")


class Fleet:
    """Two prefill and two decode engines of 10,000 tokens a second, and steps of 20 ms (40 ms with 64 sequences)."""

    def __init__(self, mixed: int = 0, known: bool = True) -> None:
        rates, steps = ([10_000.0] * 2, [0.02] * 2) if known else ((), ())
        self.prefill = learnt(rates, name="p") if known else engines(2, "p")
        self.decode = learnt((), steps, name="d") if known else engines(2, "d")
        self.mixed = learnt([10_000.0] * mixed, [0.02] * mixed, name="m")
        self.plain: list[Engine] | None = None
        self.busy()

    def busy(self, requests: int = 4) -> None:
        """Give every decode engine some requests, so that none is idle."""
        for engine in self.decode:
            for _ in range(requests):
                engine.decodes(1000)

    def queue(self, tokens: int) -> None:
        """Fill prefill: every engine has this many tokens to compute."""
        for engine in self.prefill:
            engine.prefills(tokens, NOW)

    def decided(self, asked: Any, *, local: bool = True, **more: Any) -> Decision[Engine]:
        pools = {"prefill": self.prefill, "decode": self.decode, "mixed": self.mixed}
        view = View(**pools, configured={role: len(pool) for role, pool in pools.items()}, plain=self.plain)
        decision = decide(view, asked, unsplittable="", policies={**AUTO, **more}, allow_local_prefill=local)
        assert decision.reason in REASONS
        assert decision.fallback == "", "it is no fallback"
        return decision


def prefilled_by(decision: Decision[Engine]) -> str:
    return decision.prefill.url if decision.prefill else decision.decode.url


def test_with_an_empty_queue_prefill_computes_the_prompt() -> None:
    fleet = Fleet()
    for prompt in (100, 1000, 2000, 10_000):
        assert prefilled_by(fleet.decided(ask(prompt, now=NOW, **TARGETS))) in ("http://p0", "http://p1")


def test_a_short_prompt_is_prefilled_by_decode_when_that_is_sooner() -> None:
    fleet = Fleet()
    fleet.queue(1000)
    decision = fleet.decided(ask(SHORT, now=NOW, **TARGETS))
    assert (decision.prefill, decision.reason, decision.pool) == (None, "local_short", "decode")
    assert fleet.decided(ask(SHORT + 1, now=NOW, **TARGETS)).prefill is not None, "that is not enough of a margin"


def test_a_burst_spills_to_decode() -> None:
    fleet = Fleet()
    fleet.queue(4000)
    decision = fleet.decided(ask(MOST, now=NOW, **TARGETS))
    assert (decision.prefill, decision.reason) == (None, "local_spill")
    assert fleet.decided(ask(MOST + 1, now=NOW, **TARGETS)).prefill is not None


def test_a_prompt_that_would_be_late_spills_to_decode_where_it_is_in_time() -> None:
    fleet = Fleet()
    fleet.queue(9000)
    assert fleet.decided(ask(MOST_SPILT, now=NOW, **TARGETS)).reason == "local_spill"
    assert fleet.decided(ask(MOST_SPILT + 1, now=NOW, **TARGETS)).prefill is not None
    close = Fleet()
    close.queue(500)
    asked = ask(MOST_SPILT, now=NOW, ttft=0.5, tpot=0.05)
    assert close.decided(asked).prefill is not None, "it would be late there, too, and hardly sooner"


def test_a_prompt_that_is_cached_on_another_engine_spills_only_for_a_larger_gain() -> None:
    fleet = Fleet()
    fleet.queue(2000)
    assert fleet.decided(ask(MOST, now=NOW, **TARGETS)).reason == "local_spill"
    assert fleet.decided(ask(MOST, now=NOW, cached={"http://elsewhere": 100}, **TARGETS)).prefill is not None


def test_prompts_that_decode_is_computing_count_as_waiting_time() -> None:
    fleet = Fleet()
    fleet.queue(4000)
    for engine in fleet.decode:
        engine.speeds.given(20_000, NOW, 20_000)
    assert fleet.decided(ask(MOST, now=NOW, **TARGETS)).prefill is not None


def test_a_well_cached_prompt_is_prefilled_where_it_is_cached() -> None:
    fleet = Fleet()
    fleet.queue(500)
    cached = {"http://d1": 20_000 - SHORT}
    decision = fleet.decided(ask(20_000, now=NOW, cached=cached, **TARGETS))
    assert (decision.decode.url, decision.reason) == ("http://d1", "local_cached")
    decision = fleet.decided(ask(20_000, now=NOW, cached=cached, avoid={"http://d1"}, **TARGETS))
    assert decision.prefill is not None, "it has failed the request"


def test_decode_that_has_no_time_to_spare_prefills_nothing() -> None:
    fleet = Fleet()
    fleet.queue(100_000)
    asked = ask(100, now=NOW, **TARGETS)
    assert fleet.decided(asked).prefill is None
    for engine in fleet.decode:  # observed recently
        engine.speeds.gap, engine.speeds.gap_at = 0.05, NOW - 1.0
    assert fleet.decided(asked).prefill is not None
    for engine in fleet.decode:
        engine.speeds.gap = SPARE * 0.05
    assert fleet.decided(asked).prefill is None, "the request would miss its target, and the streams do not yet"
    in_time = Fleet()
    in_time.queue(5000)
    assert in_time.decided(asked).prefill is None
    for engine in in_time.decode:
        engine.speeds.gap, engine.speeds.gap_at = SPARE * 0.05, NOW - 1.0
    assert in_time.decided(asked).prefill is not None
    for engine in fleet.decode:
        engine.speeds.gap = 0.0
    assert fleet.decided(asked).prefill is None
    fleet.busy(200)  # expected
    assert fleet.decided(asked).prefill is not None


def test_an_old_observation_is_ignored() -> None:
    fleet = Fleet()
    [engine, _] = fleet.decode
    engine.speeds.gap, engine.speeds.gap_at = 1.0, NOW - 100.0
    assert has_time_to_spare(engine, ask(100, now=NOW, **TARGETS))


def test_without_targets_decode_prefills_only_while_prefill_has_a_queue() -> None:
    fleet = Fleet()
    fleet.queue(4_000)
    for asked in (ask(50, now=NOW), ask(50, now=NOW, ttft=2.0), ask(50, now=NOW, tpot=0.05)):
        assert fleet.decided(asked).prefill is not None, "it would gain less than half a second"
    fleet.queue(6_000)
    assert fleet.decided(ask(50, now=NOW)).reason == "local_short"
    assert fleet.decided(ask(MOST, now=NOW)).prefill is None
    assert fleet.decided(ask(MOST + 1, now=NOW)).prefill is not None
    fleet.busy(120)
    assert fleet.decided(ask(50, now=NOW)).prefill is not None, "its step is far from its best"
    full = Fleet()
    full.queue(50_000)
    assert full.decided(ask(MOST_SPILT, now=NOW)).reason == "local_spill"


def test_while_no_speeds_are_known_prefill_computes_the_prompt() -> None:
    fleet = Fleet(known=False)
    fleet.queue(100_000)
    assert fleet.decided(ask(10, now=NOW, **TARGETS)).prefill is not None


@pytest.mark.parametrize("policy", ["least_loaded", "prefix"])
def test_only_auto_has_decode_prefill(policy: str) -> None:
    fleet = Fleet()
    fleet.queue(100_000)
    assert fleet.decided(ask(10, now=NOW, **TARGETS), prefill=policy).prefill is not None


def test_decode_does_not_prefill_where_that_is_forbidden() -> None:
    fleet = Fleet()
    fleet.queue(100_000)
    asked = ask(10, now=NOW, **TARGETS)
    assert fleet.decided(asked, local=False).prefill is not None, "fallback: reject"
    fleet.plain = []
    assert fleet.decided(asked).prefill is not None, "its connector does not let it"
    fleet.plain = fleet.decode[1:]
    fleet.decode[0].decodes(50_000)
    assert fleet.decided(asked).decode is fleet.decode[1]


# Mixed engines


def test_a_mixed_engine_joins_when_prefill_is_full() -> None:
    fleet = Fleet(mixed=2)
    assert fleet.decided(ask(5000, now=NOW, **TARGETS)).prefill is not None
    fleet.queue(20_000)
    fleet.mixed[0].prefills(10_000, NOW)
    decision = fleet.decided(ask(5000, now=NOW, **TARGETS))
    assert (decision.decode.url, decision.pool, decision.reason) == ("http://m1", "mixed", "mixed_sooner")
    avoiding = ask(5000, now=NOW, avoid={"http://m0", "http://m1"}, **TARGETS)
    assert fleet.decided(avoiding).pool == "decode"


def test_a_mixed_engine_joins_when_decode_is_full() -> None:
    fleet = Fleet(mixed=2)
    fleet.busy(100)
    fleet.mixed[1].decodes(1000)
    decision = fleet.decided(ask(5000, now=NOW, **TARGETS))
    assert (decision.decode.url, decision.reason) == ("http://m0", "mixed_spill")
    for engine in fleet.mixed:
        for _ in range(100):
            engine.decodes(1000)
    assert fleet.decided(ask(5000, now=NOW, **TARGETS)).pool == "decode"


def test_streams_are_paused_for_a_prefill_once_and_not_repeatedly() -> None:
    """By its step alone the engine would have time to spare after each stop."""
    fleet = Fleet()
    [engine, _] = fleet.decode
    speeds, asked = engine.speeds, ask(2000, now=NOW, **TARGETS)
    taken = 0
    while has_time_to_spare(engine, asked, speeds.seconds(2000, 2000)):
        speeds.given(2000, NOW, 2000)
        speeds.answered(2000, 2000, 2000, NOW)
        taken += 1
        assert taken < 100
    assert taken > 3
    later = ask(2000, now=NOW + 60.0, **TARGETS)
    assert has_time_to_spare(engine, later, speeds.seconds(2000, 2000))
