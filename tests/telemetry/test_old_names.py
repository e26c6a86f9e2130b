"""Renamed metrics, under both names."""

from __future__ import annotations

import pytest
from pd_proxy.admission.admission import Admission
from pd_proxy.fleet.fleet import Fleet
from pd_proxy.fleet.view import FleetView
from pd_proxy.flow.decisions import Decisions
from pd_proxy.http.client_connections import Connections
from pd_proxy.prefix.index import PrefixIndex
from pd_proxy.settings.tree import Settings
from pd_proxy.telemetry.admission import AdmissionSink
from pd_proxy.telemetry.old_names import OLD_NAMES
from pd_proxy.telemetry.placement import PlacementSink
from pd_proxy.telemetry.prometheus import PrometheusSink, registry
from pd_proxy.telemetry.records import PrefixCounts
from pd_proxy.workers.metrics_merge import merge
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily

from tests.support import pools

PREFILL, DECODE = "http://prefill0:8000", "http://decode0:8000"


def scrape(*, old_names: bool) -> CollectorRegistry:
    """The metrics of a gateway in which each renamed metric has a sample."""
    settings = Settings(prefill=[PREFILL], decode=[DECODE])
    fleet = Fleet(settings)
    fleet.handoffs_pending = 3
    fleet.excused_checks["mass"] += 2
    fleet.warmups["ok"] += 4
    sink = PrometheusSink(FleetView(fleet), Connections())
    sink.handoff_released(True)
    sink.handoff_released(False)
    placement = PlacementSink(Decisions(), PrefixIndex(), PrefixCounts(), fleet)
    return registry(sink, AdmissionSink(Admission(settings)), placement, old_names=old_names)


@pytest.mark.parametrize(
    ("new", "new_labels", "old", "old_labels", "value"),
    [
        ("handoffs_pending", {}, "handoffs_in_limbo", {}, 3.0),
        (
            "handoffs_abandoned_total",
            {"outcome": "released"},
            "handoffs_released_total",
            {"outcome": "claimed"},
            1.0,
        ),
        (
            "handoffs_abandoned_total",
            {"outcome": "left_to_expire"},
            "handoffs_released_total",
            {"outcome": "left"},
            1.0,
        ),
        (
            "backend_handoff_verified",
            {"pool": "decode", "backend": DECODE},
            "backend_handed_over",
            {"pool": "decode", "backend": DECODE},
            0.0,
        ),
        ("pair_warmups_total", {"result": "ok"}, "warmups_total", {"found": "ok"}, 4.0),
        (
            "health_checks_ignored_total",
            {"reason": "mass_failure"},
            "health_checks_excused_total",
            {"cause": "mass"},
            2.0,
        ),
        (
            "health_checks_ignored_total",
            {"reason": "gateway_delayed"},
            "health_checks_excused_total",
            {"cause": "late"},
            0.0,
        ),
        ("prefix_index_invalidations_total", {}, "prefix_index_forgotten_total", {}, 0.0),
    ],
)
def test_both_names_have_the_same_value(
    new: str, new_labels: dict[str, str], old: str, old_labels: dict[str, str], value: float
) -> None:
    found = scrape(old_names=True)
    assert found.get_sample_value(f"pd_proxy_{new}", new_labels) == value
    assert found.get_sample_value(f"pd_proxy_{old}", old_labels) == value


def test_every_renamed_metric_is_shown_once_under_each_name() -> None:
    names = [family.name for family in scrape(old_names=True).collect()]
    for new, old in OLD_NAMES.items():
        assert (names.count(new), names.count(old.name)) == (1, 1)


def test_without_the_old_names_only_the_new_ones_are_shown() -> None:
    names = {family.name for family in scrape(old_names=False).collect()}
    assert names >= OLD_NAMES.keys()
    assert names.isdisjoint(old.name for old in OLD_NAMES.values())


@pytest.mark.parametrize("new", sorted(OLD_NAMES))
def test_workers_metrics_are_merged_in_the_same_way_under_both_names(new: str) -> None:
    """A gauge that is not summed over workers must not be summed under its old name."""
    names = (new, OLD_NAMES[new].name)
    pages = [[GaugeMetricFamily(name, "Text.", value=value) for name in names] for value in (1.0, 2.0)]
    merged = [family.samples[0].value for family in merge(pages)]
    assert merged[0] == merged[1]


def test_the_help_text_of_an_old_name_says_which_name_to_use() -> None:
    text = generate_latest(scrape(old_names=True)).decode()
    assert "# HELP pd_proxy_handoffs_in_limbo Deprecated: use pd_proxy_handoffs_pending. " in text


@pytest.mark.parametrize(("more", "shown"), [({}, True), ({"metrics": {"old_names": False}}, False)])
async def test_a_setting_decides_whether_the_old_names_are_shown(more: dict[str, object], shown: bool) -> None:
    async with pools(**more) as (running, _, _):
        metrics = await running.metrics()
    assert metrics["pd_proxy_handoffs_pending"] == 0
    assert ("pd_proxy_handoffs_in_limbo" in metrics) is shown
