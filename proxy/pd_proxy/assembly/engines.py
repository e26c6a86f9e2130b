"""The parts that send requests to engines: the legs of requests, health checks and warm-ups."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from pd_proxy.assembly.connectors import Connectors
from pd_proxy.assembly.messages import EngineMessages
from pd_proxy.assembly.metrics import Metrics
from pd_proxy.assembly.peers import Peers
from pd_proxy.assembly.placement import Placement
from pd_proxy.fleet.backend import Backend
from pd_proxy.fleet.fleet import Fleet
from pd_proxy.fleet.health.prober import Prober
from pd_proxy.flow.hops import Hops
from pd_proxy.flow.legs import Legs
from pd_proxy.flow.warmup import Warmup
from pd_proxy.http.control import Control
from pd_proxy.settings.tree import Settings


class EngineClients(msgspec.Struct, frozen=True):
    """The parts that send requests to engines.

    Attributes:
        legs: sends the legs of requests.
        control: the HTTP client for everything else.
        prober: checks the health of every backend.
        warmup: tries a hand-off between the backends of a new pair.
    """

    legs: Legs
    control: Control
    prober: Prober
    warmup: Warmup


def make_engine_clients(
    settings: Settings,
    fleet: Fleet,
    connectors: Connectors,
    placement: Placement,
    messages: EngineMessages,
    metrics: Metrics,
    warmup: Warmup,
    peers: Peers | None,
    hops: Hops,
) -> EngineClients:
    """Make these parts, and have all parts forget a backend that leaves."""
    legs = Legs(settings, fleet, metrics.telemetry, messages.notices, hops)
    control = Control(settings.health.timeout, legs.authorization + hops.line)
    prober = Prober(
        fleet,
        settings.health,
        control,
        on_leave=_forgetting(legs, placement, messages, metrics, warmup, peers),
        reads_caches=placement.placing.looks,
        learns_identity=lambda backend: (
            settings.first_token != "decode"
            and backend.role != "encode"
            and connectors.traits(backend.connector).first_token
        ),
        connectors=connectors.by_name,
        sentinel_headers=legs.authorization,
    )
    return EngineClients(legs, control, prober, warmup)


def _forgetting(
    legs: Legs,
    placement: Placement,
    messages: EngineMessages,
    metrics: Metrics,
    warmup: Warmup,
    peers: Peers | None,
) -> Callable[[Backend], None]:
    """The function to call when a backend has left for good. Each part then drops what it holds about that backend."""

    def forget(backend: Backend) -> None:
        if peers is not None:
            peers.load_sync.forget(backend)
        legs.forget(backend)
        placement.prompts.forget(backend)
        warmup.forget(backend)
        messages.registrations.forget(backend)
        metrics.prometheus.forget(backend.url)

    return forget
