"""One publisher of KV events, followed over ZeroMQ: what it says reaches an `EngineCache`.

An engine publishes batches with numbers that count up from 0 (`--kv-events-config` of vLLM and SGLang). ZeroMQ loses
some when a subscriber is slow or cut off, so numbers that are missing are asked for at the engine's replay endpoint,
where the settings name one: at first all that it still has, since an engine may be warm before the gateway starts.
Numbers that go back are an engine that has restarted. So are numbers behind a gap where the last batch before it, asked
for again, is another one than it was.

Events help placement and no request waits for them, so they get a share of the event loop's time (`Turns`), whatever
the engines send; what is not read then waits in ZeroMQ's buffers, and at last with the engine, which drops it.

pyzmq is an extra of the package; it is imported where a group's settings want events, and nowhere else.
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
"""Bytes of a part. A step of 64 k tokens has some 400 kB; libzmq cuts off a peer that sends more."""
_WAITING = 200  # messages that libzmq keeps of each engine, of 40 kB as a rule; the engine keeps 100,000 more
_SHARE = 0.25  # of the event loop's time, for the events of all engines
_TURN = 0.001  # seconds for which events are handled at a time
_CONNECTING = 10.0  # seconds without a connection after which another socket is tried
_ASKS = 16  # times in a row that one gap is asked about: a publisher drops answers when they are many
_MOST_ANSWERS = 200_000  # batches in one answer; vLLM keeps 10,000
_SILENCE = 5.0  # seconds without a part of the answer: nobody answers
_PAUSE = 1.0  # seconds without a further part: it is not going to come
_CALM = 30.0  # seconds until a publisher is asked again that has not answered, and between two like words about it


class Cache(Protocol):
    """What one publisher's batches are told to."""

    def apply(self, payload: bytes) -> Iterator[None]:
        """Take a batch, step by step, so that others can have their turn between two."""

    def clear(self) -> None:
        """Its engine has restarted: it has nothing cached."""


