"""Following one publisher over real sockets: gaps, restarts, floods and messages that are not valid."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import zmq
import zmq.asyncio
from pd_proxy.fleet.zmq import kv_follower
from pd_proxy.fleet.zmq.kv_follower import Follower, Turns
from pd_proxy_simulator.kv_events import END, Publisher

from tests.support import until


class Notes:
    """A cache that keeps the batches that it gets."""

    def __init__(self) -> None:
        self.told: list[bytes] = []
        self.clears = 0
        self.steps = 1

    def apply(self, payload: bytes) -> Iterator[None]:
        for _ in range(self.steps):
            yield
        self.told.append(payload)

    def clear(self) -> None:
        self.clears += 1
        self.told.clear()


class Bed:
    def __init__(self, publisher: Publisher) -> None:
        self.publisher = publisher
        self.notes = Notes()
        self.counts: Counter[str] = Counter()
        self.follower: Follower
        self._subscriptions = 0

    def publish(self, *numbers: int) -> None:
        for number in numbers:
            self.publisher.publish(b"%d" % number)

    async def told(self, *numbers: int) -> None:
        await until(lambda: self.notes.told == [b"%d" % number for number in numbers])

    async def restart(self) -> None:
        """Replace the engine by a new one at the same ports."""
        old = self.publisher
        old.close()
        self.publisher = Publisher("127.0.0.1", old.port, old.replay_port)
        self._subscriptions = 0

    async def heard(self) -> None:
        """Wait until the follower has connected again, and requested what was published before."""
        await until(
            lambda: (
                self.follower.connected
                and self.publisher.subscriptions > self._subscriptions
                and not self.follower._busy.locked()
            )
        )
        self._subscriptions = self.publisher.subscriptions


@asynccontextmanager
async def bed(
    *, replay: bool = True, start: bool = True, topic: str = "", heard_topic: str = "", **more: Any
) -> AsyncIterator[Bed]:
    publisher = Publisher("127.0.0.1", 0, 0, topic=topic, **more)
    made = Bed(publisher)
    context = zmq.asyncio.Context()
    where = f"tcp://127.0.0.1:{publisher.port}"
    asked = f"tcp://127.0.0.1:{publisher.replay_port}" if replay else ""
    made.follower = Follower(context, "http://a:1", where, asked, heard_topic, made.notes, Turns(), made.counts)
    task: asyncio.Task[None] | None = None
    try:
        if start:
            task = asyncio.create_task(made.follower.run())
            await made.heard()
        yield made
    finally:
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        context.destroy(linger=0)
        made.publisher.close()


async def test_batches_are_applied_in_their_order() -> None:
    async with bed() as it:
        it.publish(*range(50))
        await it.told(*range(50))
        assert it.counts["batch"] == 50


async def test_what_was_published_before_is_requested() -> None:
    async with bed(start=False) as it:
        it.publish(0, 1, 2)
        task = asyncio.create_task(it.follower.run())
        await it.told(0, 1, 2)
        await it.heard()
        it.publish(3)
        await it.told(0, 1, 2, 3)
        assert it.counts == {"batch": 4, "replayed": 3}
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_without_a_replay_endpoint_the_first_batch_is_the_first_that_comes() -> None:
    async with bed(start=False, replay=False) as it:
        it.publish(0, 1, 2)
        task = asyncio.create_task(it.follower.run())
        await it.heard()
        it.publish(3)
        await it.told(3)
        assert it.counts == {"batch": 1}
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_gap_is_filled() -> None:
    async with bed() as it:
        it.publish(0, 1)
        await it.told(0, 1)
        it.publisher.lose = 3
        it.publish(2, 3, 4, 5)
        await it.told(0, 1, 2, 3, 4, 5)
        it.publish(6)
        await it.told(0, 1, 2, 3, 4, 5, 6)
        assert it.counts["gap"] == 1
        assert it.counts["lost"] == 0
        assert it.counts["restart"] == 0


async def test_a_gap_that_cannot_be_filled_is_counted_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    async with bed(replay=False) as it:
        it.publish(0)
        for number in (1, 4, 7):
            it.publisher.lose = 2
            it.publish(number, number + 1, number + 2)
        await it.told(0, 3, 6, 9)
        assert it.counts == {"batch": 4, "gap": 3, "lost": 6}
        assert [r.levelno for r in caplog.records if "are lost" in r.message] == [logging.WARNING]


async def test_batches_that_the_publisher_has_dropped_are_lost() -> None:
    async with bed(buffer=2) as it:
        it.publish(0)
        await it.told(0)
        it.publisher.lose = 5
        it.publish(1, 2, 3, 4, 5, 6)
        await it.told(0, 5, 6)
        assert it.counts["lost"] == 4


async def test_a_lower_number_is_a_restart() -> None:
    async with bed() as it:
        it.publish(0, 1, 2)
        await it.told(0, 1, 2)
        await it.restart()
        await until(lambda: not it.follower.connected)
        it.publish(0)  # before the follower has connected again: only the replay has it
        await it.heard()
        it.publish(1)
        await it.told(0, 1)
        assert it.notes.clears == 1
        assert it.counts["restart"] == 1


async def test_a_restart_that_has_published_more_than_before_is_seen_by_its_last_batch() -> None:
    async with bed() as it:
        it.publish(0, 1)
        await it.told(0, 1)
        await it.restart()
        await until(lambda: not it.follower.connected)
        it.publish(10, 11, 12, 13)
        await it.heard()
        it.publish(14)
        await it.told(10, 11, 12, 13, 14)
        assert it.notes.clears == 1
        it.publish(15)
        await it.told(10, 11, 12, 13, 14, 15)


async def test_a_connection_that_ends_is_not_a_restart() -> None:
    async with bed() as it:
        it.publish(0, 1)
        await it.told(0, 1)
        old = it.publisher
        await it.restart()
        await until(lambda: not it.follower.connected)
        it.publisher.sequence = 2
        it.publisher._buffer.extend(old._buffer)
        await it.heard()
        it.publish(2)
        await it.told(0, 1, 2)
        assert it.notes.clears == 0


async def test_only_its_topic_is_followed() -> None:
    async with bed(topic="kv", heard_topic="kv") as it:
        it.publish(0)
        await it.told(0)
    async with bed(topic="others", heard_topic="kv", replay=False) as it:
        it.publish(0)
        it.publisher._topic = b"kv"
        it.publish(1)
        await it.told(1)


@pytest.mark.parametrize("parts", [[b"only one"], [b"", b"short", b"x"], [b"", b"\0" * 8, b"x", b"y"], [b""] * 40])
async def test_a_message_that_is_not_a_batch_is_counted_and_logged_once(
    parts: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    async with bed() as it:
        for _ in range(5):
            it.publisher.send(*parts)
        it.publish(0)
        await it.told(0)
        assert it.counts == {"batch": 1, "garbage": 5}
        assert len([r for r in caplog.records if "not a batch" in r.message]) == 1


async def test_a_message_that_is_too_long_ends_the_connection_and_the_next_is_received(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kv_follower, "_CONNECTING", 0.5)
    async with bed() as it:
        it.publish(0)
        await it.told(0)
        it.publisher.send(b"", (1).to_bytes(8, "big"), bytes(kv_follower._LONGEST + 1))
        it.publisher.sequence = 2
        await it.heard()
        it.publish(2)
        await it.told(0, 2)


@pytest.mark.parametrize(
    "answers",
    [
        [],
        [[b"", b"", b"short", b""]],
        [[b"x"]],
        [[b"", b""] * 10],
    ],
    ids=["silence", "a short number", "one part", "many parts"],
)
async def test_a_replay_that_is_not_valid_is_given_up(
    answers: list[list[bytes]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kv_follower, "_SILENCE", 0.05)
    async with bed(start=False) as it:

        def answer() -> None:
            while True:
                try:
                    who, *_ = it.publisher._router.recv_multipart(zmq.NOBLOCK)
                except zmq.Again:
                    return
                for parts in answers:
                    it.publisher._router.send_multipart([who, *parts])

        loop = asyncio.get_running_loop()
        file = it.publisher._router.getsockopt(zmq.FD)
        loop.remove_reader(file)
        loop.add_reader(file, answer)
        answer()
        task = asyncio.create_task(it.follower.run())
        await until(lambda: it.counts["unanswered"] == 1)
        await it.heard()
        it.publish(0)
        await it.told(0)
        it.publisher.lose = 1
        it.publish(1, 2)
        await it.told(0, 2)  # the publisher is not asked again so soon
        assert it.counts["unanswered"] == 1
        assert len([r for r in caplog.records if "cannot be requested" in r.message]) == 1
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize("all_the_rest", [False, True], ids=["some", "all the rest"])
async def test_answers_that_were_lost_are_requested_again(all_the_rest: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A publisher's socket drops answers that it cannot send at once, also the last one."""
    monkeypatch.setattr(kv_follower, "_PAUSE", 0.05)
    async with bed(start=False) as it:
        it.publish(*range(100))
        sent = it.publisher._router.send_multipart
        dropped = 0

        class Leaky:
            def __getattr__(self, name: str) -> Any:
                return getattr(router, name)

            def send_multipart(self, parts: Any, flags: int = 0) -> None:
                nonlocal dropped
                most = 51 if all_the_rest else 30
                if dropped < most and (parts[3] == END if dropped == 50 else parts[3] >= (50).to_bytes(8, "big")):
                    dropped += 1
                    return
                sent(parts, flags)

        router, it.publisher._router = it.publisher._router, Leaky()
        task = asyncio.create_task(it.follower.run())
        await it.told(*range(100))
        assert it.counts["lost"] == 0
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_older_engines_answer_without_a_topic() -> None:
    async with bed(start=False) as it:
        it.publish(0, 1)
        sent = it.publisher._router.send_multipart
        router = it.publisher._router

        class Older:
            def __getattr__(self, name: str) -> Any:
                return getattr(router, name)

            def send_multipart(self, parts: Any, flags: int = 0) -> None:
                sent([parts[0], parts[1], *parts[3:]], flags)

        it.publisher._router = Older()
        task = asyncio.create_task(it.follower.run())
        await it.told(0, 1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_flood_leaves_time_for_the_rest_of_the_event_loop() -> None:
    """Long work is done in turns, other tasks run in between, and all of it is done in the end."""
    async with bed() as it:
        it.notes.steps = 2000
        it.publish(*range(30))
        latest, worst = asyncio.get_running_loop().time(), 0.0
        while len(it.notes.told) < 30:
            await asyncio.sleep(0)
            now = asyncio.get_running_loop().time()
            latest, worst = now, max(worst, now - latest)
        assert it.notes.told == [b"%d" % number for number in range(30)]
        assert worst < 1  # a turn is a millisecond, but the machine may be busy


async def test_turns_take_only_their_share_of_the_event_loop() -> None:
    turns = Turns(0.25)
    loop = asyncio.get_running_loop()
    async with turns.turn() as end:
        assert end > loop.time() - 1
        began = loop.time()
        while loop.time() - began < 0.01:
            pass
    before = loop.time()
    async with turns.turn():
        assert loop.time() - before >= 0.028


class Flooded:
    """A socket on which a number of messages is ready at once."""

    def __init__(self, parts: list[bytes], count: int) -> None:
        self.left = count
        self._parts = parts

    def recv_multipart(self) -> asyncio.Future[list[bytes]]:
        coming = asyncio.get_running_loop().create_future()
        self.left -= 1
        if self.left >= 0:
            coming.set_result(self._parts)
        return coming


@pytest.mark.parametrize("parts", [[b"nonsense"], [b"", bytes(8), b"again"]], ids=["garbage", "restarts"])
async def test_messages_that_are_there_already_leave_time_for_the_rest_of_the_event_loop(parts: list[bytes]) -> None:
    async with bed(start=False) as it:
        flooded = Flooded(parts, 30_000)
        it.follower._replay = ""
        task = asyncio.create_task(it.follower._listen(flooded))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert 0 < flooded.left < 30_000
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
