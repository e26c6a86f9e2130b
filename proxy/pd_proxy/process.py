"""The process: signals, and the order in which a gateway starts and shuts down.

A gateway accepts connections at once, except where another gateway serves the address: then only when it is ready.

SIGTERM and SIGQUIT shut it down in this order: /ready turns 503 while requests are still served for `shutdown.delay`;
no new request starts, and those that run have `shutdown.grace` to end; the rest are answered with an error; the process
exits with 0. SIGINT skips the delay, and a second signal skips the grace. Where another process has the address too,
new connections are left to it, and no request is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from time import monotonic
from typing import cast

import uvicorn
from fastapi import FastAPI

from pd_proxy.api import operations
from pd_proxy.api.surface import Surface
from pd_proxy.app import Gateway, build
from pd_proxy.fleet.readiness import not_ready
from pd_proxy.fleet.zmq.listener import CannotListen
from pd_proxy.http.body_memory import Bodies
from pd_proxy.http.client_connections import Connections
from pd_proxy.http.inbound import Reading
from pd_proxy.http.server import GatewayProtocol
from pd_proxy.runtime import garbage, heap
from pd_proxy.runtime.signals import IGNORED, LEAVING, ignore, log_ignored
from pd_proxy.runtime.sockets import (
    BACKLOG,
    Listener,
    ListenError,
    bind,
    connection_limit,
    inherited,
    notify,
    own_socket,
    raise_file_limit,
    steer_here,
    unix_socket,
)
from pd_proxy.settings.tree import Settings
from pd_proxy.workers.context import WorkerContext
from pd_proxy.workers.peers import socket_of
from pd_proxy.workers.supervisor import supervise

__all__ = ["ListenError", "protocol", "serve", "uvicorn_config"]

log = logging.getLogger("pd_proxy")

_CLIENT_KEEPALIVE = 75  # seconds; longer than most clients' own limits, so that clients close idle connections
_LAST_WORDS = 5.0  # seconds for cancelled requests to write their last event
_HANDSHAKES = 1.0  # seconds in which connections are still accepted whose handshake began with this process
_LAST_REQUEST = 5.0  # seconds for the connections that were accepted last to send their request
_INHERITED_TIMEOUT = 30.0  # seconds for backends to come up; until then no process may be accepting connections
_TICK = 0.02  # seconds between checks where no event announces the change
_LOG_EVERY = 10.0  # seconds between log lines about what is waited for
_SPARED = frozenset({"/health", "/ready", "/live", "/ping", "/metrics", "/healthcheck", "/admin/"})
_SCRAPERS = 16  # connections to the port of /metrics


def serve(settings: Settings) -> int:
    """Run a gateway until a signal ends it. Returns the exit status.

    Raises:
        ListenError
    """
    ignore()
    files = raise_file_limit()
    listeners = _listeners(settings)
    _warn_of_operators(settings)
    wanted, most = settings.limits.connections or 0, settings.workers * connection_limit(files, _backends(settings))
    if wanted > most:
        log.warning(
            "limits.connections is %d; %d are served: a stream needs up to three files, and there are %d (ulimit -n)",
            wanted,
            most,
            files,
        )
    path = settings.admin_socket
    takes_over = settings.reuse_port or listeners[0].inherited
    with own_socket(Path(path), reuse=takes_over) if path else contextlib.nullcontext() as admin:
        work = partial(_work, settings, files, listeners, admin)
        return supervise(settings.workers, listeners, work) if settings.workers > 1 else work(None)


def _warn_of_operators(settings: Settings) -> None:
    """Log which administration requests are refused by these settings."""
    if settings.admin_key is not None:
        return
    if not _is_loopback(settings.host):
        log.warning(
            "no admin_key is set: GET /admin/… answers programs on this machine, and a reverse proxy there can pass "
            "others off as these; set admin_key where there is one"
        )
    if not settings.admin_socket:
        # In vLLM's example proxy /instances/add needs no key, so its users may expect that it works.
        log.log(
            logging.INFO if _has_backends(settings) else logging.WARNING,
            "neither admin_key nor admin_socket is set: requests that change the gateway (/instances/add) are refused",
        )


def _has_backends(settings: Settings) -> bool:
    return any(group.prefill or group.decode or group.mixed for group in settings.all_groups())


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _work(
    settings: Settings,
    files: int,
    listeners: list[Listener],
    admin: socket.socket | None,
    context: WorkerContext | None,
) -> int:
    """Run a gateway, or one worker of it. Returns the exit status."""
    kind = protocol(settings if context is None else settings.share(context.workers), files)
    gateway = build(settings, kind.shared, context)
    for surface in (gateway.surface, gateway.inner, gateway.admin):
        if surface is not None:
            surface.make_routes()
    garbage.freeze()
    heap.keep_free_memory()
    with asyncio.Runner(loop_factory=_new_loop) as runner:
        try:
            runner.run(_run(gateway, kind, listeners, admin, context))
        except CannotListen as error:
            raise ListenError(str(error)) from None
    return 0


def _listeners(settings: Settings) -> list[Listener]:
    """The main socket, and the one for /metrics where that has a port of its own."""
    timeout = settings.timeouts.idle
    wanted = [settings.port] + ([settings.metrics.port] if settings.metrics.port is not None else [])
    listeners = inherited(timeout)[: len(wanted)]
    return listeners + [
        bind(settings.host, port, reuse=settings.reuse_port, timeout=timeout) for port in wanted[len(listeners) :]
    ]


def protocol(settings: Settings, files: int) -> type[GatewayProtocol]:
    """The protocol that serves a gateway's clients.

    Arguments:
        files: how many the process may open.
    """

    class Bounded(GatewayProtocol):
        __slots__ = ()

        header_limit = settings.limits.request_headers
        header_seconds = settings.timeouts.request_headers
        write_seconds = settings.timeouts.idle
        shared = Connections(
            min(settings.limits.connections or files, connection_limit(files, _backends(settings))),
            _SPARED,
            settings.limits.connections_per_address,
            Bodies(settings.limits.bodies, settings.limits.request_body),
        )

    return Bounded


def _backends(settings: Settings) -> int:
    """How many backends are configured."""
    groups = settings.all_groups()
    return sum(len(group.prefill) + len(group.decode) + len(group.mixed) + len(group.encode) for group in groups)


def _apart(kind: type[GatewayProtocol]) -> type[GatewayProtocol]:
    """The same protocol with a connection limit of its own, so that clients cannot use up the connections of
    scrapers."""

    class Apart(kind):  # type: ignore[misc, valid-type]
        __slots__ = ()

        shared = Connections(_SCRAPERS, frozenset({"/metrics"}))

    return Apart


async def _run(
    gateway: Gateway,
    kind: type[GatewayProtocol],
    listeners: list[Listener],
    admin: socket.socket | None = None,
    context: WorkerContext | None = None,
) -> None:
    gateway.listen()
    main = _Server(
        uvicorn_config(gateway.surface, kind),
        gateway,
        kind.shared,
        listeners[0],
        _ready_notifier(context, listeners[0].url),
    )
    beside: list[uvicorn.Server] = []
    if len(listeners) > 1:
        metrics = Surface(hot={}, routers=lambda: [operations.metrics(gateway.registry, gateway.peers)])
        beside.append(_SideServer(uvicorn_config(metrics, _apart(kind)), listeners[1].socket, taken=listeners[1].taken))
        log.info("listening on %s for /metrics", listeners[1].url)
    if admin is not None and gateway.admin is not None:
        beside.append(_SideServer(uvicorn_config(gateway.admin), admin))
        log.info("listening at %s for operators", gateway.settings.admin_socket)
    if context is not None and gateway.inner is not None:
        inner = uvicorn_config(gateway.inner)
        beside.append(_SideServer(inner, unix_socket(socket_of(context.directory, context.worker))))
    others = [asyncio.create_task(server.serve()) for server in beside]
    tidying = asyncio.create_task(garbage.collect_when_quiet(lambda: gateway.gate.inside))
    await main.serve()
    tidying.cancel()
    for server in beside:
        server.should_exit = True
    await asyncio.gather(*others)


def _ready_notifier(context: WorkerContext | None, url: str) -> Callable[[], object]:
    """Make the function that reports that connections are accepted."""

    def notify_ready() -> None:
        if context is None:
            log.info("listening on %s", url)
            notify("READY=1")
        else:
            log.debug("worker %d serves", context.worker)
            os.write(context.ready, b".")  # the supervisor reports it for all workers

    return notify_ready


def uvicorn_config(app: FastAPI, kind: type[GatewayProtocol] = GatewayProtocol) -> uvicorn.Config:
    """How uvicorn serves a surface."""
    return uvicorn.Config(
        app,
        http=kind,
        ws="none",
        loop="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # the peer's address decides who may administer; no header may forge it
        timeout_keep_alive=_CLIENT_KEEPALIVE,
        timeout_graceful_shutdown=int(_LAST_WORDS),
        backlog=BACKLOG,
    )


class _SideServer(uvicorn.Server):
    """A server beside the main one, which handles the signals."""

    def __init__(self, config: uvicorn.Config, sock: socket.socket, *, taken: bool = False) -> None:
        super().__init__(config)
        self._socket = sock
        self._taken = taken

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=[self._socket])
        if self._taken:
            steer_here(self._socket)


class _Server(uvicorn.Server):
    """uvicorn's server, with the gateway's order of starting and shutting down."""

    def __init__(
        self,
        config: uvicorn.Config,
        gateway: Gateway,
        shared: Connections,
        listener: Listener,
        on_listening: Callable[[], object],
    ) -> None:
        super().__init__(config)
        self._on_listening = on_listening
        self._fleet = gateway.fleet
        self._gate = gateway.gate
        self._shutdown = gateway.settings.shutdown
        self._shared = shared
        self._listener = listener
        self._leaving: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in LEAVING:
            loop.add_signal_handler(number, self._signalled, 0.0 if number == signal.SIGINT else self._shutdown.delay)
        for number in IGNORED:
            loop.add_signal_handler(number, log_ignored, number)
        try:
            yield
        finally:
            for number in (*LEAVING, *IGNORED):
                loop.remove_signal_handler(number)
            ignore()  # so that these signals do not end the process before it has shut down

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=[])  # only the lifespan, which starts the health checks
        if self._listener.taken:
            log.info("another process listens on %s; taking over once ready", self._listener.url)
            await self._wait_ready(None)
        elif self._listener.inherited:
            await self._wait_ready(_INHERITED_TIMEOUT)
        if self.should_exit:
            return
        make = cast("Callable[..., asyncio.Protocol]", self.config.http_protocol_class)
        connection = partial(make, self.config, self.server_state, self.lifespan.state)
        loop = asyncio.get_running_loop()
        self.servers.append(await loop.create_server(connection, sock=self._listener.socket, backlog=BACKLOG))
        if self._listener.taken:
            steer_here(self._listener.socket)
        self._on_listening()  # last, since the report means that signals are handled too

    async def _wait_ready(self, timeout: float | None) -> None:
        """Wait until a request could be served. Until then connections are left to the other process."""
        started = logged = monotonic()
        while not self.should_exit and (reason := not_ready(self._fleet)):
            now = monotonic()
            if timeout is not None and now - started > timeout:
                break
            if now - logged > _LOG_EVERY:
                logged = now
                log.warning("not ready to serve %s yet: %s", self._listener.url, reason)
            await asyncio.sleep(_TICK)

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
        succeeded = self._listener.shared()
        log.info("leaving: %d request(s) are running%s", gate.inside, "; another process listens" if succeeded else "")
        notify("STOPPING=1")
        self._shared.leaving = True
        for connection in self._connections:
            connection.leave()
        if self._listener.inherited:
            self._stop_accepting()  # its owner keeps the socket open, so connections that wait in it are not lost
        await asyncio.sleep(max(delay, _HANDSHAKES) if succeeded else delay)
        if succeeded:
            self._stop_accepting()
        else:
            gate.closed = True
        for connection in self._connections:
            connection.close_if_idle()
        await self._wait_empty()
        self.should_exit = True

    async def _wait_empty(self) -> None:
        """Wait for the requests that run and for clients that still read. Cancel what has not ended after the grace."""
        gate = self._gate
        end = monotonic() + self._shutdown.grace
        if not gate.closed:
            await asyncio.sleep(_TICK)
            await self._wait_none(
                lambda connection: connection.reading is Reading.HEAD, min(_LAST_REQUEST, self._shutdown.grace)
            )
        if not await gate.wait_empty(max(0.0, end - monotonic())):
            log.warning("%d request(s) did not end within %g s and are cut", gate.inside, self._shutdown.grace)
            gate.evict()
            await gate.wait_empty(_LAST_WORDS)
        await self._wait_none(lambda connection: connection.unsent, end - monotonic())

    async def _wait_none(self, what: Callable[[GatewayProtocol], object], seconds: float) -> None:
        """Wait until `what` is true of no connection, at most so many seconds."""
        end = monotonic() + seconds
        while monotonic() < end:
            if not any(map(what, self._connections)):
                return
            await asyncio.sleep(_TICK)

    def _stop_accepting(self) -> None:
        for server in self.servers:
            server.close()

    @property
    def _connections(self) -> list[GatewayProtocol]:
        return list(self.server_state.connections)  # type: ignore[arg-type]


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:  # not built for this platform; without it everything works, but slower
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop
