"""The order in which the parts of a gateway start and stop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from time import monotonic
from typing import Any

from fastapi import FastAPI

from pd_proxy.admission.admission import Admission
from pd_proxy.admission.gate import Gate
from pd_proxy.assembly.parts import Parts
from pd_proxy.assembly.peers import adopt_backends
from pd_proxy.fleet.fleet import Fleet
from pd_proxy.fleet.readiness import log_readiness
from pd_proxy.telemetry.logs import log_throughput
from pd_proxy.telemetry.prometheus import PrometheusSink
from pd_proxy.telemetry.throughput import Throughput

_LOOP_TICK = 0.1  # seconds between two measurements of the event loop's lateness


def lifespan_of(parts: Parts) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    """The lifespan of the surface for clients. What starts last stops first."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        peers, engines = parts.peers, parts.engines
        async with AsyncExitStack() as stack:
            parts.messages.start()
            stack.push_async_callback(parts.messages.close)
            if peers is not None:
                adopt_backends(parts.fleet, await peers.workers.backends())
            stack.callback(engines.legs.close)
            engines.warmup.start(engines.prober)
            stack.push_async_callback(engines.warmup.stop)
            engines.prober.start()
            stack.push_async_callback(engines.prober.stop)
            stack.push_async_callback(parts.service.suspicion.close)
            stack.push_async_callback(parts.service.flow.close)
            for work in _background(parts):
                await stack.enter_async_context(_running(work))
            yield

    return lifespan


def _background(parts: Parts) -> list[Coroutine[Any, Any, None]]:
    """The coroutines that run as long as the gateway does."""
    found = [_measure_lateness(parts.metrics.prometheus, parts.fleet)]
    if parts.worker == 0:  # one worker logs for all
        found.append(log_readiness(parts.fleet))
    if seconds := parts.settings.throughput_interval:
        found.append(_log_throughput(parts.metrics.throughput, seconds, parts.gate, parts.admission))
    if parts.peers is not None:
        found.append(parts.peers.load_sync.run(lambda: parts.admission.waiting))
    return found


@asynccontextmanager
async def _running(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run a coroutine as a task until the context is left."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def _log_throughput(throughput: Throughput, seconds: float, gate: Gate, admission: Admission) -> None:
    """Log what was served in each interval of so many seconds."""
    while True:
        await asyncio.sleep(seconds)
        log_throughput(throughput, gate.inside, admission.waiting)


async def _measure_lateness(prometheus: PrometheusSink, fleet: Fleet) -> None:
    """Measure how late the event loop wakes a task that sleeps."""
    while True:
        before = monotonic()
        await asyncio.sleep(_LOOP_TICK)
        now = monotonic()
        late = max(0.0, now - before - _LOOP_TICK)
        prometheus.loop_late(late)
        fleet.delays.note(late, now)
