"""The HTTP surfaces of a gateway: for clients, for operators at the machine, and for its other workers."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import APIRouter
from starlette.types import ASGIApp

from pd_proxy.api import invocations, operations
from pd_proxy.api.admin.backends import backends
from pd_proxy.api.admin.decisions import EXPLAIN_PATH, decisions, explanation
from pd_proxy.api.admin.fanout import fanout
from pd_proxy.api.credentials import AtSocket, Trusted
from pd_proxy.api.cross_origin import CrossOrigin
from pd_proxy.api.inference import Inference
from pd_proxy.api.metaserver import metaserver
from pd_proxy.api.responses import responses
from pd_proxy.api.single import SingleRoute
from pd_proxy.api.surface import Surface
from pd_proxy.assembly.connectors import is_served
from pd_proxy.assembly.lifespan import lifespan_of
from pd_proxy.assembly.parts import Parts
from pd_proxy.flow.single_request import ROUTES
from pd_proxy.requests.endpoints import LAYOUTS
from pd_proxy.settings.tree import Settings
from pd_proxy.workers.peers import PeerWorkers


def client_surface(parts: Parts) -> Surface:
    """The surface for clients. Its lifespan starts and stops the gateway."""
    settings, fleet, service = parts.settings, parts.fleet, parts.service
    hot = _hot_routes(parts, lambda: surface.paths())
    invoked = invocations.Invocations(
        settings,
        service.credentials,
        hot,
        lambda: {path for backend in fleet for path in backend.kind.routes if backend.offers(path)},
    )
    own_paths = parts.connectors.own_paths
    surface = Surface(
        hot=hot,
        rare={invocations.PATH: invoked},
        routers=lambda: _client_routers(parts),
        offered=lambda: fleet.routes() | own_paths | {invocations.PATH},
        lifespan=lifespan_of(parts),
        body_seconds=settings.timeouts.request_body,
        peers=_workers(parts),
        cross_origin=CrossOrigin(settings.cors) if settings.cors.origins else None,
        hops=parts.engines.legs.hops,
        docs=settings.routes.docs,
        bodies=_body_limits(settings),
    )
    return surface


def inner_surface(parts: Parts) -> Surface | None:
    """The surface for the other workers, where there are any. Their requests need no key: no other user may enter the
    directory of its socket."""
    if parts.peers is None:
        return None
    peers = parts.peers.workers
    return Surface(hot={}, routers=lambda: _inner_routers(parts, peers))


def admin_surface(parts: Parts) -> Surface | None:
    """The surface for operators at `admin_socket`, where that is set."""
    settings = parts.settings
    if not settings.admin_socket:
        return None
    return Surface(hot={}, routers=lambda: _admin_routers(parts), peers=_workers(parts), bodies=_body_limits(settings))


def _hot_routes(parts: Parts, paths: Callable[[], list[str]]) -> dict[str, ASGIApp]:
    """The routes that engines serve, by their paths.

    Arguments:
        paths: returns all paths of the surface, for errors about unknown routes.
    """
    settings, fleet, service = parts.settings, parts.fleet, parts.service
    entrance, placing = service.entrance, parts.placement.placing
    hot: dict[str, ASGIApp] = {
        layout.path: Inference(endpoint, settings, fleet, service.flow, placing, entrance, service.stored)
        for endpoint, layout in LAYOUTS.items()
        if is_served(endpoint, settings)
    }
    for path in ROUTES:
        hot[path] = SingleRoute(path, settings, fleet, service.single, entrance, paths)
    return hot


def _client_routers(parts: Parts) -> list[APIRouter]:
    """The other routes for clients, and those of operators who have the admin key."""
    settings, fleet, service, workers = parts.settings, parts.fleet, parts.service, _workers(parts)
    credentials, stored, control = service.credentials, service.stored, parts.engines.control
    made = [
        operations.probes(fleet, parts.gate, workers),
        operations.models(fleet, service.names, credentials),
        operations.service(fleet, parts.gate, parts.admission, credentials),
        responses(settings, fleet, stored, credentials, control),
        operations.administration(fleet, credentials),
        backends(fleet, credentials),
        decisions(parts.placement.placing.decisions, credentials, workers),
        explanation(settings, parts.placement.placing.explain, fleet, stored, service.names, credentials),
        fanout(fleet, credentials, control, parts.engines.prober.ask_models, workers),
    ]
    if settings.metrics.port is None:
        made.append(operations.metrics(parts.metrics.registry, workers))
    if parts.connectors.called_back:
        made.append(metaserver(parts.callbacks, settings.metaserver.allow, workers))
    return made


def _inner_routers(parts: Parts, peers: PeerWorkers) -> list[APIRouter]:
    """The routes for the other workers. Each answers for this worker alone."""
    fleet, trusted = parts.fleet, Trusted()
    made = [
        operations.probes(fleet, parts.gate),
        operations.metrics(parts.metrics.registry, remembers=peers.remember),
        operations.administration(fleet, trusted),
        backends(fleet, trusted),
        decisions(parts.placement.placing.decisions, trusted),
    ]
    if parts.connectors.called_back:
        made.append(metaserver(parts.callbacks, ()))
    return made


def _admin_routers(parts: Parts) -> list[APIRouter]:
    """The routes for operators at `admin_socket`."""
    fleet, service, workers, local = parts.fleet, parts.service, _workers(parts), AtSocket()
    placing = parts.placement.placing
    return [
        operations.probes(fleet, parts.gate, workers),
        operations.service(fleet, parts.gate, parts.admission, local),
        operations.models(fleet, service.names, local),
        operations.metrics(parts.metrics.registry, workers),
        operations.administration(fleet, local),
        backends(fleet, local),
        decisions(placing.decisions, local, workers),
        explanation(parts.settings, placing.explain, fleet, service.stored, service.names, local),
        fanout(fleet, local, parts.engines.control, parts.engines.prober.ask_models, workers),
    ]


def _workers(parts: Parts) -> PeerWorkers | None:
    return None if parts.peers is None else parts.peers.workers


def _body_limits(settings: Settings) -> dict[str, int]:
    """The paths whose bodies may be longer than those of other operators' routes, with the limit in bytes."""
    return {EXPLAIN_PATH: settings.limits.request_body}
