"""A client and a telemetry that discard everything: for legs that belong to no client's request."""

from __future__ import annotations

from collections.abc import Callable

from pd_proxy.errors import BackendError
from pd_proxy.fleet.backend import Backend
from pd_proxy.fleet.outlier.statistics import LegName
from pd_proxy.http.response import FlowControl, Headers
from pd_proxy.telemetry.records import ITL_BOUNDS, Distribution, RequestRecord


class DiscardingClient:
    """A client that discards its answer."""

    def __init__(self) -> None:
        self.started = False
        self.gone = False
        self.flow: FlowControl | None = None
        self.on_gone: Callable[[], object] | None = None

    def respond(self, status: int, headers: Headers, body: bytes) -> None:
        self.started = True

    def start(self, status: int, headers: Headers) -> None:
        self.started = True

    def write(self, data: bytes) -> None: ...

    def chunks(self) -> None:
        return None

    def end(self, data: bytes = b"") -> None: ...

    def cut(self) -> None: ...

    async def flushed(self) -> None: ...


class DiscardingTelemetry:
    """Discards what legs report to the fleet and to telemetry."""

    def succeeded(self, backend: Backend, leg: LegName) -> None: ...

    def failed(
        self, backend: Backend, error: BackendError, leg: LegName, handoff_from: Backend | None = None
    ) -> None: ...

    def timed(self, backend: Backend, leg: LegName, seconds: float, tokens: int) -> None: ...

    def paced(self, backend: Backend, seconds: float) -> None: ...

    def gaps(self, pool: str, backend: str) -> Distribution:
        return Distribution(ITL_BOUNDS)

    def handoff_released(self, claimed: bool) -> None: ...

    def finished(self, record: RequestRecord) -> None: ...
