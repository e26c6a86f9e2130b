"""A gateway, put together from its settings. No logic."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from math import inf
from secrets import token_bytes
from time import monotonic
from typing import Any

from fastapi import APIRouter, FastAPI
from prometheus_client import CollectorRegistry
from starlette.types import ASGIApp

from pd_proxy.admission.admission import Admission
from pd_proxy.admission.gate import Gate
from pd_proxy.api import invocations, operations
from pd_proxy.api.admin.backends import backends
from pd_proxy.api.admin.decisions import EXPLAIN_PATH, decisions, explanation
from pd_proxy.api.admin.fanout import fanout
from pd_proxy.api.credentials import AtSocket, Credentials, Trusted
from pd_proxy.api.cross_origin import CrossOrigin
from pd_proxy.api.entrance import Entrance
from pd_proxy.api.inference import Inference
from pd_proxy.api.metaserver import metaserver
from pd_proxy.api.responses import responses
from pd_proxy.api.single import SingleRoute
from pd_proxy.api.surface import Surface
from pd_proxy.fleet.backend import Backend
from pd_proxy.fleet.fleet import Fleet
from pd_proxy.fleet.health.prober import Prober
from pd_proxy.fleet.model_names import Names
from pd_proxy.fleet.protocols import AUTO
from pd_proxy.fleet.readiness import tell_readiness
from pd_proxy.fleet.view import FleetView
from pd_proxy.fleet.zmq.kv_events import KvEvents
from pd_proxy.fleet.zmq.notifications import TransferNotifications
from pd_proxy.fleet.zmq.registrations import Registrations
from pd_proxy.flow.callbacks import Callbacks
from pd_proxy.flow.capacity import FleetCapacity
from pd_proxy.flow.first_token import FirstTokens
from pd_proxy.flow.flow import Flow
from pd_proxy.flow.hops import Hops
from pd_proxy.flow.legs import Legs
from pd_proxy.flow.placing import Placing
from pd_proxy.flow.prompts import Prompts
from pd_proxy.flow.single import Single
from pd_proxy.flow.single_request import ROUTES
from pd_proxy.flow.stored_responses import StoredResponses
from pd_proxy.flow.suspicion import Suspicion
from pd_proxy.flow.warmup import Warmup
from pd_proxy.handoff.connector import UNKNOWN, Connector
from pd_proxy.handoff.connectors.registry import connectors
from pd_proxy.http.client_connections import Connections
from pd_proxy.http.control import Control
from pd_proxy.prefix.index import PrefixIndex
from pd_proxy.requests.endpoints import LAYOUTS, Endpoint
from pd_proxy.settings.tree import Settings
from pd_proxy.telemetry.admission import AdmissionSink
from pd_proxy.telemetry.logs import RequestLog, tell_throughput
from pd_proxy.telemetry.placement import PlacementSink
from pd_proxy.telemetry.prometheus import PrometheusSink, registry
from pd_proxy.telemetry.records import Sinks, Telemetry
from pd_proxy.telemetry.throughput import Throughput
from pd_proxy.workers.context import WorkerContext
from pd_proxy.workers.load_table import LoadSync
from pd_proxy.workers.peers import PeerWorkers
from pd_proxy.workers.prefix_ring import PeerPrefixes

_LOOP_TICK = 0.1  # seconds between looks at the event loop's lateness


@dataclass(frozen=True, slots=True)
class Gateway:
    """Everything one gateway consists of.

    Attributes:
        surface: the ASGI application. Its lifespan starts and stops the health checks.
        registry: what /metrics shows, of this worker alone.
        peers: the other workers of this gateway, where there are any.
        inner: what those are answered.
        prompts: what engines have of requests' prompts.
        placing: says where requests go.
        admin: what operators get at `admin_socket`, where there is one.
        kv_events: what engines publish of their caches, where that is set and placement wants to know.
    """

    settings: Settings
    fleet: Fleet
    gate: Gate
    admission: Admission
    surface: Surface
    registry: CollectorRegistry
    notices: TransferNotifications
    registrations: Registrations
    prompts: Prompts
    placing: Placing
    peers: PeerWorkers | None = None
    inner: Surface | None = None
    admin: Surface | None = None
    kv_events: KvEvents | None = None

    def listen(self) -> None:
        """Listen for the messages of engines, where that is not done yet: the lifespan does it at the latest. To be
        called in a running event loop.

        Raises:
            CannotHear
        """
        self.notices.start()
        self.registrations.start()
        if self.kv_events is not None:
            self.kv_events.start()


def build(settings: Settings, connections: Connections | None = None, context: WorkerContext | None = None) -> Gateway:
    """A gateway that does nothing until its surface's lifespan begins.

    Arguments:
        connections: of its server, to be shown by /metrics.
        context: its place among several workers.
    """
    if context is not None:
        settings = settings.share(context.workers)
    fleet = Fleet(settings)
    gate = Gate()
    admission = Admission(settings, FleetCapacity(fleet) if fleet.bounded else None)
    gate.on_close = admission.close
    if fleet.bounded:
        fleet.watch_capacity(admission.recheck)
    prometheus = PrometheusSink(FleetView(fleet), connections or Connections())
    handoff_key = settings.handoff_key
    spoken = connectors("" if handoff_key is None else handoff_key.get_secret_value())
    fleet.answers_alone = frozenset(name for name, connector in spoken.items() if connector.traits.plain_decode)
    callbacks = Callbacks(settings.metaserver.url, 0 if context is None else context.worker)
    notices = TransferNotifications(settings.zmq.notices)
    registrations = Registrations(fleet, settings.zmq, spoken)
    fleet.messages = {"notice": notices.counts, "registration": registrations.counts}
    warmup = Warmup(settings, fleet, spoken, notices, callbacks)
    queue = AdmissionSink(admission)
    throughput = Throughput(prometheus.tokens_streamed)
    telemetry = Sinks(prometheus, queue, RequestLog(settings.access_log), warmup, throughput)
    credentials = Credentials(settings)
    hops = Hops("" if context is None else str(context.directory))
    legs = Legs(settings, fleet, telemetry, notices, hops)
    suspicion = Suspicion(settings.retries.after_cut, lambda backend: prober.lives(backend))
    prefix_key = token_bytes(32) if context is None else context.prefixes.key
    prompts = Prompts(PrefixIndex(), prefix_key)
    in_use = _in_use(settings, spoken)
    first_tokens = FirstTokens(settings, in_use)
    placing = Placing(settings, fleet, spoken, in_use, first_tokens, prompts, random.random)
    placement = PlacementSink(placing.decisions, prompts.index, prompts.counts, fleet)
    metrics = registry(prometheus, queue, placement, old_names=settings.metrics.old_names)
    if placing.looks:
        fleet.subscribe(on_cache=prompts.learnt, on_lost_cache=prompts.lost)
        kv_events = KvEvents(settings, fleet, prompts.index, prefix_key)
        if kv_events.wanted:
            prompts.events = kv_events
            fleet.messages = {**fleet.messages, "kv_batch": kv_events.batches, "kv_event": kv_events.events}
    flow = Flow(settings, fleet, legs, spoken, placing, first_tokens, telemetry, random.random, callbacks, suspicion)
    load_sync = None
    if context is not None:
        peer_prefixes = PeerPrefixes(context.prefixes, context.worker, prompts.index)
        load_sync = LoadSync(context.load_table, context.worker, fleet, admission.recheck, peer_prefixes.read)
        fleet.before_choice = load_sync.refresh
        admission.on_wait = load_sync.wake
    peers = None if context is None else PeerWorkers(context.directory, context.worker, context.workers)
    stored = StoredResponses(_shared_secret(settings, context))
    control = Control(settings.health.timeout, legs.authorization + hops.line)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        gateway.listen()
        if peers is not None:
            _adopt(fleet, await peers.backends())
        warmup.start(prober)
        prober.start()
        tickers = [asyncio.create_task(_watch_loop(prometheus, fleet))]
        if context is None or context.worker == 0:  # one tells for all
            tickers.append(asyncio.create_task(tell_readiness(fleet)))
        if seconds := settings.throughput_interval:
            tickers.append(asyncio.create_task(_tell_throughput(throughput, seconds, gate, admission)))
        if load_sync is not None:
            tickers.append(asyncio.create_task(load_sync.run(lambda: admission.waiting)))
        try:
            yield
        finally:
            for ticker in tickers:
                ticker.cancel()
                with suppress(asyncio.CancelledError):
                    await ticker
            await flow.close()
            await suspicion.close()
            await prober.stop()
            await warmup.stop()
            legs.close()
            notices.close()
            registrations.close()
            if prompts.events is not None:
                await prompts.events.close()

    def forget(backend: Backend) -> None:
        if load_sync is not None:
            load_sync.forget(backend)
        legs.forget(backend)
        prompts.forget(backend)
        warmup.forget(backend)
        registrations.forget(backend)
        prometheus.forget(backend.url)

    prober = Prober(
        fleet,
        settings.health,
        control,
        on_leave=forget,
        reads_caches=placing.looks,
        learns_identity=lambda backend: (
            settings.first_token != "decode"
            and backend.role != "encode"
            and spoken.get(backend.connector, UNKNOWN).traits.first_token
        ),
        guides=spoken,
        sentinel_headers=legs.authorization,
    )
    names = Names(settings, fleet, prober.ask_models)
    entrance = _entrance(settings, gate, admission, credentials, names, telemetry, hops)
    hot: dict[str, ASGIApp] = {
        layout.path: Inference(endpoint, settings, fleet, flow, placing, entrance, stored)
        for endpoint, layout in LAYOUTS.items()
        if _is_served(endpoint, settings)
    }
    single = Single(settings, fleet, legs, random.random, suspicion)
    for path in ROUTES:
        hot[path] = SingleRoute(path, settings, fleet, single, entrance, lambda: surface.paths())
    invoked = invocations.Invocations(
        settings, credentials, hot, lambda: {path for b in fleet for path in b.kind.routes if b.offers(path)}
    )
    called_back = any(spoken.get(group.connector, UNKNOWN).traits.called_back for group in settings.all_groups())

    def routers() -> list[APIRouter]:
        made = [
            operations.probes(fleet, gate, peers),
            operations.models(fleet, names, credentials),
            operations.service(fleet, gate, admission, credentials),
            responses(settings, fleet, stored, credentials, control),
            operations.administration(fleet, credentials),
            backends(fleet, credentials),
            decisions(placing.decisions, credentials, peers),
            explanation(settings, placing.explain, fleet, stored, names, credentials),
            fanout(fleet, credentials, control, prober.ask_models, peers),
        ]
        if settings.metrics.port is None:
            made.append(operations.metrics(metrics, peers))
        if called_back:
            made.append(metaserver(callbacks, settings.metaserver.allow, peers))
        return made

    body_seconds, bodies = settings.timeouts.request_body, {EXPLAIN_PATH: settings.limits.request_body}
    # A kind that is not set is vLLM's; a connector says as surely what else there is.
    told = {
        endpoint
        for group in settings.all_groups()
        for endpoint in spoken.get(group.connector, UNKNOWN).traits.endpoints
    }
    own_routes = frozenset(LAYOUTS[endpoint].path for endpoint in told if LAYOUTS[endpoint].of_one_make)
    surface = Surface(
        hot=hot,
        rare={invocations.PATH: invoked},
        routers=routers,
        offered=lambda: fleet.routes() | own_routes | {invocations.PATH},
        lifespan=lifespan,
        body_seconds=body_seconds,
        peers=peers,
        cross_origin=CrossOrigin(settings.cors) if settings.cors.origins else None,
        hops=hops,
        docs=settings.routes.docs,
        bodies=bodies,
    )
    inner = None
    if peers is not None:
        trusted, remembers = Trusted(), peers.remember

        def inner_routers() -> list[APIRouter]:
            made = [
                operations.probes(fleet, gate),
                operations.metrics(metrics, remembers=remembers),
                operations.administration(fleet, trusted),
                backends(fleet, trusted),
                decisions(placing.decisions, trusted),
            ]
            if called_back:
                made.append(metaserver(callbacks, ()))
            return made

        inner = Surface(hot={}, routers=inner_routers)
    admin = None
    if settings.admin_socket:
        local = AtSocket()

        def admin_routers() -> list[APIRouter]:
            return [
                operations.probes(fleet, gate, peers),
                operations.service(fleet, gate, admission, local),
                operations.models(fleet, names, local),
                operations.metrics(metrics, peers),
                operations.administration(fleet, local),
                backends(fleet, local),
                decisions(placing.decisions, local, peers),
                explanation(settings, placing.explain, fleet, stored, names, local),
                fanout(fleet, local, control, prober.ask_models, peers),
            ]

        admin = Surface(hot={}, routers=admin_routers, peers=peers, bodies=bodies)
    gateway = Gateway(
        settings,
        fleet,
        gate,
        admission,
        surface,
        metrics,
        notices,
        registrations,
        prompts,
        placing,
        peers,
        inner,
        admin,
        prompts.events,
    )
    return gateway


def _in_use(settings: Settings, connectors: Mapping[str, Connector]) -> list[Connector]:
    """The connectors that engines here may speak."""
    names = {group.connector for group in settings.all_groups()}
    return [connector for name, connector in connectors.items() if name in names or AUTO in names]


def _is_served(endpoint: Endpoint, settings: Settings) -> bool:
    """Whether an endpoint is there: not every engine has all of them, and not all are for everybody."""
    if endpoint == "generate":
        return settings.routes.generate
    if endpoint == "sglang_generate":
        groups = settings.all_groups()
        return any(group.kind == "sglang" or group.connector in ("sglang", AUTO) for group in groups)
    return True


def _entrance(
    settings: Settings,
    gate: Gate,
    admission: Admission,
    credentials: Credentials,
    names: Names,
    telemetry: Telemetry,
    hops: Hops,
) -> Entrance:
    return Entrance(
        gate,
        admission,
        credentials,
        names,
        telemetry,
        hops,
        body_limit=settings.limits.request_body,
        body_seconds=settings.timeouts.request_body,
        total=settings.timeouts.total or inf,
        queue_timeout=settings.admission.queue_timeout,
    )


def _shared_secret(settings: Settings, context: WorkerContext | None) -> bytes:
    """What gateways of one operator have in common and no client knows; without such keys, what the workers of one
    gateway do."""
    secrets = [key.get_secret_value() for key in (settings.admin_key, settings.backend_api_key) if key is not None]
    if secrets:
        return "\0".join(secrets).encode()
    return token_bytes(32) if context is None else str(context.directory).encode()


async def _tell_throughput(throughput: Throughput, seconds: float, gate: Gate, admission: Admission) -> None:
    while True:
        await asyncio.sleep(seconds)
        tell_throughput(throughput, gate.inside, admission.waiting)


async def _watch_loop(prometheus: PrometheusSink, fleet: Fleet) -> None:
    while True:
        before = monotonic()
        await asyncio.sleep(_LOOP_TICK)
        now = monotonic()
        late = max(0.0, now - before - _LOOP_TICK)
        prometheus.loop_late(late)
        fleet.delays.note(late, now)


def _adopt(fleet: Fleet, known: list[dict[str, Any]]) -> None:
    """Have the backends that the other workers have: operators may have changed them since the settings were read."""
    if not known:
        return
    for backend in list(fleet):
        if not any(backend.url == other["url"] and backend.role == other["role"] for other in known):
            fleet.remove(backend.url, backend.role)
    for other in known:
        backend = fleet.add(other["url"], other["role"], other["group"])
        if other["removed"]:
            fleet.remove(backend.url, backend.role)
        elif other["draining"]:
            fleet.drain(backend)
