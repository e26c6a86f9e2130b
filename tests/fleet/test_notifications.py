"""Transfer notifications: which waits they end, and that hostile senders do no harm."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import msgspec
import pytest
from pd_proxy.errors import BackendLost
from pd_proxy.fleet.zmq import listener as inbox
from pd_proxy.fleet.zmq.listener import CannotListen, ZmqListener
from pd_proxy.fleet.zmq.notifications import TransferNotifications

from tests.fleet.zmq_peers import address, sender
from tests.support import until

encode = msgspec.msgpack.encode


def notification(name: object = "r1", **more: object) -> bytes:
    return encode({"type": "ProxyNotif", "req_id": name, **more})


@contextmanager
def listening() -> Iterator[tuple[TransferNotifications, str]]:
    with address() as where:
        notifications = TransferNotifications(where)
        notifications.start()
        try:
            yield notifications, where
        finally:
            notifications.close()


async def test_all_notifications_of_a_try_are_waited_for_whenever_they_come() -> None:
    notifications = TransferNotifications("")
    with notifications.expect("r1", 3) as expected:
        notifications.listen([notification()])
        waiting = asyncio.create_task(expected.all(5))
        await asyncio.sleep(0)
        notifications.listen([notification()])
        notifications.listen([notification("r2")])
        await asyncio.sleep(0)
        assert not waiting.done()
        notifications.listen([notification()])
        assert await waiting
        notifications.listen([notification()])  # one more than expected
    assert notifications.counts == {"taken": 4, "unexpected": 1}


async def test_notifications_that_have_all_come_are_not_waited_for() -> None:
    notifications = TransferNotifications("")
    with notifications.expect("r1", 1) as expected:
        notifications.listen([notification()])
        assert await expected.all(0.0001)


async def test_a_wait_is_bounded_in_time() -> None:
    notifications = TransferNotifications("")
    with notifications.expect("r1", 2) as expected:
        notifications.listen([notification()])
        assert not await expected.all(0.01)
        assert expected.missing == 1
    notifications.listen([notification()])
    assert notifications.waiting == {}
    assert notifications.counts["unexpected"] == 1


async def test_a_wait_fails_when_the_sender_fails() -> None:
    with TransferNotifications("").expect("r1", 1) as expected:
        waiting = asyncio.create_task(expected.all(60))
        await asyncio.sleep(0)
        expected.lost(BackendLost("gone"))
        expected.lost(BackendLost("gone twice"))
        with pytest.raises(BackendLost, match=r"gone$"):
            await waiting


async def test_a_try_that_stops_waiting_leaves_nothing() -> None:
    notifications = TransferNotifications("")

    async def wait() -> None:
        with notifications.expect("r1", 1) as expected:
            await expected.all(60)

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert notifications.waiting == {}


GARBAGE: dict[str, list[bytes]] = {
    "no part": [],
    "two parts": [notification(), notification()],
    "nothing": [b""],
    "no msgpack": [b"\xc1\xff"],
    "JSON": [b'{"type":"ProxyNotif","req_id":"r1"}'],
    "an array": [encode(["ProxyNotif", "r1"])],
    "no type": [encode({"req_id": "r1"})],
    "another type": [encode({"type": "CancelNotif", "req_id": "r1", "keys": []})],
    "no name": [encode({"type": "ProxyNotif"})],
    "an empty name": [notification("")],
    "a long name": [notification("r" * 129)],
    "a number": [notification(7)],
    "bytes": [notification(b"r1")],
    "null": [notification(None)],
    "no UTF-8": [b"\x82\xa4type\xaaProxyNotif\xa6req_id\xa2\xff\xfe"],
    "nested": [b"\x91" * 900 + b"\x90"],
    "more behind it": [notification() + b"\x00"],
}


@pytest.mark.parametrize("parts", GARBAGE.values(), ids=list(GARBAGE))
async def test_a_message_that_is_not_a_notification_is_counted_and_ignored(parts: list[bytes]) -> None:
    notifications = TransferNotifications("")
    with notifications.expect("r1", 1) as expected:
        notifications.listen(parts)
        assert expected.missing == 1
    assert notifications.counts == {"garbage": 1}


async def test_notifications_come_over_zeromq() -> None:
    with listening() as (notifications, where), sender(where) as out, notifications.expect("r1", 2) as expected:
        out.send(notification())
        out.send(notification(from_rank=1))
        assert await expected.all(5)


async def test_a_message_of_any_size_or_shape_does_no_harm() -> None:
    with listening() as (notifications, where), notifications.expect("r1", 1) as expected:
        with sender(where) as hostile:
            hostile.send(b"x" * 100_000_000)  # it is disconnected for the length, reconnects, and is disconnected again
            hostile.send_multipart([b"x"] * 5000)
        with sender(where) as hostile:
            hostile.send_multipart([b"x"] * 5000)
            hostile.send_multipart([notification(), b""])
            await until(lambda: notifications.counts["garbage"] >= 2)
        with socket.create_connection(tuple(where.split(":"))) as plain:  # type: ignore[arg-type]
            plain.sendall(b"POST / HTTP/1.1\r\n\r\n" * 100)
        with sender(where) as out:
            out.send(notification())
            assert await expected.all(5)


async def test_a_flood_leaves_the_event_loop_its_turns() -> None:
    with listening() as (notifications, where), sender(where) as out:
        turns, seen = 0, []
        for _ in range(20_000):
            out.send(notification("nobody"))
        while notifications.counts["unexpected"] < 20_000:
            before = notifications.counts["unexpected"]
            await asyncio.sleep(0)
            turns += 1
            seen.append(notifications.counts["unexpected"] - before)
        assert max(seen) <= 2 * inbox._AT_ONCE
        assert notifications.waiting == {}


async def test_an_address_that_is_in_use_raises_at_once() -> None:
    with listening() as (_, where), pytest.raises(CannotListen, match=f"cannot listen for engines on {where}: "):
        TransferNotifications(where).start()


async def test_listening_twice_is_listening_once() -> None:
    with listening() as (notifications, _):
        notifications.start()
        notifications.close()
        notifications.close()
        notifications.start()


async def test_without_pyzmq_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "zmq", None)
    with pytest.raises(CannotListen, match=r"pip install pd-proxy\[zmq\]"):
        ZmqListener("PULL", "127.0.0.1:1", lambda parts: None)


async def test_a_message_that_cannot_be_handled_does_not_delay_the_next() -> None:
    heard = []

    def listen(parts: Sequence[bytes]) -> None:
        heard.append(bytes(parts[0]))
        if len(heard) == 1:
            raise KeyError("a fault of the gateway's own")

    with address() as where:
        messages = ZmqListener("PULL", where, listen)
        try:
            with sender(where) as socket_:
                for text in (b"one", b"two", b"three"):
                    socket_.send(text)
                await until(lambda: len(heard) == 3)
        finally:
            messages.close()
    assert heard == [b"one", b"two", b"three"]
