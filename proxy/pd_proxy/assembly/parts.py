"""The parts of a gateway, and how they are connected. No logic."""

from __future__ import annotations

from secrets import token_bytes

import msgspec

from pd_proxy.admission.admission import Admission
from pd_proxy.admission.gate import Gate
from pd_proxy.assembly.connectors import Connectors, make_connectors
from pd_proxy.assembly.engines import EngineClients, make_engine_clients
from pd_proxy.assembly.messages import EngineMessages, make_messages
from pd_proxy.assembly.metrics import Metrics, make_metrics
from pd_proxy.assembly.peers import Peers, make_peers
from pd_proxy.assembly.placement import Placement, make_placement
from pd_proxy.assembly.service import Service, make_admission, make_service
from pd_proxy.fleet.fleet import Fleet
from pd_proxy.flow.callbacks import Callbacks
from pd_proxy.flow.hops import Hops
from pd_proxy.flow.warmup import Warmup
from pd_proxy.http.client_connections import Connections
from pd_proxy.settings.tree import Settings
from pd_proxy.workers.context import WorkerContext


class Parts(msgspec.Struct, frozen=True):
    """Everything that a gateway consists of but its surfaces, in the order in which it is made.

    Attributes:
        worker: the number of this process among the workers of the gateway, from 0.
        connectors: the protocols of hand-offs.
        placement: decides where requests go.
        messages: receives the messages of engines.
        peers: connects this worker with the others; None where there is one process.
        callbacks: the tries that wait for a call of an engine.
        metrics: takes the records of requests.
        engines: sends requests to engines.
        service: serves the requests of clients.
    """

    settings: Settings
    worker: int
    fleet: Fleet
    connectors: Connectors
    gate: Gate
    admission: Admission
    placement: Placement
    messages: EngineMessages
    peers: Peers | None
    callbacks: Callbacks
    metrics: Metrics
    engines: EngineClients
    service: Service


def make_parts(settings: Settings, connections: Connections, context: WorkerContext | None) -> Parts:
    """Make the parts of a gateway, or of one of its workers.

    Arguments:
        connections: the connections of its server, which /metrics shows.
        context: the place of this worker among the workers; None where there is one process.
    """
    worker = 0 if context is None else context.worker
    fleet = Fleet(settings)
    connectors = make_connectors(settings)
    fleet.answers_without_handoff = connectors.plain_decode
    gate, admission = make_admission(settings, fleet)
    prefix_key = token_bytes(32) if context is None else context.prefixes.key
    placement = make_placement(settings, fleet, connectors, prefix_key)
    messages = make_messages(settings, fleet, connectors, placement)
    peers = None if context is None else make_peers(context, fleet, admission, placement.prompts.index)
    callbacks = Callbacks(settings.metaserver.url, worker)
    warmup = Warmup(settings, fleet, connectors.by_name, messages.notices, callbacks)
    metrics = make_metrics(settings, fleet, admission, connections, placement, warmup)
    hops = Hops("" if context is None else str(context.directory))
    engines = make_engine_clients(settings, fleet, connectors, placement, messages, metrics, warmup, peers, hops)
    service = make_service(
        settings, fleet, gate, admission, connectors, placement, engines, metrics.telemetry, callbacks, context
    )
    return Parts(
        settings,
        worker,
        fleet,
        connectors,
        gate,
        admission,
        placement,
        messages,
        peers,
        callbacks,
        metrics,
        engines,
        service,
    )
