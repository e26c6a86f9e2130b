"""The test bed for faults: two prefill and two decode simulators, a gateway before them, and a client.

A cell asks one request. Its pair is always the first backend of each pool (`steered`), so that a fault put there is
met; the second ones stay good. Everything runs in one event loop in virtual time (`clock.py`), over real sockets.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from pd_proxy.app import build
from pd_proxy.fleet.backend import Backend, Lease
from pd_proxy.process import uvicorn_config
from pd_proxy.settings.tree import build_settings
from pd_proxy_simulator import ReceivedRequest, Simulator, SimulatorConfig

from tests.contract.cases import CASES, Case
from tests.support import TestServer

LEASE = 8.0
"""Seconds for which the simulators keep a hand-off that nobody reads."""
SOON = 2.0
"""Seconds in which all that a request held is free again, unless the engines' lease must end."""
TIMEOUT = 60.0
"""Seconds after which a client gives up: no cell takes that long."""

ENGINE = {
    "step_time": 0.003,
    "prefill_rate": 5000.0,
    "blocks": 512,
    "lease": LEASE,
    "handshake_timeout": 0.05,
    "death_delay": 0.0,
}
SETTINGS: dict[str, Any] = {
    "port": 0,
    "timeouts": {"connect": 1.0, "prefill": 2.0, "handoff": 2.0, "first_token": 2.0, "idle": 2.0},
    "health": {"interval": 1.0, "timeout": 1.0, "longest_wait": 0.5},
    "breaker": {
        "max_ejected": 0
    },  # one request is looked at; what many failures do to a backend is not the matter here
    "policy": dict.fromkeys(("prefill", "decode", "mixed"), "least_loaded"),  # a cell says which pair it is about
    "warmup": False,
    "log_level": "error",
}
PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}


@dataclass
class Heard:
    """What a client was given.

    Attributes:
        whole: the answer was framed to its end.
        pieces: the texts of a stream's events in order, those without text left out.
        tokens, prompts: the token ids, where they were asked for.
        ids, created, models: all that its events said; one each in a good answer.
        error: what the error in the answer's body, or in the stream's last event, is called.
    """

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    whole: bool = False
    pieces: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)
    finish_reasons: list[str] = field(default_factory=list)
    usages: list[tuple[int, int, int]] = field(default_factory=list)
    roles: int = 0
    dones: int = 0
    ids: set[str] = field(default_factory=set)
    created: set[int] = field(default_factory=set)
    models: set[str] = field(default_factory=set)
    members: set[str] = field(default_factory=set)
    error: str = ""
    flaws: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def take(self, payload: dict[str, Any]) -> None:
        """Read one event, or the body of an answer in one piece."""
        if self.error:
            self.flaws.append("an event after the error")
        if "error" in payload:
            code, kind = payload["error"]["code"], payload["error"]["type"]
            self.error = code if isinstance(code, str) else kind  # an engine's own error has its status for code
            return
        self.ids.add(payload["id"])
        self.created.add(payload["created"])
        self.models.add(payload["model"])
        self.members.update(payload)
        for choice in payload["choices"]:
            self.members.update(choice)
            self.tokens += choice.get("token_ids") or []
            if prompt := payload.get("prompt_token_ids") or choice.get("prompt_token_ids"):
                self.prompts.append(prompt)
            said = choice.get("delta", choice.get("message", choice))
            if "delta" in choice:
                self.roles += "role" in said
            if text := said.get("text", said.get("content")):
                if self.finish_reasons:
                    self.flaws.append("text after the finish_reason")
                self.pieces.append(text)
            if choice["finish_reason"] is not None:
                self.finish_reasons.append(choice["finish_reason"])
        if usage := payload.get("usage"):
            self.usages.append((usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]))


