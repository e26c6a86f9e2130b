"""One page of metrics from those of several workers."""

from __future__ import annotations

from pd_proxy.workers.metrics_merge import counts_of, merge, parse, render
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric


def page(count: float, up: float, *, inflight: float = 1, label: str = "ok") -> list[Metric]:
    requests = CounterMetricFamily("pd_proxy_requests", "Requests.", labels=("outcome",))
    requests.add_metric((label,), count)
    times = HistogramMetricFamily("pd_proxy_times", "Times.", labels=())
    times.add_metric((), [("0.1", count), ("+Inf", count + 1)], 3.5)
    gauge = GaugeMetricFamily("pd_proxy_backend_up", "Up.", labels=("backend",))
    gauge.add_metric(("http://a",), up)
    running = GaugeMetricFamily("pd_proxy_backend_inflight_requests", "Legs.", value=inflight)
    return [requests, times, gauge, running]


def values(families: list[Metric]) -> dict[str, float]:
    return {
        s.name + ",".join(f"{k}={v}" for k, v in s.labels.items()): s.value
        for family in families
        for s in family.samples
    }


def test_counters_are_summed_and_of_states_the_most_cautious_is_shown() -> None:
    assert values(merge([page(3, 1), page(4, 0, inflight=5)])) == {
        "pd_proxy_requests_totaloutcome=ok": 7,
        "pd_proxy_times_bucketle=0.1": 7,
        "pd_proxy_times_bucketle=+Inf": 9,
        "pd_proxy_times_count": 9,
        "pd_proxy_times_sum": 7,
        "pd_proxy_backend_upbackend=http://a": 0,
        "pd_proxy_backend_inflight_requests": 6,
    }


def test_a_pair_that_works_for_one_worker_is_shown_as_working() -> None:
    gauges = [GaugeMetricFamily("pd_proxy_backend_handoff_verified", "Ever.", value=ever) for ever in (1.0, 0.0)]
    assert values(merge([[gauge] for gauge in gauges])) == {"pd_proxy_backend_handoff_verified": 1}


def test_a_metric_that_only_one_worker_has_is_shown() -> None:
    merged = values(merge([page(3, 1), page(2, 1, label="error")]))
    assert merged["pd_proxy_requests_totaloutcome=ok"] == 3
    assert merged["pd_proxy_requests_totaloutcome=error"] == 2


def test_a_received_page_merges_like_metric_families() -> None:
    direct = merge([page(3, 1), page(4, 1)])
    sent = merge([page(3, 1), parse(render(page(4, 1)))])
    assert render(direct) == render(sent)


def test_only_the_counters_of_an_ended_worker_remain() -> None:
    kept = values(parse(counts_of(render(page(3, 1)))))
    assert set(kept) == {
        "pd_proxy_requests_totaloutcome=ok",
        "pd_proxy_times_bucketle=0.1",
        "pd_proxy_times_bucketle=+Inf",
        "pd_proxy_times_count",
        "pd_proxy_times_sum",
    }
