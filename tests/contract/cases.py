"""The connectors under contract: how their engines are simulated, and the properties of each."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from pd_proxy_simulator import Simulator

from tests.support import Running, running_gateway, simulators

_FOLDERS = tempfile.TemporaryDirectory(prefix="pd-proxy-shared-")  # removed when the process ends


@dataclass(frozen=True)
class Case:
    """One connector.

    Attributes:
        name: as in the settings.
        engine: settings of its simulated engines.
        settings: of the gateway.
        shared: whether its engines share a folder.
        located: whether the gateway's settings need the port of a prefill engine's side channel.
        written_to: whether the gateway's settings need the ports at which a decode engine is written to.
        hears: the setting of the address at which engines send the gateway messages, where they do.
        asks: the members by which an engine recognizes a prefill leg and a decode leg.
        spared: faults of the matrix that its engines do not have.
    """

    name: str
    engine: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    located: bool = False
    written_to: bool = False
    hears: str = ""
    spared: tuple[str, ...] = ()
    shared: bool = False

    def gateway(self, engines: Iterable[Simulator]) -> dict[str, Any]:
        """The settings of a gateway before `engines`."""
        engines = list(engines)
        places = [{"backend": engine.url, "port": engine.side_port} for engine in engines] if self.located else []
        heard = next((engine.config.proxy for engine in engines if engine.config.proxy), "")
        return {
            "connector": self.name,
            "locations": places + (self._receivers(engines) if self.written_to else []),
            **({"zmq": {self.hears: heard}} if self.hears else {}),
            **self.settings,
        }

    @staticmethod
    def _receivers(engines: Iterable[Simulator]) -> list[dict[str, Any]]:
        return [
            {"backend": engine.url, "init_ports": ports, "alloc_ports": ports, "tp": engine.config.tp}
            for engine in engines
            if engine.config.role == "decode"
            for ports in [[engine.side_port] * engine.config.tp]
        ]

    @contextmanager
    def engines(self) -> Iterator[dict[str, Any]]:
        """The settings of its engines. The address at which they send the gateway messages stays reserved for the
        gateway."""
        told = {"connector": self.name, **self.engine}
        if self.shared:
            told["shared_path"] = tempfile.mkdtemp(dir=_FOLDERS.name)
        if not self.hears:
            yield told
            return
        with socket.socket() as held:  # bound, but not listening, so that the kernel gives the port to no other socket
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            held.bind(("127.0.0.1", 0))
            yield {**told, "proxy": f"127.0.0.1:{held.getsockname()[1]}"}


CASES = [
    Case("nixl"),
    Case("mooncake_ascend"),
    Case("mooncake", located=True),
    Case("ascend_layerwise"),
    Case("lmcache_pd", written_to=True, hears="notices"),
    Case("moriio_read", hears="registrations"),
    Case("moriio_write", hears="registrations"),
    Case("p2p_nccl", hears="registrations"),
    Case("sglang"),
    Case("tensorrt_llm", spared=("recomputed",)),
    Case("nixl_push"),
    Case("offload_p2p", located=True),
    Case("shared_cache", shared=True),
]
IDS = [case.name for case in CASES]
ONE_OF_EACH = ("nixl", "ascend_layerwise", "lmcache_pd", "moriio_write", "sglang", "tensorrt_llm", "shared_cache")
"""One connector of each kind of hand-off: decode reads, or prefill writes; the gateway names the address, receives
it from engines, or is called back; both legs at the same time, or one after the other; by address, or by content."""
MOST = [case if case.name in ONE_OF_EACH else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
"""For tests in which the connector hardly matters: `make test` runs one of each kind."""


@asynccontextmanager
async def fleet(
    case: Case, prefill: int = 1, decode: int = 1, *, engine: dict[str, Any] | None = None, **settings: Any
) -> AsyncIterator[tuple[Running, list[Simulator], list[Simulator]]]:
    """A gateway before simulated pools that speak a connector, all up."""
    roles = ["prefill"] * prefill + ["decode"] * decode
    with case.engines() as told:
        async with simulators(*roles, **{**told, **(engine or {})}) as engines:
            p, d = engines[:prefill], engines[prefill:]
            more = {**case.gateway(engines), **settings}
            async with running_gateway([e.url for e in p], [e.url for e in d], **more) as running:
                yield running, p, d


@asynccontextmanager
async def one_engine(**connector: str) -> AsyncIterator[Running]:
    """A gateway before one engine that serves every request whole, for the answer of an engine alone."""
    async with (
        simulators("mixed", **connector) as [single],
        running_gateway(mixed=[single.url], **connector) as running,
    ):
        yield running