class Turns:
    """Who handles events takes turns, and all of them together get a share of the event loop's time."""

    def __init__(self, share: float = _SHARE) -> None:
        self._rest = 1 / share - 1
        self._lock = asyncio.Lock()
        self._owed = 0.0

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[float]:
        """Wait for a turn; gives the time at which it should end."""
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
        """Go through something step by step, in as many turns as it takes."""
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
        name: of the engine, for people.
        events, replay: its endpoints, as ZeroMQ has them; the second may be empty.
        counts: by what became of batches, shared by all followers.
    Attributes:
        connected: whether it is heard now, or would be.
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
        self._mark = 0  # what that one was
        self._live: int | None = None  # number of the last batch that was published, not replayed
        self._same = False  # the last batch that was taken was found again
        self._unasked = False  # what it had published when it connected is still to be asked for
        self._busy = asyncio.Lock()
        self._calm_until: dict[str, float] = {}
        self.connected = False

    @property
    def settled(self) -> bool:
        """Whether its cache is what the publisher has said last: it is connected, and was asked for what was missed."""
        return self.connected and not self._busy.locked()

    async def run(self) -> None:
        """Follow it until cancelled."""
        while True:
            await self._subscribe()

    async def _subscribe(self) -> None:
        """Follow it by one socket. ZeroMQ connects that again by itself, but not to a peer that has broken the
        protocol, as by a message that is too long: it ends when it has not been connected for a while."""
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
        """Hear what is published, until it has not been connected for a while."""
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
        """The next message. A message that is there already is read at once, without giving way to anybody, and that
        takes longer than what most messages say: so it is done in a turn too.

        Raises:
            TimeoutError: none came within `seconds`.
        """
        async with self._turns.turn():
            coming: asyncio.Future[list[bytes]] = socket.recv_multipart()
        async with asyncio.timeout(seconds):
            return await coming

    async def _watch(self, monitor: Any) -> None:
        """Say when the publisher is there, and when not."""
        connected = self._zmq.EVENT_HANDSHAKE_SUCCEEDED.to_bytes(2, "little")
        while True:
            event, _ = await monitor.recv_multipart()
            self.connected = event[:2] == connected
            if self.connected:
                self._tell(logging.INFO, "connected", "the KV events of %s are heard at %s", self._name, self._events)
                self._calm_until.pop("unanswered", None)  # it may be another process, which answers
                self._unasked = True
                async with self._busy:
                    await self._look_back()
            else:
                self._tell(logging.WARNING, "cut", "the KV events of %s at %s are cut off", self._name, self._events)

    async def _hear(self, parts: list[bytes]) -> None:
        """A message was published."""
        if len(parts) != 3 or len(parts[1]) != 8:
            self._garbage("it has not the three parts that a batch has")
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
        """Its numbers are another process's."""
        self._forget_all()
        if self._replay and self._is_calm("unanswered"):
            await self._catch_up()

    async def _fill(self, number: int) -> None:
        """Batches before this one are missing."""
        if self._replay and self._is_calm("unanswered"):
            await self._catch_up()
        if self._last is not None and number > self._last + 1:
            self._counts["lost"] += number - self._last - 1
            why = "the publisher does not have them any more" if self._replay else "no replay endpoint is set"
            self._tell(
                logging.WARNING,
                "lost",
                "KV events of %s are lost (%d batches; %s): what is believed of its cache may be wrong for a while",
                self._name,
                number - self._last - 1,
                why,
            )

    async def _take(self, number: int, payload: bytes) -> None:
        """Tell the cache, in as many turns as it takes."""
        steps = self._cache.apply(payload)
        try:
            await self._turns.take(steps)
        finally:  # one that cannot be taken is not asked for again
            self._last, self._mark = number, hash(payload)
            self._counts["batch"] += 1

    # Replay

    async def _look_back(self) -> None:
        """It is connected: take what it has published before."""
        if not self._replay or not self._is_calm("unanswered"):
            return
        before, taken = self._last, self._counts["replayed"]
        self._same = self._unasked = False
        await self._catch_up()
        nothing = self._last == before and self._counts["replayed"] == taken and not self._same
        if before is not None and nothing and self._is_calm("unanswered"):
            # Not even the last batch that was taken: it has published fewer since it started.
            self._forget_all()
            await self._catch_up()

    async def _catch_up(self) -> None:
        """Ask for what has been published since the last batch that was taken, and take it."""
        for _ in range(_ASKS):
            before = self._last
            if await self._ask() or self._last == before:
                return

    async def _ask(self) -> bool:
        """Ask once; returns whether there is no more to be had. An answer may lack any part, its end included: a
        publisher drops what it cannot send at once. So only one with nothing new is the last."""
        zmq = self._zmq
        first = self._last or 0  # that one too, to see whether it is the same
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
                    self._unanswered("the answer is none")
                    return True
                number, payload = int.from_bytes(parts[-2], "big", signed=True), parts[-1]
                if number < 0:
                    return not taken
                if self._last is None or number == self._last + 1 or (number > self._last and not taken):
                    if self._last is not None and number > self._last + 1:
                        self._counts["lost"] += number - self._last - 1  # they are not kept any more
                    await self._take(number, payload)
                    self._counts["replayed"] += 1
                    taken = True
                elif number > self._last:
                    return False  # some of the answer is lost: ask for it again
                elif number == self._last and not taken:
                    self._same = hash(payload) == self._mark
                    if not self._same:
                        self._forget_all()
                        return False
        self._unanswered("the answer does not end")
        return True

    def _forget_all(self) -> None:
        """This is another process than the one whose last batch was taken."""
        self._counts["restart"] += 1
        self._tell(logging.INFO, "restart", "%s has restarted, by its KV events: nothing is cached there", self._name)
        self._cache.clear()
        self._last = self._live = None

    # Words

    def _unanswered(self, why: str) -> None:
        self._counts["unanswered"] += 1
        self._unasked = True
        self._tell(
            logging.WARNING,
            "unanswered",
            "KV events of %s cannot be asked for at %s: %s",
            self._name,
            self._replay,
            why,
        )
        self._calm_until["unanswered"] = self._clock() + _CALM

    def _garbage(self, why: str) -> None:
        self._counts["garbage"] += 1
        self._tell(logging.WARNING, "garbage", "%s publishes what is no batch of KV events: %s", self._name, why)

    def _is_calm(self, what: str) -> bool:
        return self._clock() >= self._calm_until.get(what, 0.0)

    def _tell(self, level: int, what: str, text: str, *args: object) -> None:
        """Say something that an engine could make us say, again and again."""
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
