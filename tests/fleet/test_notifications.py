"""Notices: who is told, and what a hostile sender can do (nothing)."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest
import zmq
from pd_proxy.errors import BackendLost
from pd_proxy.fleet.zmq import listener as inbox
from pd_proxy.fleet.zmq.listener import CannotListen, ZmqListener
from pd_proxy.fleet.zmq.notifications import TransferNotifications

from tests.support import until

encode = msgspec.msgpack.encode


def notice(name: object = "r1", **more: object) -> bytes:
    return encode({"type": "ProxyNotif", "req_id": name, **more})


@contextmanager
def address() -> Iterator[str]:
    """A free address, reserved for who binds it."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{held.getsockname()[1]}"


@contextmanager
def sender(where: str, kind: int = zmq.PUSH) -> Iterator[Any]:
    context = zmq.Context()
    try:
        out = context.socket(kind)
        out.setsockopt(zmq.LINGER, 0)
        out.setsockopt(zmq.SNDHWM, 100_000)
        out.connect(f"tcp://{where}")
        yield out
    finally:
        context.destroy(linger=0)


@contextmanager
def listening() -> Iterator[tuple[TransferNotifications, str]]:
    with address() as where:
        notices = TransferNotifications(where)
        notices.start()
        try:
            yield notices, where
        finally:
            notices.close()


async def test_all_notices_of_a_name_must_come_whenever_they_do() -> None:
    notices = TransferNotifications("")
    with notices.expect("r1", 3) as expected:
        notices.listen([notice()])
        waiting = asyncio.create_task(expected.all(5))
        await asyncio.sleep(0)
        notices.listen([notice()])
        notices.listen([notice("r2")])
        await asyncio.sleep(0)
        assert not waiting.done()
        notices.listen([notice()])
        assert await waiting
        notices.listen([notice()])  # one too many does no harm
    assert notices.counts == {"taken": 4, "unexpected": 1}


async def test_notices_that_are_all_there_need_no_waiting() -> None:
    notices = TransferNotifications("")
    with notices.expect("r1", 1) as expected:
        notices.listen([notice()])
        assert await expected.all(0.0001)


async def test_nobody_waits_for_longer_than_he_wants() -> None:
    notices = TransferNotifications("")
    with notices.expect("r1", 2) as expected:
        notices.listen([notice()])
        assert not await expected.all(0.01)
        assert expected.missing == 1
    notices.listen([notice()])
    assert notices.waiting == {}
    assert notices.counts["unexpected"] == 1


async def test_a_sender_that_has_gone_is_not_waited_for() -> None:
    with TransferNotifications("").expect("r1", 1) as expected:
        waiting = asyncio.create_task(expected.all(60))
        await asyncio.sleep(0)
        expected.lost(BackendLost("gone"))
        expected.lost(BackendLost("gone twice"))
        with pytest.raises(BackendLost, match=r"gone$"):
            await waiting


async def test_whoever_stops_waiting_leaves_nothing() -> None:
    notices = TransferNotifications("")

    async def wait() -> None:
        with notices.expect("r1", 1) as expected:
            await expected.all(60)

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert notices.waiting == {}


GARBAGE: dict[str, list[bytes]] = {
    "no part": [],
    "two parts": [notice(), notice()],
    "nothing": [b""],
    "no msgpack": [b"\xc1\xff"],
    "JSON": [b'{"type":"ProxyNotif","req_id":"r1"}'],
    "an array": [encode(["ProxyNotif", "r1"])],
    "no type": [encode({"req_id": "r1"})],
    "another type": [encode({"type": "CancelNotif", "req_id": "r1", "keys": []})],
    "no name": [encode({"type": "ProxyNotif"})],
    "an empty name": [notice("")],
    "a long name": [notice("r" * 129)],
    "a number": [notice(7)],
    "bytes": [notice(b"r1")],
    "null": [notice(None)],
    "no UTF-8": [b"\x82\xa4type\xaaProxyNotif\xa6req_id\xa2\xff\xfe"],
    "nested": [b"\x91" * 900 + b"\x90"],
    "more behind it": [notice() + b"\x00"],
}


@pytest.mark.parametrize("parts", GARBAGE.values(), ids=list(GARBAGE))
async def test_what_is_no_notice_is_counted_and_forgotten(parts: list[bytes]) -> None:
    notices = TransferNotifications("")
    with notices.expect("r1", 1) as expected:
        notices.listen(parts)
        assert expected.missing == 1
    assert notices.counts == {"garbage": 1}


async def test_notices_come_over_zeromq() -> None:
    with listening() as (notices, where), sender(where) as out, notices.expect("r1", 2) as expected:
        out.send(notice())
        out.send(notice(from_rank=1))
        assert await expected.all(5)


async def test_a_message_of_any_size_or_shape_harms_nobody() -> None:
    with listening() as (notices, where), notices.expect("r1", 1) as expected:
        with sender(where) as hostile:
            hostile.send(b"x" * 100_000_000)  # its connection is cut at the length; it comes back, and is cut again
            hostile.send_multipart([b"x"] * 5000)
        with sender(where) as hostile:
            hostile.send_multipart([b"x"] * 5000)
            hostile.send_multipart([notice(), b""])
            await until(lambda: notices.counts["garbage"] >= 2)
        with socket.create_connection(tuple(where.split(":"))) as plain:  # type: ignore[arg-type]
            plain.sendall(b"POST / HTTP/1.1\r\n\r\n" * 100)
        with sender(where) as out:
            out.send(notice())
            assert await expected.all(5)


async def test_a_flood_leaves_the_loop_its_turns() -> None:
    with listening() as (notices, where), sender(where) as out:
        turns, seen = 0, []
        for _ in range(20_000):
            out.send(notice("nobody"))
        while notices.counts["unexpected"] < 20_000:
            before = notices.counts["unexpected"]
            await asyncio.sleep(0)
            turns += 1
            seen.append(notices.counts["unexpected"] - before)
        assert max(seen) <= 2 * inbox._AT_ONCE
        assert notices.waiting == {}


async def test_an_address_that_is_taken_is_said_at_once() -> None:
    with listening() as (_, where), pytest.raises(CannotListen, match=f"cannot listen for engines on {where}: "):
        TransferNotifications(where).start()


async def test_listening_twice_is_listening_once() -> None:
    with listening() as (notices, _):
        notices.start()
        notices.close()
        notices.close()
        notices.start()


async def test_without_pyzmq_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "zmq", None)
    with pytest.raises(CannotListen, match=r"pip install pd-proxy\[zmq\]"):
        ZmqListener("PULL", "127.0.0.1:1", lambda parts: None)


async def test_a_message_that_nobody_can_take_holds_up_none_behind_it() -> None:
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
