"""The sinks that take the records of requests, and the registry of /metrics."""

from __future__ import annotations

import msgspec
from prometheus_client import CollectorRegistry

from pd_proxy.admission.admission import Admission
from pd_proxy.assembly.placement import Placement
from pd_proxy.fleet.fleet import Fleet
from pd_proxy.fleet.view import FleetView
from pd_proxy.http.client_connections import Connections
from pd_proxy.settings.tree import Settings
from pd_proxy.telemetry.admission import AdmissionSink
from pd_proxy.telemetry.logs import RequestLog
from pd_proxy.telemetry.placement import PlacementSink
from pd_proxy.telemetry.prometheus import PrometheusSink, registry
from pd_proxy.telemetry.records import Sink, Sinks, Telemetry
from pd_proxy.telemetry.throughput import Throughput


class Metrics(msgspec.Struct, frozen=True):
    """The sinks of a gateway.

    Attributes:
        telemetry: all sinks as one; takes the record of every request.
        prometheus: counters and histograms of requests.
        throughput: the figures of the log's throughput line.
        registry: what /metrics shows, of this worker alone.
    """

    telemetry: Telemetry
    prometheus: PrometheusSink
    throughput: Throughput
    registry: CollectorRegistry


def make_metrics(
    settings: Settings, fleet: Fleet, admission: Admission, connections: Connections, placement: Placement, *more: Sink
) -> Metrics:
    """Make the sinks, and the registry with those that /metrics shows.

    Arguments:
        more: other parts that take the records of requests.
    """
    prometheus = PrometheusSink(FleetView(fleet), connections)
    queue = AdmissionSink(admission)
    throughput = Throughput(prometheus.tokens_streamed)
    telemetry = Sinks(prometheus, queue, RequestLog(settings.access_log), *more, throughput)
    prompts = placement.prompts
    placed = PlacementSink(placement.placing.decisions, prompts.index, prompts.counts, fleet)
    return Metrics(
        telemetry,
        prometheus,
        throughput,
        registry(prometheus, queue, placed, old_names=settings.metrics.old_names),
    )