def read_answer(raw: bytes) -> Heard:
    """What the bytes of one answer say; framing and events are read strictly."""
    heard = Heard()
    head, found, body = raw.partition(b"\r\n\r\n")
    if not found:
        heard.flaws.append("no answer")
        return heard
    status, *lines = head.decode("latin-1").split("\r\n")
    heard.status = int(status.split()[1])
    heard.headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    if heard.headers.get("transfer-encoding") == "chunked":
        body, heard.whole = _unchunk(body)
    else:
        heard.whole = len(body) == int(heard.headers["content-length"])
    if not heard.headers["content-type"].startswith("text/event-stream"):
        heard.take(json.loads(body))
        return heard
    events = body.decode().split("\n\n")
    if events.pop():
        heard.flaws.append("half an event at the end")
    for event in events:
        data = event.removeprefix("data: ")
        if heard.dones:
            heard.flaws.append("an event after [DONE]")
        if data == "[DONE]":
            heard.dones += 1
            continue
        try:
            heard.take(json.loads(data))
        except ValueError:
            heard.flaws.append("an event that is no JSON")
    return heard


def _unchunk(body: bytes) -> tuple[bytes, bool]:
    parts = []
    while match := re.match(rb"([0-9a-f]+)\r\n", body):
        size = int(match[1], 16)
        part, body = body[match.end() : match.end() + size], body[match.end() + size :]
        if not body.startswith(b"\r\n"):
            return b"".join([*parts, part]), False
        if not size:
            return b"".join(parts), body == b"\r\n"
        parts.append(part)
        body = body[2:]
    return b"".join(parts), False


async def ask(port: int, endpoint: str, body: dict[str, Any]) -> Heard:
    """Ask once, on a connection of its own. A client that waits in vain gives up after `TIMEOUT`."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = json.dumps(body).encode()
    head = f"POST {PATHS[endpoint]} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    try:
        async with asyncio.timeout(TIMEOUT):
            return read_answer(await reader.read(-1))
    except TimeoutError:
        return Heard(flaws=["no end"])
    except ConnectionError:
        return Heard(flaws=["connection reset"])
    finally:
        writer.close()


@contextmanager
def black_hole(port: int) -> Iterator[None]:
    """A listener that takes no more connections, as of a host that has just lost its power: to connect takes for
    ever."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", port), backlog=0))
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield


class Bed:
    """A gateway before simulators.

    Attributes:
        dirty: something was left behind that should not have been: nothing more can be tried here.
    """

    def __init__(self, server: TestServer, gateway: Any, port: int, engines: list[Simulator]) -> None:
        self.gateway = gateway
        self.port = port
        self.engines = engines
        self.prefill = [engine for engine in engines if engine.config.role == "prefill"]
        self.decode = [engine for engine in engines if engine.config.role == "decode"]
        self.dirty = False
        self.holes = ExitStack()
        self._server = server

    async def ask(self, endpoint: str, body: dict[str, Any]) -> Heard:
        return await ask(self.port, endpoint, body)

    def backend(self, engine: Simulator) -> Backend:
        return next(backend for backend in self.gateway.fleet if backend.url == engine.url)

    @contextmanager
    def steered(self) -> Iterator[None]:
        """New requests go to the first backend of each pool: the others have much to do already."""
        spares = [self.backend(engine) for engine in (*self.prefill[1:], *self.decode[1:])]
        leases = [Lease(backend, 1_000_000) for backend in spares]
        try:
            yield
        finally:
            for lease in leases:
                lease.release()

    def swallow(self, engine: Simulator) -> None:
        """Nothing gets through to an engine any more."""
        engine.faults.add("refuse")
        self.holes.enter_context(black_hole(engine.port))

    # What is left

    def gateway_idle(self) -> str:
        """What the gateway still holds, or nothing."""
        fleet = self.gateway.fleet
        for backend in fleet:
            if backend.inflight_requests or backend.inflight_tokens or backend._leases or backend.open_handoffs:
                return f"leases on a {backend.role} backend"
        if fleet.handoffs_pending:
            return f"pending hand-offs: {fleet.handoffs_pending}"
        if self.gateway.gate.inside:
            return "a request inside"
        if self._server.server_state.connections:
            return "a client's connection"
        return ""

    def engines_idle(self) -> str:
        """What engines that are alive still hold, or nothing."""
        for engine in self.engines:
            core = engine.engine
            held = {
                "running": core.running,
                "waiting": core.waiting,
                "stranded_blocks": core.stranded_blocks,
                "used_blocks": core.used_blocks,
                "answers": sum(1 for connection in engine.connections if connection.exchange is not None),
            }
            if engine.alive and any(held.values()):
                return f"{engine.config.role}: " + ", ".join(f"{name} {n}" for name, n in held.items() if n)
        return ""

    def idle_connections(self) -> list[int]:
        return [len(engine.connections) for engine in self.engines]

    async def until(self, holds: Callable[[], bool], seconds: float) -> bool:
        """Wait for something; whether it came true in time."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while not holds():
            if loop.time() > end:
                return False
            await asyncio.sleep(0.005)
        return True

    async def up(self) -> None:
        """Wait until every backend is in the rotation."""

        def all_in() -> bool:
            now = asyncio.get_running_loop().time()
            return all(backend.up and backend.resting_until <= now for backend in self.gateway.fleet)

        assert await self.until(all_in, 30), "a backend stays out"

    async def repair(self) -> None:
        """All faults are over: engines that died come back, and the gateway has noticed.

        A hung engine is found out first: what it owes would be waited for, for ever, once it looks well.
        """
        self.holes.close()
        for engine in self.engines:
            if engine.alive and engine.faults.lasting("hang", "health"):
                assert await self.until(lambda engine=engine: not self.backend(engine).up, 30)  # type: ignore[misc]
            engine.faults.clear()
            if engine.stopping:
                assert await self.until(lambda engine=engine: not engine.alive, 30)  # type: ignore[misc]
            for stats in self.backend(engine).outlier_stats.values():
                stats.lift(self.gateway.fleet.outlier_detector._clock())
            if not engine.alive:
                await engine.restart()
                self.backend(engine).attention.set()  # it was away for less than a probe's interval
        assert await self.until(lambda: all(engine.listening for engine in self.engines), 5)
        await self.up()
        assert await self.until(lambda: all(self._known(engine) for engine in self.engines), 5)

    def _known(self, engine: Simulator) -> bool:
        """Whether the gateway knows an engine by its present id, where it has to."""
        return self.backend(engine).coordinates.engine_ids in ((), (engine.engine.id,))

    def legs(self) -> Counter[str]:
        """The legs that reached an engine since `forget`: prefill (P), decode (D), decode without a hand-off (L), and
        a hand-off claimed only to free it (R)."""
        return Counter(_letter(request) for engine in self.engines for request in engine.requests)

    def forget(self) -> None:
        """Forget what was asked, and empty the engines' prefix caches."""
        for engine in self.engines:
            engine.requests.clear()
            engine.engine.pool.forget()


