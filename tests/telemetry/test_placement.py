"""The metrics of placement."""

from __future__ import annotations

from collections import Counter

import pytest
from pd_proxy.fleet.backend import Backend
from pd_proxy.fleet.pool_speeds import PoolSpeeds
from pd_proxy.fleet.speeds import join_pool
from pd_proxy.flow.decisions import Decisions
from pd_proxy.prefix.chain import chain_of
from pd_proxy.prefix.index import PrefixIndex
from pd_proxy.requests.body import read_body
from pd_proxy.telemetry.placement import PlacementSink
from pd_proxy.telemetry.prometheus import registry
from pd_proxy.telemetry.records import PrefixCounts
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

NOW = 500.0


class Scene:
    """A sink, and everything that it reads."""

    def __init__(self) -> None:
        pools = {"prefill": PoolSpeeds(), "decode": PoolSpeeds()}
        self.fleet = [
            Backend("http://p:1", "prefill", speeds=join_pool(pools["prefill"])),
            Backend("http://d:1", "decode", speeds=join_pool(pools["decode"])),
        ]
        self.decisions = Decisions()
        self.index = PrefixIndex()
        for backend in self.fleet:
            self.index.join(backend.url, 100_000)
        self.found = PrefixCounts()
        self.registry = registry(PlacementSink(self.decisions, self.index, self.found, self.fleet, lambda: NOW))

    def values(self) -> dict[tuple[str, ...], float]:
        """Samples by name and label values, in the order of the labels' names."""
        families = text_string_to_metric_families(generate_latest(self.registry).decode())
        return {
            (sample.name, *(sample.labels[name] for name in sorted(sample.labels))): sample.value
            for family in families
            for sample in family.samples
            if sample.name.startswith("pd_proxy_")
        }


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_decisions_are_shown_by_pool_and_reason(scene: Scene) -> None:
    scene.decisions.counts = Counter({("decode", "cached"): 3, ("none", "none"): 1})
    scene.decisions.local = Counter({("decode", "local_short"): 2})
    values = scene.values()
    assert values["pd_proxy_placement_decisions_total", "cached", "decode"] == 3
    assert values["pd_proxy_placement_decisions_total", "none", "none"] == 1
    assert values["pd_proxy_local_prefills_total", "local_short", "decode"] == 2


def test_expected_and_actual_cache_hits_are_shown(scene: Scene) -> None:
    scene.found.note("prefill", "http://p:1", 800, 1000)
    scene.found.note("prefill", "http://p:1", 100, 0)
    values = scene.values()
    assert values["pd_proxy_prefix_expected_tokens_total", "http://p:1", "prefill"] == 900
    assert values["pd_proxy_prefix_cached_tokens_total", "http://p:1", "prefill"] == 1000
    scene.found.forget("http://p:1")
    assert ("pd_proxy_prefix_cached_tokens_total", "http://p:1", "prefill") not in scene.values()


def test_the_figures_of_the_prefix_index_are_shown(scene: Scene) -> None:
    empty = scene.values()
    assert empty["pd_proxy_prefix_index_entries",] == empty["pd_proxy_prefix_index_oldest_seconds",] == 0
    text = "The same long prompt. " * 400
    body = read_body(b'{"model":"m","messages":[{"role":"user","content":"%b"}]}' % text.encode(), "chat")
    chain = chain_of(body, b"k" * 16)
    scene.index.enter("http://p:1", chain, NOW - 60)
    scene.index.enter("http://d:1", chain, NOW)
    values = scene.values()
    assert values["pd_proxy_prefix_index_entries",] == 2 * values["pd_proxy_prefix_index_blocks",] > 0
    assert values["pd_proxy_prefix_index_bytes",] > 0
    assert 0 <= values["pd_proxy_prefix_index_oldest_seconds",] <= 60
    assert values["pd_proxy_prefix_index_tokens", "http://p:1", "prefill"] > 1000
    assert values["pd_proxy_prefix_index_evictions_total",] == 0
    assert values["pd_proxy_prefix_reports_refused_total",] == 0


def test_speeds_are_shown_once_they_are_learnt(scene: Scene) -> None:
    before = scene.values()
    assert ("pd_proxy_backend_prefill_tokens_per_second", "http://p:1", "prefill") not in before
    assert ("pd_proxy_backend_decode_step_ratio", "http://d:1", "decode") not in before
    assert before["pd_proxy_backend_prefill_wait_seconds", "http://p:1", "prefill"] == 0
    prefill, decode = scene.fleet
    for leg in range(20):
        prefill.speeds.given(1000, leg, 1000)
        prefill.speeds.answered(1000, 1000, 1000, leg + 0.1)
        decode.speeds.stepped(0.02, 4, 4000, leg)
    prefill.speeds.given(5000, NOW, 5000)
    after = scene.values()
    assert 8_000 < after["pd_proxy_backend_prefill_tokens_per_second", "http://p:1", "prefill"] < 13_000
    assert after["pd_proxy_backend_decode_step_ratio", "http://d:1", "decode"] == 1
    assert after["pd_proxy_backend_prefill_wait_seconds", "http://p:1", "prefill"] > 0.3
