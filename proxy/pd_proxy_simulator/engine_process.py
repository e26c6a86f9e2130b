"""The interface by which the HTTP surface uses the process of a simulated engine."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from pd_proxy_simulator.adapters import Adapters
from pd_proxy_simulator.config import SimulatorConfig
from pd_proxy_simulator.engine import Engine
from pd_proxy_simulator.faults import Faults, Leg
from pd_proxy_simulator.http import Connection
from pd_proxy_simulator.responses import ResponseStore


@dataclass(slots=True)
class ReceivedRequest:
    """One received request and its outcome. `status` is None until the status line has been sent."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any
    leg: Leg = "local"
    status: int | None = None
    aborted: bool = False
    finished: bool = False
    output_tokens: int = 0


class EngineProcess(Protocol):
    """The process of a simulated engine, as its HTTP surface sees it.

    Attributes:
        connections: the open connections at the API port.
        requests: the latest requests that were received.
        probes: how many requests came to /health, /metrics and the like, by path.
        operations: operators' commands: path and query.
        served: how many inference requests were answered to the end.
        asleep: whether `/sleep` has come, and no `/wake_up` after it.
        paused: whether `/pause` has come, and no `/resume` after it.
        profiling: whether `/start_profile` has come, and no `/stop_profile` after it.
    """

    config: SimulatorConfig
    engine: Engine
    faults: Faults
    responses: ResponseStore
    adapters: Adapters
    connections: set[Connection]
    requests: deque[ReceivedRequest]
    probes: Counter[str]
    operations: list[tuple[str, str]]
    served: int
    asleep: bool
    paused: bool
    profiling: bool

    @property
    def suspended(self) -> bool:
        """Whether new requests wait."""

    @property
    def draining(self) -> bool:
        """Whether new requests are refused, while running ones may end."""

    async def suspend(self, mode: str) -> None:
        """Handle `/pause` and `/sleep`: running requests are aborted (`abort`), may end (`wait`), or stand still
        (`keep`). New requests wait."""

    def kill(self) -> None:
        """End as peers see `kill -9`: nothing listens any more and every connection is reset."""

    def changed(self) -> None:
        """Check the predicates that are waited for."""

    async def wait_for(self, predicate: Callable[[], bool], timeout: float = 30.0) -> None:
        """Return once `predicate()` is true, looked at after every change; raises TimeoutError."""
