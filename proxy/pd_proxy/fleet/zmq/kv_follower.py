"""Follows one publisher of KV events over ZeroMQ, and passes its batches to an `EngineCache`.

An engine publishes batches with numbers that count up from 0 (`--kv-events-config` of vLLM and SGLang). ZeroMQ loses
batches when a subscriber is slow or disconnected. Missing batches are requested from the engine's replay endpoint, if
the settings name one; the first time all that the engine still has, since its cache may be warm before the gateway
starts. A number that is lower than the last one means that the engine has restarted. So does a gap, if the last batch
before it is requested again and is not the same.

Events help placement and no request waits for them. So they get a bounded share of the event loop's time (`Turns`),
whatever the engines send. Batches that are not read wait in ZeroMQ's buffers, and at last at the engine, which drops
them.

pyzmq is an extra of the package; it is imported only if a group's settings ask for events.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from time import monotonic
from typing import Any, Protocol

from pd_proxy.fleet.zmq.listener import library

log = logging.getLogger("pd_proxy.fleet")

_LONGEST = 4 * 1024 * 1024
"""Bytes of a part. A step of 64 k tokens has some 400 kB; libzmq disconnects a peer that sends more."""
_WAITING = 200  # messages of each engine that libzmq keeps, of 40 kB as a rule; the engine keeps 100,000 more
_SHARE = 0.25  # of the event loop's time, for the events of all engines
_TURN = 0.001  # seconds for which events are handled at a time
_CONNECTING = 10.0  # seconds without a connection after which a new socket is tried
_ASKS = 16  # requests in a row for one gap: a publisher drops answers when they are many
_MOST_ANSWERS = 200_000  # batches in one answer; vLLM keeps 10,000
_SILENCE = 5.0  # seconds to wait for the first batch of an answer
_PAUSE = 1.0  # seconds to wait for each further batch
_CALM = 30.0  # seconds until a publisher that has not answered is asked again, and between two equal log lines about it


class Cache(Protocol):
    """What is known of one engine's cache by its batches."""

    def apply(self, payload: bytes) -> Iterator[None]:
        """Apply a batch step by step, so that other work can run between two steps."""

    def clear(self) -> None:
        """Note that the engine has restarted, and has nothing cached."""


class Turns:
    """Turns in which events are handled, one at a time. All together take at most a share of the event loop's time.

    Arguments:
        share: of the event loop's time.
    """

    def __init__(self, share: float = _SHARE) -> None:
        self._rest = 1 / share - 1
        self._lock = asyncio.Lock()
        self._owed = 0.0

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[float]:
        """Wait for a turn; yields the time at which it should end."""
        async with self._lock:
            if self._owed > _TURN:
                await asyncio.sleep(self._owed)
                self._owed = 0.0
            began = monotonic()
            try:
                yield began + _TURN
            finally:
                self._owed += (monotonic() - began) * self._rest

    async def take(self, steps: Iterator[None]) -> None:
        """Go through all steps, in as many turns as they take."""
        while True:
            async with self.turn() as end:
                for _ in steps:
                    if monotonic() > end:
                        break
                else:
                    return


