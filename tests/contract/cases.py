"""The connectors under contract: how engines that speak them are simulated, and what is particular to each."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from proxy.simulator import Simulator
from tests.support import Running, running_gateway, simulators


@dataclass(frozen=True)
class Case:
    """One connector.

    Attributes:
        name: as in the settings.
        engine: settings of its simulated engines.
        settings: of the gateway.
        located: the gateway must be told the port of a prefill engine's side of the hand-off.
        spared: faults of the matrix that its engines do not have.
    """

    name: str
    engine: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    located: bool = False
    spared: tuple[str, ...] = ()

    def gateway(self, engines: Iterable[Simulator]) -> dict[str, Any]:
        """The settings of a gateway before `engines`."""
        places = [{"backend": engine.url, "port": engine.side_port} for engine in engines] if self.located else []
        return {"connector": self.name, "locations": places, **self.settings}


CASES = [
    Case("nixl"),
    Case("mooncake_ascend"),
    Case("mooncake", located=True),
    Case("sglang"),
    Case("tensorrt_llm", spared=("recomputed",)),
]
IDS = [case.name for case in CASES]


@asynccontextmanager
async def fleet(
    case: Case, prefill: int = 1, decode: int = 1, *, engine: dict[str, Any] | None = None, **settings: Any
) -> AsyncIterator[tuple[Running, list[Simulator], list[Simulator]]]:
    """A gateway before simulated pools that speak a connector, all up."""
    roles = ["prefill"] * prefill + ["decode"] * decode
    async with simulators(*roles, **{"connector": case.name, **case.engine, **(engine or {})}) as engines:
        p, d = engines[:prefill], engines[prefill:]
        more = {**case.gateway(engines), **settings}
        async with running_gateway([e.url for e in p], [e.url for e in d], **more) as running:
            yield running, p, d
