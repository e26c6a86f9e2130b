"""The process: sockets, signals, and the order in which a gateway leaves.

SIGTERM: /ready turns 503 while requests are still served for `shutdown.delay`; then no new request starts, those that
run have `shutdown.grace` to end, and the rest are told so; exit 0. SIGINT skips the delay; a second signal skips the
grace.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import resource
import signal
import socket
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI

from proxy.api import operations
from proxy.api.surface import Surface
from proxy.app import Gateway, build
from proxy.relay.server import GatewayProtocol
from proxy.settings import Settings

log = logging.getLogger("pd_proxy")

_BACKLOG = 4096
_CLIENT_KEEPALIVE = 75  # seconds; longer than most clients' own, so that it is they who close
_LAST_WORDS = 5.0  # seconds for evicted requests to write their last event


class ListenError(Exception):
    """The address cannot be listened on."""


def serve(settings: Settings) -> int:
    """Run a gateway until a signal ends it. Returns the exit status.

    Raises:
        ListenError
    """
    _raise_file_limit()
    GatewayProtocol.header_limit = settings.limits.request_headers
    GatewayProtocol.header_seconds = settings.timeouts.request_headers
    sockets = [_listen(settings.host, settings.port)]
    if settings.metrics.port is not None:
        sockets.append(_listen(settings.host, settings.metrics.port))
    if not (settings.prefill or settings.decode or settings.mixed):
        log.warning("no backend is configured (--prefill, --decode, --mixed); they can be added at /instances/add")
    gateway = build(settings)
    # What is loaded by now stays for good: a full collection need not walk it while tokens wait.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)  # requests leave next to no cycles behind; looking for them cost 8 % of each
    with asyncio.Runner(loop_factory=_new_loop) as runner:
        runner.run(_run(gateway, sockets))
    return 0


async def _run(gateway: Gateway, sockets: list[socket.socket]) -> None:
    main = _Server(uvicorn_config(gateway.surface), gateway)
    servers: list[uvicorn.Server] = [main]
    if len(sockets) > 1:
        metrics = Surface(hot={}, routers=[operations.metrics(gateway.registry)])
        servers.append(_MetricsServer(uvicorn_config(metrics)))
    others = [asyncio.create_task(s.serve(sockets=[sock])) for s, sock in zip(servers[1:], sockets[1:], strict=True)]
    await main.serve(sockets=sockets[:1])
    for server in servers[1:]:
        server.should_exit = True
    await asyncio.gather(*others)


def uvicorn_config(app: FastAPI) -> uvicorn.Config:
    """How uvicorn serves a surface."""
    return uvicorn.Config(
        app,
        http=GatewayProtocol,
        ws="none",
        loop="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # the peer's address decides who may administer; no header may forge it
        timeout_keep_alive=_CLIENT_KEEPALIVE,
        timeout_graceful_shutdown=int(_LAST_WORDS),
        backlog=_BACKLOG,
    )


class _MetricsServer(uvicorn.Server):
    """The server of /metrics on a port of its own; it leaves signals to the main one."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for sock in sockets or ():
            log.info("listening on %s for /metrics", _url(sock))


class _Server(uvicorn.Server):
    """uvicorn's server with our way of leaving."""

    def __init__(self, config: uvicorn.Config, gateway: Gateway) -> None:
        super().__init__(config)
        self._gate = gateway.gate
        self._shutdown = gateway.settings.shutdown
        self._leaving: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number, delay in ((signal.SIGTERM, self._shutdown.delay), (signal.SIGINT, 0.0)):
            loop.add_signal_handler(number, self._signalled, delay)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for sock in sockets or ():  # said only now, when a signal would be heeded
            log.info("listening on %s", _url(sock))

    def _signalled(self, delay: float) -> None:
        if self._leaving is None:
            self._leaving = asyncio.create_task(self._leave(delay))
        else:
            log.warning("second signal: %d request(s) are cut", self._gate.inside)
            self._gate.closed = True
            self._gate.evict()
            self.should_exit = True

    async def _leave(self, delay: float) -> None:
        gate = self._gate
        gate.draining = True
        log.info("leaving: %d request(s) are running", gate.inside)
        await asyncio.sleep(delay)
        gate.closed = True
        if not await gate.empty(self._shutdown.grace):
            log.warning("%d request(s) did not end within %g s and are cut", gate.inside, self._shutdown.grace)
            gate.evict()
            await gate.empty(_LAST_WORDS)
        self.should_exit = True


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:  # not built for this platform; everything works, slower
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


def _listen(host: str, port: int) -> socket.socket:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        return socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except OSError as error:
        why = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise ListenError(f"cannot listen on {host}:{port}: {why}") from None


def _url(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _raise_file_limit() -> None:
    """Every stream holds two sockets; the usual soft limit of 1024 files would end at 500 streams."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
