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

from proxy.admission.gate import Gate
from proxy.api import operations
from proxy.api.credentials import Credentials
from proxy.api.inference import Inference
from proxy.api.surface import Surface
from proxy.fleet.backend import Backend
from proxy.fleet.fleet import Fleet
from proxy.fleet.health import Prober
from proxy.flow.flow import Flow
from proxy.flow.legs import Legs
from proxy.handoff.plan import PATHS
from proxy.handoff.registry import CONNECTORS
from proxy.relay.connections import Connections
from proxy.settings import Settings
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
    surface: Surface
    registry: CollectorRegistry


def build(settings: Settings, connections: Connections | None = None) -> Gateway:
    """A gateway that does nothing until its surface's lifespan begins.

    Arguments:
        connections: of its server, to be shown by /metrics.
    """
    fleet = Fleet(settings)
    gate = Gate()
    prometheus = PrometheusSink(fleet, connections or Connections())
    telemetry = Sinks(prometheus, RequestLog(settings.access_log))
    metrics = registry(prometheus)
    credentials = Credentials(settings)
    connector = CONNECTORS[settings.connector]
    legs = Legs(settings, fleet, telemetry, connector.lease)
    flow = Flow(settings, fleet, legs, connector, random.random)
    key = settings.backend_api_key
    http = httpx.AsyncClient(
        timeout=settings.health.timeout,
        headers={"authorization": f"Bearer {key.get_secret_value()}"} if key else None,
        trust_env=False,  # backends are neighbours; an HTTP_PROXY variable is not meant for them
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        prober = Prober(fleet, settings.health, http, on_leave=forget)
        prober.start()
        ticker = asyncio.create_task(_watch_loop(prometheus))
        try:
            yield
        finally:
            ticker.cancel()
            with suppress(asyncio.CancelledError):
                await ticker
            await prober.stop()
            legs.close()
            await http.aclose()

    def forget(backend: Backend) -> None:
        legs.forget(backend)
        prometheus.forget(backend.url)

    hot: dict[str, ASGIApp] = {
        PATHS[endpoint]: Inference(endpoint, settings, fleet, flow, gate, credentials, telemetry)
        for endpoint in ("chat", "completions")
    }
    routers = [
        operations.probes(fleet, gate),
        operations.models(fleet, credentials),
        operations.administration(fleet, credentials, http),
    ]
    if settings.metrics.port is None:
        routers.append(operations.metrics(metrics))
    body_seconds = settings.timeouts.request_body
    surface = Surface(hot=hot, routers=routers, lifespan=lifespan, body_seconds=body_seconds)
    return Gateway(settings, fleet, gate, surface, metrics)


async def _watch_loop(prometheus: PrometheusSink) -> None:
    while True:
        before = monotonic()
        await asyncio.sleep(_LOOP_TICK)
        prometheus.loop_late(max(0.0, monotonic() - before - _LOOP_TICK))
