"""Merges the metrics pages of several workers into one.

Counters, histograms and gauges that count something are summed. Of gauges that state a condition the most cautious
value is shown: a backend is up only where every worker says so.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable

from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

_LEAST = {"pd_proxy_backend_up", "pd_proxy_ready", "pd_proxy_group_ready", "process_start_time_seconds"}
_MOST = {
    *("pd_proxy_build_info", "pd_proxy_pool_panic", "pd_proxy_backend_state"),
    *("pd_proxy_backend_handoff_verified", "pd_proxy_backend_handed_over"),
    *("pd_proxy_prefix_index_entries", "pd_proxy_prefix_index_blocks", "pd_proxy_prefix_index_tokens"),
    *("pd_proxy_prefix_index_oldest_seconds", "pd_proxy_backend_prefill_tokens_per_second"),
    *("pd_proxy_backend_decode_step_ratio", "pd_proxy_backend_step_slowness", "pd_proxy_backend_prefill_wait_seconds"),
    *("python_info", "process_max_fds"),
}
"""The gauges of which the smallest value is shown, and those of which the greatest is. All others are summed."""


def parse(page: str) -> list[Metric]:
    """Parse a page in the Prometheus text format. Returns its metric families.

    Raises:
        ValueError: the page is not in that format.
    """
    return list(text_string_to_metric_families(page))


def merge(pages: Iterable[Iterable[Metric]]) -> list[Metric]:
    """Merge pages. Returns their families in order of first appearance, with one sample for each set of labels."""
    families: dict[str, Metric] = {}
    found: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], Sample]] = {}
    for page in pages:
        for family in page:
            if family.name not in families:
                families[family.name] = Metric(family.name, family.documentation, family.type)
                found[family.name] = {}
            samples, join = found[family.name], _join(family.name)
            for sample in family.samples:
                key = sample.name, tuple(sorted(sample.labels.items()))
                before = samples.get(key)
                samples[key] = sample if before is None else sample._replace(value=join(before.value, sample.value))
    for name, family in families.items():
        family.samples = list(found[name].values())
    return list(families.values())


def _join(name: str) -> Callable[[float, float], float]:
    if name in _LEAST:
        return min
    return max if name in _MOST else operator.add


def counts_of(page: str) -> str:
    """The counters and histograms of a page, in the text format. Only these stay true when their process has ended.

    Raises:
        ValueError: the page is not in the text format.
    """
    kept = [family for family in parse(page) if family.type in ("counter", "histogram")]
    return render(family for family in kept if not family.name.startswith("process_"))


def render(families: Iterable[Metric]) -> str:
    """Write metric families in the text format."""
    return generate_latest(_Page(families)).decode()


class _Page:
    """Families as a collector, which is what prometheus_client's encoder takes."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> list[Metric]:
        return self._families