def _letter(request: ReceivedRequest) -> str:
    if request.leg != "decode":
        return {"prefill": "P", "local": "L"}[request.leg]
    return "R" if request.body.get("max_tokens") == 1 and not request.body.get("stream") else "D"


@asynccontextmanager
async def made(settings: dict[str, Any] | None = None, case: Case = CASES[0], **engine: Any) -> AsyncIterator[Bed]:
    """A bed, all backends up.

    Arguments:
        settings: the gateway's where they are other than `SETTINGS`, group by group.
        case: the connector.
        engine: the simulators' where they are other than `ENGINE`.
    """
    async with AsyncExitStack() as stack:
        roles = ("prefill", "prefill", "decode", "decode")
        options = {**ENGINE, **stack.enter_context(case.engines()), **engine}
        configs = [SimulatorConfig(role=role, **options) for role in roles]  # type: ignore[arg-type]
        engines = [await stack.enter_async_context(Simulator(config)) for config in configs]
        flags: dict[str, Any] = {role: [e.url for e in engines if e.config.role == role] for role in set(roles)}
        for name, value in {**SETTINGS, **case.gateway(engines), **(settings or {})}.items():
            flags[name] = {**SETTINGS.get(name, {}), **value} if isinstance(value, dict) else value
        sock = socket.create_server(("127.0.0.1", 0), backlog=128)
        flags["metaserver"] = {"url": f"http://127.0.0.1:{sock.getsockname()[1]}"}
        gateway = build(build_settings(flags, {}))
        server = TestServer(uvicorn_config(gateway.surface))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # no waiting for real time
        serving = asyncio.create_task(server.serve([sock]))
        await server.listening.wait()
        bed = Bed(server, gateway, sock.getsockname()[1], engines)
        try:
            await bed.up()
            yield bed
        finally:
            bed.holes.close()
            server.should_exit = True
            await serving
