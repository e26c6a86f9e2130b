"""Gateways and simulated pools over real sockets, in the test's own event loop."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from time import monotonic
from typing import Any

import httpx
import pytest
import uvicorn
from pd_proxy import cli
from pd_proxy.app import Gateway, build
from pd_proxy.http.server import GatewayProtocol
from pd_proxy.process import protocol, uvicorn_config
from pd_proxy.runtime.sockets import tune
from pd_proxy.settings.tree import build_settings
from pd_proxy_simulator import Simulator, SimulatorConfig

OPERATOR = {"authorization": "Bearer operator"}
"""The key with which tests act as operators, where they set no keys themselves."""
PROMPT = "The decode backend reads the cache of the prefill backend and goes on from there, token by token."


class TestServer(uvicorn.Server):
    """uvicorn without signal handlers and with a fast shutdown; `listening` is set once it accepts connections."""

    __test__ = False

    def __init__(self, config: uvicorn.Config) -> None:
        self._leave = asyncio.Event()
        super().__init__(config)
        self.listening = asyncio.Event()

    @property
    def should_exit(self) -> bool:
        return self._leave.is_set()

    @should_exit.setter
    def should_exit(self, leaves: bool) -> None:
        if leaves:
            self._leave.set()

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    async def serve(self, sockets: Any = None) -> None:
        await self._serve(sockets)

    async def main_loop(self) -> None:
        await self.on_tick(0)
        await self._leave.wait()

    async def shutdown(self, sockets: Any = None) -> None:
        # As uvicorn's, which sleeps for a tenth of a second at each step: minutes in a run of all tests.
        for server in self.servers:
            server.close()
        for sock in sockets or []:
            sock.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        while self.server_state.connections or self.server_state.tasks:
            await asyncio.sleep(0.002)
        for server in self.servers:
            await server.wait_closed()
        await self.lifespan.shutdown()


@dataclass
class Running:
    """A gateway that listens.

    Attributes:
        http: a client for it, without timeouts of its own below 30 s.
        server: uvicorn's server.
    """

    gateway: Gateway
    url: str
    port: int
    http: httpx.AsyncClient
    server: TestServer

    @property
    def connections(self) -> list[GatewayProtocol]:
        """The connections of its clients."""
        return list(self.server.server_state.connections)  # type: ignore[arg-type]

    def idle(self) -> bool:
        """Whether nothing is in flight: no request, no lease, no hand-off, and no prompt that is to be computed or
        whose answer is awaited."""
        fleet, known = self.gateway.fleet, self.gateway.prompts.index._engines.values()
        counts = [(b.inflight_requests, b.inflight_tokens, len(b._leases), b.open_handoffs) for b in fleet]
        return (
            all(count == (0, 0, 0, 0) for count in counts)
            and not any(b.speeds.outstanding for b in fleet)
            and not any(one.pending or one.computing for one in known)
            and not fleet.handoffs_pending
            and not self.gateway.gate.inside
        )

    async def metrics(self) -> dict[str, float]:
        """The samples of /metrics as `name{label="value",...}` with sorted labels. They are read from the registry,
        since writing and parsing the page costs more than most tests; tests of the page itself request it."""
        found = {}
        for family in self.gateway.registry.collect():
            for sample in family.samples:
                labels = ",".join(f'{k}="{v}"' for k, v in sorted(sample.labels.items()))
                found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
        return found


@asynccontextmanager
async def running_gateway(
    prefill: Iterable[str] = (),
    decode: Iterable[str] = (),
    mixed: Iterable[str] = (),
    *,
    ready: bool = True,
    **more: Any,
) -> AsyncIterator[Running]:
    """A gateway before backends. A backend that is down is probed often, and pairs are not warmed up; other settings
    as given (`timeouts={"prefill": 1}`). Where no keys are set, its client is an operator (`admin_key=None`: no
    client is)."""
    operated = not {"admin_key", "api_keys", "clients"} & more.keys()
    sock = socket.create_server(("127.0.0.1", 0), backlog=1024)
    port = sock.getsockname()[1]
    flags: dict[str, Any] = {
        "prefill": list(prefill),
        "decode": list(decode),
        "mixed": list(mixed),
        "port": 0,
        "warmup": False,  # tests count the requests of engines
        **({"admin_key": "operator"} if operated else {}),
        **more,
        "health": {"interval": 1.0, "timeout": 5.0, "longest_wait": 0.2, **more.get("health", {})},
        "metaserver": {"url": f"http://127.0.0.1:{port}", **more.get("metaserver", {})},
    }
    settings = build_settings(flags, {})
    kind = protocol(settings, files=4096)
    gateway = build(settings, kind.shared)
    server = TestServer(uvicorn_config(gateway.surface, kind))
    tune(sock, settings.timeouts.idle)
    serving = asyncio.create_task(server.serve([sock]))
    await server.listening.wait()
    url = f"http://127.0.0.1:{port}"
    async with httpx.AsyncClient(
        base_url=url, headers=OPERATOR if operated else None, timeout=30, trust_env=False, verify=False
    ) as http:
        try:
            running = Running(gateway, url, port, http, server)
            if ready:
                await until(lambda: all(b.up for b in gateway.fleet))
            yield running
        finally:
            server.should_exit = True
            await serving


@asynccontextmanager
async def simulators(*roles: str, **config: Any) -> AsyncIterator[list[Simulator]]:
    """Simulated engines, one for each role named."""
    async with AsyncExitStack() as stack:
        settings = {"handshake_timeout": 1.0, "death_delay": 0.0, **config}
        yield [
            await stack.enter_async_context(Simulator(SimulatorConfig(role=role, **settings)))  # type: ignore[arg-type]
            for role in roles
        ]


@asynccontextmanager
async def pools(
    prefill: int = 1, decode: int = 1, *, engine: dict[str, Any] | None = None, **settings: Any
) -> AsyncIterator[tuple[Running, list[Simulator], list[Simulator]]]:
    """A gateway before simulated pools, all up."""
    async with simulators(*["prefill"] * prefill, *["decode"] * decode, **(engine or {})) as engines:
        p, d = engines[:prefill], engines[prefill:]
        async with running_gateway([e.url for e in p], [e.url for e in d], **settings) as running:
            yield running, p, d


@contextmanager
def stuck_backend() -> Iterator[str]:
    """The URL of a backend whose listener accepts no more connections, as a host that has just lost its power: a
    connect to it never ends."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


