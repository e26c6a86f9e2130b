"""What admission shows to a scrape: who runs, who waits, for how long, and who is refused.

Labels stay bounded: reasons are the gateway's own words, clients are those of the settings.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from pd_proxy.telemetry.prometheus import Count, Histogram
from pd_proxy.telemetry.records import QUEUE_BOUNDS, RequestRecord


class AdmissionState(Protocol):
    """What a scrape reads of admission."""

    @property
    def requests(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def waiting(self) -> int: ...


class AdmissionSink(Collector):
    """Takes from the records what concerns admission, and shows it with admission's own gauges."""

    def __init__(self, admission: AdmissionState) -> None:
        self._admission = admission
        self._queued = Histogram(
            "pd_proxy_queue_duration_seconds",
            "How long requests waited in the gateway's queue before they were let in; 0 for those that need not wait.",
            (),
            QUEUE_BOUNDS,
        )
        self._refused = Count(
            "pd_proxy_refused",
            "Requests that admission turned away, at once or out of the queue, by the error's code and the client.",
            ("code", "client"),
        )
        self._best_effort = Count(
            "pd_proxy_best_effort",
            "Requests that could not meet their target for the first token and went behind those that could.",
            ("client",),
        )
        self._waited = self._queued.at()

    def finished(self, record: RequestRecord) -> None:
        if record.admitted:
            self._waited.observe(record.queued_seconds)
            if record.best_effort:
                self._best_effort.values[(record.client,)] += 1
        elif record.refused:
            self._refused.values[record.refused, record.client] += 1

    def collect(self) -> Iterator[Metric]:
        yield self._queued.collect()
        yield self._refused.collect()
        yield self._best_effort.collect()
        state = self._admission
        yield GaugeMetricFamily("pd_proxy_queue_length", "Requests in the gateway's queue.", value=state.waiting)
        yield GaugeMetricFamily("pd_proxy_running_requests", "Requests that were let in.", value=state.requests)
        yield GaugeMetricFamily("pd_proxy_running_tokens", "Their tokens, estimated.", value=state.tokens)

    def describe(self) -> Iterable[Metric]:
        return ()