class Follower:
    """Follows one publisher.

    Arguments:
        name: of the engine, for log lines.
        events, replay: the publisher's endpoints, as ZeroMQ writes them; the second may be empty.
        topic: of the events.
        cache: gets the batches.
        counts: the number of batches by outcome, shared by all followers.
    Attributes:
        connected: whether the subscription is connected now.
    """

    def __init__(
        self,
        context: Any,
        name: str,
        events: str,
        replay: str,
        topic: str,
        cache: Cache,
        turns: Turns,
        counts: Counter[str],
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._zmq = library("kv_events.endpoint is set")
        self._context = context
        self._name = name
        self._events = events
        self._replay = replay
        self._topic = topic.encode()
        self._cache = cache
        self._turns = turns
        self._counts = counts
        self._clock = clock
        self._last: int | None = None  # number of the last batch that was taken
        self._mark = 0  # the hash of that batch
        self._live: int | None = None  # number of the last batch that was published, not replayed
        self._same = False  # the replay endpoint has sent the last batch that was taken again, unchanged
        self._unasked = False  # the batches that were published before the connection have not been requested yet
        self._busy = asyncio.Lock()
        self._calm_until: dict[str, float] = {}
        self.connected = False

    @property
    def settled(self) -> bool:
        """Whether the cache is up to date: the publisher is connected, and missing batches have been requested."""
        return self.connected and not self._busy.locked()

    async def run(self) -> None:
        """Follow the publisher until cancelled."""
        while True:
            await self._subscribe()

    async def _subscribe(self) -> None:
        """Follow the publisher over one socket. ZeroMQ reconnects it, but not to a peer that has violated the protocol,
        such as by a message that is too long: this returns when the socket has not been connected for a while."""
        zmq = self._zmq
        with self._socket(zmq.SUB) as subscription:
            subscription.setsockopt(zmq.SUBSCRIBE, self._topic)
            monitor = subscription.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
            subscription.connect(self._events)
            try:
                async with asyncio.TaskGroup() as group:
                    watching = group.create_task(self._watch(monitor))
                    await self._listen(subscription)
                    watching.cancel()
            finally:
                self.connected = False
                subscription.disable_monitor()

    async def _listen(self, subscription: Any) -> None:
        """Read what is published, until the socket has not been connected for a while."""
        while True:
            try:
                parts = await self._receive(subscription, _CONNECTING)
            except TimeoutError:
                if not self.connected:
                    return
                if self._unasked and self._is_calm("unanswered"):
                    async with self._busy:
                        await self._look_back()
                continue
            async with self._busy:
                await self._hear(parts)

    async def _receive(self, socket: Any, seconds: float) -> list[bytes]:
        """Wait for the next message. pyzmq reads a message that is there already without yielding to the event loop,
        which takes longer than handling most messages. So it is done in a turn too.

        Raises:
            TimeoutError: no message came within `seconds`.
        """
        async with self._turns.turn():
            coming: asyncio.Future[list[bytes]] = socket.recv_multipart()
        async with asyncio.timeout(seconds):
            return await coming

    async def _watch(self, monitor: Any) -> None:
        """Note when the publisher is connected, and when not."""
        connected = self._zmq.EVENT_HANDSHAKE_SUCCEEDED.to_bytes(2, "little")
        while True:
            event, _ = await monitor.recv_multipart()
            self.connected = event[:2] == connected
            if self.connected:
                self._log(
                    logging.INFO, "connected", "the KV events of %s are received from %s", self._name, self._events
                )
                self._calm_until.pop("unanswered", None)  # it may be another process, and that may answer
                self._unasked = True
                async with self._busy:
                    await self._look_back()
            else:
                self._log(
                    logging.WARNING,
                    "cut",
                    "the connection to the KV events of %s at %s has ended",
                    self._name,
                    self._events,
                )

    async def _hear(self, parts: list[bytes]) -> None:
        """Handle a message that was published."""
        if len(parts) != 3 or len(parts[1]) != 8:
            self._garbage("it does not have the three parts of a batch")
            return
        number = int.from_bytes(parts[1], "big")
        if self._live is not None and number <= self._live:
            await self._restarted()
        elif number > (-1 if self._last is None else self._last) + 1:
            if self._last is not None:
                self._counts["gap"] += 1
            await self._fill(number)
        self._live = number
        if self._last is None or number > self._last:
            await self._take(number, parts[2])

    async def _restarted(self) -> None:
        """Handle a number that shows a restart: it is another process's."""
        self._forget_all()
        if self._replay and self._is_calm("unanswered"):
            await self._catch_up()

    async def _fill(self, number: int) -> None:
        """Request the batches that are missing before this one."""
        if self._replay and self._is_calm("unanswered"):
            await self._catch_up()
        if self._last is not None and number > self._last + 1:
            self._counts["lost"] += number - self._last - 1
            why = "the publisher does not have them any more" if self._replay else "no replay endpoint is set"
            self._log(
                logging.WARNING,
                "lost",
                "KV events of %s are lost (%d batches; %s): the prefix index may be wrong about its cache for a while",
                self._name,
                number - self._last - 1,
                why,
            )

    async def _take(self, number: int, payload: bytes) -> None:
        """Apply a batch to the cache, in as many turns as it takes."""
        steps = self._cache.apply(payload)
        try:
            await self._turns.take(steps)
        finally:  # a batch that cannot be applied is not requested again
            self._last, self._mark = number, hash(payload)
            self._counts["batch"] += 1

    # Replay

    async def _look_back(self) -> None:
        """Request what the publisher had published before it was connected."""
        if not self._replay or not self._is_calm("unanswered"):
            return
        before, taken = self._last, self._counts["replayed"]
        self._same = self._unasked = False
        await self._catch_up()
        nothing = self._last == before and self._counts["replayed"] == taken and not self._same
        if before is not None and nothing and self._is_calm("unanswered"):
            # The answer lacks even the last batch that was taken: this process has published fewer since its start.
            self._forget_all()
            await self._catch_up()

    async def _catch_up(self) -> None:
        """Request all batches that were published after the last one that was taken, and take them."""
        for _ in range(_ASKS):
            before = self._last
            if await self._ask() or self._last == before:
                return

    async def _ask(self) -> bool:
        """Request them once; returns whether there are no more. An answer may lack any batch and its end: a publisher
        drops what it cannot send at once. So only an answer without a new batch is the last."""
        zmq = self._zmq
        first = self._last or 0  # including the last one that was taken, to see whether it is the same
        taken = False
        with self._socket(zmq.DEALER) as asking:
            asking.connect(self._replay)
            await asking.send_multipart([b"", first.to_bytes(8, "big")])
            for _ in range(_MOST_ANSWERS):
                try:
                    parts = await self._receive(asking, _PAUSE if taken else _SILENCE)
                except TimeoutError:
                    if taken:
                        return False
                    self._unanswered("there is no answer")
                    return True
                # An empty part, the topic (not in older engines), the number, the batch.
                if not 3 <= len(parts) <= 4 or len(parts[-2]) != 8:
                    self._unanswered("the answer is not valid")
                    return True
                number, payload = int.from_bytes(parts[-2], "big", signed=True), parts[-1]
                if number < 0:
                    return not taken
                if self._last is None or number == self._last + 1 or (number > self._last and not taken):
                    if self._last is not None and number > self._last + 1:
                        self._counts["lost"] += number - self._last - 1  # the publisher does not keep them any more
                    await self._take(number, payload)
                    self._counts["replayed"] += 1
                    taken = True
                elif number > self._last:
                    return False  # a part of the answer is lost: request it again
                elif number == self._last and not taken:
                    self._same = hash(payload) == self._mark
                    if not self._same:
                        self._forget_all()
                        return False
        self._unanswered("the answer does not end")
        return True

    def _forget_all(self) -> None:
        """Note that the publisher is another process than the one whose last batch was taken."""
        self._counts["restart"] += 1
        self._log(
            logging.INFO, "restart", "%s has restarted, according to its KV events: nothing is cached there", self._name
        )
        self._cache.clear()
        self._last = self._live = None

    # Log lines

    def _unanswered(self, why: str) -> None:
        self._counts["unanswered"] += 1
        self._unasked = True
        self._log(
            logging.WARNING,
            "unanswered",
            "missed KV events of %s cannot be requested at %s: %s",
            self._name,
            self._replay,
            why,
        )
        self._calm_until["unanswered"] = self._clock() + _CALM

    def _garbage(self, why: str) -> None:
        self._counts["garbage"] += 1
        self._log(
            logging.WARNING, "garbage", "%s publishes a message that is not a batch of KV events: %s", self._name, why
        )

    def _is_calm(self, what: str) -> bool:
        return self._clock() >= self._calm_until.get(what, 0.0)

    def _log(self, level: int, what: str, text: str, *args: object) -> None:
        """Log a line that an engine could cause again and again."""
        if self._is_calm(what):
            self._calm_until[what] = self._clock() + _CALM
            log.log(level, text, *args)

    def _socket(self, kind: int) -> Any:
        zmq = self._zmq
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.MAXMSGSIZE, _LONGEST)
        socket.setsockopt(zmq.RCVHWM, _WAITING)
        socket.setsockopt(zmq.IPV6, 1)
        socket.setsockopt(zmq.HEARTBEAT_IVL, 5000)  # ms; a host that is gone closes no connection
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 15_000)
        socket.setsockopt(zmq.RECONNECT_IVL, 100)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 5000)
        return socket
