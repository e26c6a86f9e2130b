"""The simulated engine as a process: its two listening sockets, its connections, its start and end.

Invariant: everything that a peer can see of the process (sockets, connections) belongs to `Simulator`, so that `kill`
can close all of it at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import Counter, deque
from collections.abc import Callable
from types import TracebackType
from typing import Any

from pd_proxy_simulator.adapters import Adapters
from pd_proxy_simulator.config import SimulatorConfig
from pd_proxy_simulator.engine import Engine
from pd_proxy_simulator.engine_process import ReceivedRequest
from pd_proxy_simulator.faults import Faults
from pd_proxy_simulator.http import Connection, Exchange
from pd_proxy_simulator.kv_events import NullListener, Publisher
from pd_proxy_simulator.responses import ResponseStore
from pd_proxy_simulator.routes import Routes
from pd_proxy_simulator.sidechannel import Serving, SideChannelServer
from pd_proxy_simulator.watch import Watch


class Simulator:
    """One simulated vLLM engine in the running event loop."""

    def __init__(self, config: SimulatorConfig | None = None) -> None:
        self.config = config or SimulatorConfig()
        self.url = ""
        self.port = self.config.port
        self.side_port = self.config.side_port
        self.kv_events_port = self.config.kv_events or 0
        self.kv_replay_port = self.config.kv_replay
        self.publisher: Publisher | None = None  # of KV events
        self.keep_alive = self.config.keep_alive
        self.connections: set[Connection] = set()
        self.requests: deque[ReceivedRequest] = deque(maxlen=self.config.request_log)
        self.probes: Counter[str] = Counter()  # requests to /health, /metrics and the like, by path
        self.operations: list[tuple[str, str]] = []  # operators' commands: path and query
        self.asleep = False
        self.paused = False
        self.stopping = False  # SIGTERM has come
        self.profiling = False
        self.served = 0  # inference requests that were answered to the end
        self.alive = False
        self.faults = Faults(self._faults_changed)
        self.engine: Engine
        self.responses: ResponseStore
        self.adapters: Adapters
        self._watch = Watch()
        self._routes = Routes(self)
        self._listener: asyncio.Server | None = None
        self._side_listener: asyncio.Server | None = None
        self._serving: Serving
        self._placeholders: list[socket.socket] = []
        self._wanted: object = None  # the latest call that should listen
        self._one_at_a_time = asyncio.Lock()
        self._timers: set[asyncio.TimerHandle] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._refusing = False
        self._new_engine()

    # Start and end.

    def _new_engine(self) -> None:
        self.responses = ResponseStore()
        self.adapters = Adapters(self.config)
        self.engine = Engine(self.config, self.faults, changed=self._watch.changed, died=self._engine_died)
        engine = self.engine
        self._serving = Serving(
            self.config,
            engine.id,
            engine.pool,
            engine.handoffs,
            self.faults,
            engine.side,
            lambda message: engine.media.on_message(message) or engine.side.on_message(message),
        )

    async def start(self) -> None:
        """Listen, and begin to make steps."""
        loop = asyncio.get_running_loop()
        host = self.config.host
        serving = self._serving
        self._give_ports_up()
        self._side_listener = await loop.create_server(lambda: SideChannelServer(serving), host, self.side_port)
        self.side_port = self._side_listener.sockets[0].getsockname()[1]
        self.engine.side_port = self.side_port
        self._publish()
        self.engine.start()
        self.alive = True
        await self._listen()
        self.engine.http_address = self.url.removeprefix("http://")
        self.engine.side.start()
        self._faults_changed()
        self._watch.changed()

    def _publish(self) -> None:
        """Publish KV events from now on, where the configuration says so."""
        config = self.config
        if config.kv_events is None:
            return
        self.publisher = Publisher(
            config.host,
            self.kv_events_port,
            self.kv_replay_port,
            topic=config.kv_events_topic,
            encoding=config.kv_events_encoding,
            hashes=config.kv_events_hashes,
            block_size=config.block_size,
            buffer=config.kv_events_buffer,
        )
        self.kv_events_port, self.kv_replay_port = self.publisher.port, self.publisher.replay_port
        self.engine.pool.listener = self.publisher

    async def _listen(self) -> None:
        """Listen, unless a later call has replaced this one in the meantime."""
        loop = asyncio.get_running_loop()
        wanted = self._wanted = object()
        async with self._one_at_a_time:
            if self._wanted is not wanted:
                return
            self._give_ports_up()
            listener = await loop.create_server(
                lambda: Connection(self), self.config.host, self.port, backlog=2048, reuse_address=True
            )
            if self._wanted is not wanted:
                listener.close()
                return
        self._listener = listener
        self.port = listener.sockets[0].getsockname()[1]
        shown = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
        self.url = f"http://{shown}:{self.port}"

    async def stop(self, grace: float = 0.25) -> None:
        """Stop in order: accept no more connections, let requests in flight run for `grace` seconds, then close."""
        self._close_listener()
        if self.alive and grace > 0:
            with contextlib.suppress(TimeoutError):
                await self.wait_for(lambda: all(one.exchange is None for one in self.connections), grace)
        self.alive = False
        for connection in list(self.connections):
            if connection.paused:
                connection.reset()  # its peer does not read, so that an orderly close would not end
            else:
                connection.close()
        self._end()
        self._give_ports_up()
        # Some turns of the event loop, so that transports and handlers have ended before a test's loop does.
        for _ in range(3):
            await asyncio.sleep(0)

    def terminate(self) -> None:
        """Handle SIGTERM as vLLM does.

        By default running requests end with finish reason "abort" at once, and the port is closed shortly after; until
        then `/health` answers 200, and new connections wait and are then reset. With `shutdown_timeout` running
        requests may go on for that time, and new requests are refused; the process ends when nothing runs and no
        hand-off is kept. What has not ended by then hangs: the core is killed, and the API server waits for its clients
        to close.
        """
        if self.stopping or not self.alive:
            return
        self.stopping = True
        if not self.config.shutdown_timeout:
            self.engine.give_up()
            self._later(self.config.exit_delay, self.kill)
            return
        self._later(self.config.shutdown_timeout, self._drain_ran_out)
        task = asyncio.get_running_loop().create_task(self._drain())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _drain(self) -> None:
        await self.wait_for(lambda: not self.alive or self._idle, 86_400)
        if self.alive:
            self.kill()

    @property
    def _idle(self) -> bool:
        """Whether nothing runs, nothing is kept for decode, and no request is being answered."""
        busy = self.engine.running + self.engine.waiting + len(self.engine.handoffs)
        return not busy and all(connection.exchange is None for connection in self.connections)

    def _drain_ran_out(self) -> None:
        """Kill the core but not the API server, which accepts no more connections and keeps the open ones."""
        self.alive = False
        self._close_listener()
        for connection in list(self.connections):
            if connection.exchange is None:
                connection.close()
        self._end()

    async def suspend(self, mode: str) -> None:
        """Handle `/pause` and `/sleep`: running requests are aborted (`abort`), may end (`wait`), or stand still
        (`keep`). New requests wait."""
        if mode == "abort":
            self.engine.give_up()
        elif mode == "keep":
            self.engine.freeze(True)
        else:
            await self.wait_for(lambda: not self.engine.running + self.engine.waiting, 86_400)
        self._watch.changed()

    @property
    def suspended(self) -> bool:
        """Whether new requests wait."""
        return self.asleep or self.paused or (self.stopping and not self.config.shutdown_timeout)

    @property
    def draining(self) -> bool:
        """Whether new requests are refused, while running ones may end."""
        return self.stopping and bool(self.config.shutdown_timeout)

    def kill(self) -> None:
        """End as peers see `kill -9`: nothing listens any more and every connection is reset."""
        self.alive = False
        self._close_listener()
        for connection in list(self.connections):
            connection.kill()
        self._end()

    async def restart(self) -> None:
        """Start again on the same ports with a new engine: another id, an empty cache, counters at zero."""
        if self.alive:
            self.kill()
            await asyncio.sleep(0)
        for connection in list(self.connections):
            connection.kill()  # left from an engine whose drain ran out
        self.asleep = self.paused = self.stopping = self.profiling = False
        self._new_engine()
        await self.start()

    def _end(self) -> None:
        self._close_side_listener()
        self._serving.close()
        if self.publisher is not None:
            self.engine.pool.listener = NullListener()
            self.publisher.close()
            for port in (self.kv_events_port, self.kv_replay_port):
                self._hold(socket.AF_INET6 if ":" in self.config.host else socket.AF_INET, (self.config.host, port))
            self.publisher = None
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()
        self.engine.close()
        self._watch.changed()

    def _close_listener(self) -> None:
        self._wanted = None
        if self._listener is not None:
            self._close_but_hold(self._listener)
            self._listener = None

    def _close_side_listener(self) -> None:
        if self._side_listener is not None:
            self._close_but_hold(self._side_listener)
            self._side_listener = None

    def _close_but_hold(self, listener: asyncio.Server) -> None:
        """Stop listening, but keep the port from being given to another socket until this engine listens again."""
        bound = [(one.family, one.getsockname()) for one in listener.sockets]
        listener.close()
        for family, address in bound:
            self._hold(family, address)

    def _hold(self, family: int, address: Any) -> None:
        placeholder = socket.socket(family, socket.SOCK_STREAM)
        self._placeholders.append(placeholder)
        placeholder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):
            placeholder.bind(address)

    def _give_ports_up(self) -> None:
        while self._placeholders:
            self._placeholders.pop().close()

    def _engine_died(self) -> None:
        self._close_side_listener()
        self._later(self.config.death_delay, self.kill)

    def _later(self, delay: float, action: Callable[[], None]) -> None:
        handle: asyncio.TimerHandle

        def act() -> None:
            self._timers.discard(handle)
            action()

        handle = asyncio.get_running_loop().call_later(delay, act)
        self._timers.add(handle)

    async def __aenter__(self) -> Simulator:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()

    async def wait_for(self, predicate: Callable[[], bool], timeout: float = 30.0) -> None:
        """Return once `predicate()` is true, looked at after every change; raises TimeoutError."""
        await self._watch.wait_for(predicate, timeout)

    def connection_changed(self) -> None:
        """Called by connections when they open or close."""
        self._watch.changed()

    def changed(self) -> None:
        """Check the predicates that are waited for."""
        self._watch.changed()

    def expire_handoffs(self) -> None:
        """Expire every lease now, as after `lease` seconds without a pull."""
        self.engine.handoffs.expire_all()

    # Faults that hit the whole engine.

    def _faults_changed(self) -> None:
        fault = self.faults.find("refuse")
        if fault is None:
            if self._refusing:
                self._refusing = False
                self._spawn_listen()
        elif not self._refusing and self.alive:
            self._refusing = True
            self._close_listener()
            for connection in list(self.connections):
                if connection.exchange is None:
                    connection.close()
            if fault.duration_s is not None:
                self._later(fault.duration_s, lambda: self.faults.remove(fault))
        self._watch.changed()

    def _spawn_listen(self) -> None:
        if not self.alive:
            return
        task = asyncio.get_running_loop().create_task(self._listen())
        self._tasks.add(task)
        task.add_done_callback(self._listening_again)

    def _listening_again(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._watch.changed()

    @property
    def listening(self) -> bool:
        """Whether connections to the API port are accepted."""
        return self._listener is not None

    async def handle(self, exchange: Exchange) -> None:
        """Called by connections for each request."""
        await self._routes.handle(exchange)
