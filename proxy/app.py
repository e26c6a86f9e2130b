"""The rooms put together from settings. No logic."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from time import monotonic

import httpx
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from starlette.types import ASGIApp

from proxy.admission.admission import Admission
from proxy.admission.gate import Gate
from proxy.api import operations
from proxy.api.backends import backends
from proxy.api.credentials import Credentials
from proxy.api.inference import Inference
from proxy.api.surface import Surface
from proxy.fleet.backend import Backend
from proxy.fleet.fleet import Fleet
from proxy.fleet.health import Prober
from proxy.flow.flow import Flow
from proxy.flow.legs import Legs
from proxy.flow.room import FleetRoom
from proxy.flow.warmup import Warmup
from proxy.handoff.plan import PATHS
from proxy.handoff.registry import CONNECTORS
from proxy.relay.connections import Connections
from proxy.settings import Settings
from proxy.telemetry.admission import AdmissionSink
from proxy.telemetry.logs import RequestLog
from proxy.telemetry.prometheus import PrometheusSink, registry
from proxy.telemetry.records import Sinks

_LOOP_TICK = 0.1  # seconds between looks at the event loop's lateness


@dataclass(frozen=True, slots=True)
class Gateway:
    """Everything one gateway consists of.

    Attributes:
        surface: the ASGI application. Its lifespan starts and stops the health checks.
        registry: what /metrics shows.
    """

    settings: Settings
    fleet: Fleet
    gate: Gate
    admission: Admission
    surface: Surface
    registry: CollectorRegistry


def build(settings: Settings, connections: Connections | None = None) -> Gateway:
    """A gateway that does nothing until its surface's lifespan begins.

    Arguments:
        connections: of its server, to be shown by /metrics.
    """
    fleet = Fleet(settings)
    gate = Gate()
    admission = Admission(settings, FleetRoom(fleet) if fleet.bounded else None)
    gate.on_close = admission.close
    if fleet.bounded:
        fleet.watch_room(admission.look)
    prometheus = PrometheusSink(fleet, connections or Connections())
    warmup = Warmup(settings, fleet, CONNECTORS)
    queue = AdmissionSink(admission)
    telemetry = Sinks(prometheus, queue, RequestLog(settings.access_log), warmup)
    metrics = registry(prometheus, queue)
    credentials = Credentials(settings)
    legs = Legs(settings, fleet, telemetry)
    flow = Flow(settings, fleet, legs, CONNECTORS, telemetry, random.random)
    key = settings.backend_api_key
    http = httpx.AsyncClient(
        timeout=settings.health.timeout,
        headers={"authorization": f"Bearer {key.get_secret_value()}"} if key else None,
        trust_env=False,  # backends are neighbours; an HTTP_PROXY variable is not meant for them
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        prober = Prober(
            fleet,
            settings.health,
            http,
            on_leave=forget,
            learns_facts=lambda backend: settings.first_token != "decode" and CONNECTORS[backend.connector].first_token,
            guides=CONNECTORS,
            tether_headers=legs.authorization,
        )
        warmup.start()
        prober.start()
        ticker = asyncio.create_task(_watch_loop(prometheus))
        try:
            yield
        finally:
            ticker.cancel()
            with suppress(asyncio.CancelledError):
                await ticker
            await flow.close()
            await prober.stop()
            await warmup.stop()
            legs.close()
            await http.aclose()

    def forget(backend: Backend) -> None:
        legs.forget(backend)
        warmup.forget(backend)
        prometheus.forget(backend.url)

    hot: dict[str, ASGIApp] = {
        PATHS[endpoint]: Inference(endpoint, settings, fleet, flow, gate, admission, credentials, telemetry)
        for endpoint in ("chat", "completions")
    }
    routers = [
        operations.probes(fleet, gate),
        operations.models(fleet, credentials),
        operations.administration(fleet, credentials, http),
        backends(fleet, credentials),
    ]
    if settings.metrics.port is None:
        routers.append(operations.metrics(metrics))
    body_seconds = settings.timeouts.request_body
    surface = Surface(hot=hot, routers=routers, lifespan=lifespan, body_seconds=body_seconds)
    return Gateway(settings, fleet, gate, admission, surface, metrics)


async def _watch_loop(prometheus: PrometheusSink) -> None:
    while True:
        before = monotonic()
        await asyncio.sleep(_LOOP_TICK)
        prometheus.loop_late(max(0.0, monotonic() - before - _LOOP_TICK))
