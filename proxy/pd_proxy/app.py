"""A gateway, made from its settings. No logic."""

from __future__ import annotations

import msgspec
from prometheus_client import CollectorRegistry

from pd_proxy.admission.admission import Admission
from pd_proxy.admission.gate import Gate
from pd_proxy.api.surface import Surface
from pd_proxy.assembly.messages import EngineMessages
from pd_proxy.assembly.parts import make_parts
from pd_proxy.assembly.surfaces import admin_surface, client_surface, inner_surface
from pd_proxy.fleet.fleet import Fleet
from pd_proxy.flow.placing import Placing
from pd_proxy.flow.prompts import Prompts
from pd_proxy.http.client_connections import Connections
from pd_proxy.settings.tree import Settings
from pd_proxy.workers.context import WorkerContext
from pd_proxy.workers.peers import PeerWorkers


class Gateway(msgspec.Struct, frozen=True):
    """One gateway, as the process that serves it needs it.

    Attributes:
        settings: of this process: with several workers, its share of what is bounded.
        surface: the ASGI application for clients. Its lifespan starts and stops all parts.
        inner: the ASGI application for the other workers, where there are any.
        admin: the ASGI application for operators at `admin_socket`, where that is set.
        registry: what /metrics shows, of this worker alone.
        messages: receives the messages of engines.
        prompts: the prefix index, and the prompts that are in flight.
        placing: decides where requests go.
        peers: the other workers of this gateway, where there are any.
    """

    settings: Settings
    fleet: Fleet
    gate: Gate
    admission: Admission
    surface: Surface
    inner: Surface | None
    admin: Surface | None
    registry: CollectorRegistry
    messages: EngineMessages
    prompts: Prompts
    placing: Placing
    peers: PeerWorkers | None

    def listen(self) -> None:
        """Listen for the messages of engines. The lifespan does so too; a process that calls this first learns before
        it serves that an address is taken. Needs a running event loop.

        Raises:
            CannotListen
        """
        self.messages.start()


def build(settings: Settings, connections: Connections | None = None, context: WorkerContext | None = None) -> Gateway:
    """Make a gateway. It does nothing until the lifespan of its surface begins.

    Arguments:
        connections: the connections of its server, which /metrics shows.
        context: the place of this worker among the workers; None where there is one process.
    """
    if context is not None:
        settings = settings.share(context.workers)
    parts = make_parts(settings, connections or Connections(), context)
    return Gateway(
        settings,
        parts.fleet,
        parts.gate,
        parts.admission,
        client_surface(parts),
        inner_surface(parts),
        admin_surface(parts),
        parts.metrics.registry,
        parts.messages,
        parts.placement.prompts,
        parts.placement.placing,
        None if parts.peers is None else parts.peers.workers,
    )
