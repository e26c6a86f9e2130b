"""The metrics of admission: requests that run, wait and are refused, and the time that they waited.

The labels are bounded: reasons are a fixed set, and clients are those of the settings.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from pd_proxy.telemetry.families import Families, Reading, collect, gauge
from pd_proxy.telemetry.records import QUEUE_BOUNDS, RequestRecord


class AdmissionState(Protocol):
    """What a scrape reads of admission."""

    @property
    def requests(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def waiting(self) -> int: ...


QUEUE: tuple[Reading[AdmissionState], ...] = (
    gauge("pd_proxy_queue_length", "Requests in the gateway's queue.", lambda admission: admission.waiting),
    gauge(
        "pd_proxy_running_requests",
        "Requests that were admitted and have not ended.",
        lambda admission: admission.requests,
    ),
    gauge("pd_proxy_running_tokens", "Tokens of the running requests, estimated.", lambda admission: admission.tokens),
)
"""What a scrape reads of admission."""


class AdmissionSink(Collector):
    """Counts what the records say about admission, and shows it with admission's gauges."""

    def __init__(self, admission: AdmissionState) -> None:
        self._admission = admission
        self._families = Families()
        self._refused = self._families.count(
            "pd_proxy_refused",
            "Requests that admission refused, at once or out of the queue, by the error's code and the client.",
            *("code", "client"),
        )
        self._best_effort = self._families.count(
            "pd_proxy_best_effort",
            "Requests that could not meet their target for the first token and went behind those that could.",
            "client",
        )
        self._waited = self._families.histogram(
            "pd_proxy_queue_duration_seconds",
            "Time that requests waited in the gateway's queue before they were admitted; 0 without a wait.",
            QUEUE_BOUNDS,
        ).at()

    def finished(self, record: RequestRecord) -> None:
        if record.admitted:
            self._waited.observe(record.queued_seconds)
            if record.best_effort:
                self._best_effort.values[(record.client,)] += 1
        elif record.refused:
            self._refused.values[record.refused, record.client] += 1

    def collect(self) -> Iterator[Metric]:
        yield from self._families.collect()
        yield from collect(QUEUE, self._admission)

    def describe(self) -> Iterable[Metric]:
        return ()