async def until(condition: Callable[[], bool], seconds: float = 30.0) -> float:
    """Wait until a condition holds; returns the seconds it took. Fails after `seconds`."""
    started = monotonic()
    while not condition():
        assert monotonic() - started < seconds, "the condition did not come true in time"
        await asyncio.sleep(0.002)
    return monotonic() - started


async def soon(condition: Callable[[], bool], seconds: float) -> None:
    """As `until`, for bounds on time: a stall of the whole machine counts as 10 ms, so that only the tested code can
    exceed the bound."""
    used = 0.0
    while not condition():
        assert used < seconds, f"the condition did not come true within {seconds} s"
        before = monotonic()
        await asyncio.sleep(0.002)
        used += min(monotonic() - before, 0.01)


def chat(text: str = PROMPT, **more: Any) -> dict[str, Any]:
    """A chat request."""
    return {"model": "sim", "messages": [{"role": "user", "content": text}], "max_tokens": 20, "temperature": 0, **more}


def completion(prompt: Any = PROMPT, **more: Any) -> dict[str, Any]:
    """A completions request."""
    return {"model": "sim", "prompt": prompt, "max_tokens": 20, "temperature": 0, **more}


def text_of(answer: dict[str, Any]) -> str:
    """The text of the first choice of a whole answer."""
    choice = answer["choices"][0]
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


def events_of(stream: str) -> list[dict[str, Any]]:
    """The JSON events of a stream of server-sent events, which must have ended with `[DONE]`."""
    payloads = [block.removeprefix("data: ") for block in stream.strip().split("\n\n")]
    assert payloads.pop() == "[DONE]", stream[-500:]
    return [json.loads(payload) for payload in payloads]


def run_command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Run a `pd-proxy` command in this process; returns its exit status, output and errors."""
    try:
        status = cli.main([str(argument) for argument in arguments])
    except SystemExit as end:
        status = int(end.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err
