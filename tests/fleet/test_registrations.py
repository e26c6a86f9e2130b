"""Registrations: what they may change, of which backends, for how long; and that hostile senders do no harm."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st
from pd_proxy.fleet.backend import Backend
from pd_proxy.fleet.fleet import Fleet
from pd_proxy.fleet.zmq import registrations as registration
from pd_proxy.fleet.zmq.registrations import Registrations
from pd_proxy.handoff.connectors.registry import CONNECTORS
from pd_proxy.handoff.coordinates import Coordinates
from pd_proxy.settings.tree import build_settings

from tests.fleet.zmq_peers import address, sender
from tests.support import until

P, D = "http://10.0.0.1:8000", "http://10.0.0.2:8000"


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Table:
    """The registrations of a fleet with one prefill and one decode backend."""

    def __init__(self, connector: str = "moriio_write", where: str = "127.0.0.1:1", **settings: Any) -> None:
        zmq_settings = {"registrations": where, **settings.pop("zmq", {})}
        flags = {"prefill": [P], "decode": [D], "connector": connector, "zmq": zmq_settings, **settings}
        made = build_settings(flags, {})
        self.clock = Clock()
        self.fleet = Fleet(made, clock=self.clock)
        self.registrations = Registrations(self.fleet, made.zmq, CONNECTORS, clock=self.clock)
        self.counts = self.registrations.counts

    def listen(self, **said: Any) -> None:
        self.registrations.listen([registered(**said)])

    @property
    def prefill(self) -> Backend:
        return self.fleet.pool("prefill")[0]

    @property
    def decode(self) -> Backend:
        return self.fleet.pool("decode")[0]

    def urls(self) -> list[str]:
        return [backend.url for backend in self.fleet]


def registered(**said: Any) -> bytes:
    """A registration of the prefill engine in write mode, with other members as given; None removes a member."""
    members: dict[str, Any] = {
        "type": "P",
        "http_address": "10.0.0.1:8000",
        "zmq_address": "host:10.0.0.1,handshake:6301,notify:61005",
        "dp_size": 2,
        "tp_size": 4,
        "transfer_mode": "WRITE",
        **said,
    }
    return msgspec.msgpack.encode({name: value for name, value in members.items() if value is not None})


async def test_a_registration_sets_a_backends_coordinates() -> None:
    table = Table()
    assert not table.prefill.registered
    table.listen()
    assert table.prefill.registered
    assert not table.decode.registered
    assert table.prefill.coordinates == Coordinates(host="10.0.0.1", port=6301, notify_port=61005, tp=4, dp=2)
    assert table.prefill.ranks == [0, 0]
    table.listen()
    assert table.counts == {"taken": 2}


async def test_an_engine_that_has_restarted_registers_its_new_ports() -> None:
    table = Table()
    table.listen()
    table.listen(zmq_address="host:10.0.0.1,handshake:6400,notify:6500")
    assert (table.prefill.coordinates.port, table.prefill.coordinates.notify_port) == (6400, 6500)


async def test_the_time_in_which_the_event_loop_stood_still_is_not_silence_of_an_engine() -> None:
    table = Table()
    table.listen()
    table.fleet.bring_in(table.prefill)
    loop = asyncio.get_running_loop()
    table.registrations._sweeping = loop.call_at(loop.time() - 60.0, int)  # it should have run a minute ago
    table.clock.now += 61.0
    table.registrations._sweep()
    assert table.prefill.up
    table.clock.now += 9.9
    table.registrations._sweep()
    assert not table.prefill.up


async def test_an_engine_that_falls_silent_is_taken_out_and_comes_back() -> None:
    table = Table()
    table.listen()
    table.fleet.bring_in(table.prefill)
    table.clock.now += 9.9
    table.registrations._sweep()
    assert table.prefill.up
    table.listen()
    table.clock.now += 9.9
    table.registrations._sweep()
    assert table.prefill.up, "each registration counts anew"
    table.clock.now += 0.2
    table.registrations._sweep()
    assert not table.prefill.up
    assert not table.prefill.registered
    assert table.prefill.reason == "has not registered for 10 s"
    assert table.urls() == [P, D], "what people have set stays in the fleet"
    table.listen()
    assert table.prefill.registered
    table.registrations.close()


REFUSED: dict[str, dict[str, Any]] = {
    "the other mode": {"transfer_mode": "READ"},
    "no mode": {"transfer_mode": None},
    "an unknown mode": {"transfer_mode": "HELLO"},
    "another role": {"type": "D"},
    "no role": {"type": None},
    "an unknown role": {"type": "HELLO"},
    "KV elsewhere": {"zmq_address": "host:10.6.6.6,handshake:6301,notify:61005"},
    "KV at the other backend": {"zmq_address": "host:10.0.0.2,handshake:6301,notify:61005"},
    "no notify": {"zmq_address": "host:10.0.0.1,handshake:6301"},
    "a fourth part": {"zmq_address": "host:10.0.0.1,handshake:6301,notify:61005,x:1"},
    "host twice": {"zmq_address": "host:10.6.6.6,host:10.0.0.1,handshake:6301,notify:61005"},
    "a header in the host": {"zmq_address": "host:10.0.0.1\r\nx: y,handshake:6301,notify:61005"},
    "a port of zero": {"zmq_address": "host:10.0.0.1,handshake:0,notify:61005"},
    "a port too high": {"zmq_address": "host:10.0.0.1,handshake:6301,notify:65536"},
    "a negative port": {"zmq_address": "host:10.0.0.1,handshake:-1,notify:61005"},
    "a port in Arabic": {"zmq_address": "host:10.0.0.1,handshake:٦٣٠١,notify:61005"},
    "no zmq_address": {"zmq_address": None},
    "no ranks": {"tp_size": 0},
    "ranks without end": {"dp_size": 10**9},
    "ranks as words": {"dp_size": "2"},
    "ranks true": {"tp_size": True},
}


@pytest.mark.parametrize("said", REFUSED.values(), ids=list(REFUSED))
async def test_a_registration_that_is_not_allowed_is_refused(said: dict[str, Any]) -> None:
    table = Table()
    table.listen(**said)
    assert table.counts == {"refused": 1}
    assert not table.prefill.registered
    assert table.prefill.coordinates == Coordinates(host="10.0.0.1")
    assert table.urls() == [P, D]


async def test_a_bad_registration_does_not_undo_a_good_one() -> None:
    table = Table()
    table.listen()
    before = table.prefill.coordinates
    for said in REFUSED.values():
        table.listen(**said)
    assert table.prefill.registered
    assert table.prefill.coordinates is before


GARBAGE: dict[str, list[bytes]] = {
    "no part": [],
    "two parts": [registered(), registered()],
    "an empty frame before it": [b"", registered()],
    "nothing": [b""],
    "no msgpack": [b"\xc1"],
    "HELLO": [b"HELLO"],
    "an array": [msgspec.msgpack.encode(["P", "10.0.0.1:8000"])],
    "no address": [registered(http_address=None)],
    "an address without port": [registered(http_address="10.0.0.1")],
    "an address of bytes": [registered(http_address=b"10.0.0.1:8000")],
    "a long address": [registered(http_address="1" * 301 + ":1")],
    "a pickle": [b"\x80\x04\x95\x1d\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94."],
    "nested": [b"\x81\xa1a" * 300 + b"\xc0"],
    "cut off": [registered()[:-5]],
    "more behind it": [registered() + b"\x00"],
}


@pytest.mark.parametrize("parts", GARBAGE.values(), ids=list(GARBAGE))
async def test_a_message_that_is_not_a_registration_is_counted_and_ignored(parts: list[bytes]) -> None:
    table = Table()
    table.registrations.listen(parts)
    assert table.counts == {"garbage": 1}


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=20) | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
MEMBERS = ("type", "http_address", "zmq_address", "dp_size", "tp_size", "transfer_mode")


@given(
    parts=st.lists(st.binary(max_size=60), max_size=3),
    said=st.fixed_dictionaries({}, optional=dict.fromkeys(MEMBERS, VALUES)),
)
def test_no_message_raises_or_adds_a_backend(parts: list[bytes], said: dict[str, Any]) -> None:
    for connector in ("moriio_write", "moriio_read", "p2p_nccl"):
        table = Table(connector)
        table.registrations.listen(parts)
        table.listen(**said)
        assert sum(table.counts.values()) == 2
        assert table.urls() == [P, D]
        for backend in table.fleet:
            assert backend.coordinates.host in ("10.0.0.1", "10.0.0.2")


async def test_an_engine_that_is_not_in_the_settings_is_unknown() -> None:
    table = Table()
    table.listen(http_address="10.6.6.6:8000", zmq_address="host:10.6.6.6,handshake:1,notify:2")
    table.listen(http_address="10.0.0.1:8001")
    assert table.counts == {"unknown": 2}
    assert table.urls() == [P, D]


async def test_a_backend_whose_connector_does_not_register_is_unknown() -> None:
    other = [{"name": "more", "connector": "nixl", "prefill": ["10.0.1.1:8000"], "decode": ["10.0.1.2:8000"]}]
    table = Table(groups=other)
    table.listen(http_address="10.0.1.1:8000")
    assert table.counts == {"unknown": 1}


async def test_the_host_of_the_coordinates_in_the_settings_is_a_backends_own() -> None:
    url = "http://prefill-0.pool:8000"
    table = Table(prefill=[url], locations=[{"backend": url, "host": "10.0.0.1"}])
    table.listen()
    assert table.prefill.registered
    assert table.prefill.coordinates.host == "10.0.0.1"


async def test_a_host_in_the_networks_may_hold_the_kv_cache_of_a_backend() -> None:
    table = Table(zmq={"networks": ["10.9.0.0/16"]})
    table.listen(zmq_address="host:10.9.0.1,handshake:6301,notify:61005")
    assert table.prefill.coordinates.host == "10.9.0.1"


# Engines that join


JOINED = {"http_address": "10.0.7.1:8000", "zmq_address": "host:10.0.7.1,handshake:6301,notify:61005"}


async def test_engines_in_the_networks_join_and_leave() -> None:
    table = Table(zmq={"networks": "10.0.7.0/24, fd00::/8"})
    table.listen(**JOINED)
    [_, backend] = table.fleet.pool("prefill")
    assert (backend.url, backend.group, backend.connector) == ("http://10.0.7.1:8000", "default", "moriio_write")
    assert backend.registered
    table.clock.now += 11
    table.registrations._sweep()
    assert table.urls() == [P, D], "an engine that joined by registering leaves when it does so no more"
    table.registrations.close()


async def test_an_engine_that_is_about_to_leave_is_taken_back() -> None:
    table = Table(zmq={"networks": ["10.0.7.0/24"]})
    table.listen(**JOINED)
    backend = table.fleet.pool("prefill")[1]
    backend.open_handoffs = 1  # it cannot leave yet
    table.clock.now += 11
    table.registrations._sweep()
    assert backend.draining and backend.removed
    table.listen(**JOINED)
    assert not backend.draining and not backend.removed and backend.registered
    table.registrations.close()


async def test_what_an_operator_drains_stays_drained() -> None:
    table = Table(zmq={"networks": ["10.0.7.0/24"]})
    table.listen(**JOINED)
    table.listen()
    for backend in (table.prefill, table.fleet.pool("prefill")[1]):
        table.fleet.drain(backend)
    table.listen(**JOINED)
    table.listen()
    assert all(backend.draining for backend in table.fleet.pool("prefill"))


@pytest.mark.parametrize(
    "said",
    [
        {**JOINED, "http_address": "10.0.8.1:8000"},
        {**JOINED, "zmq_address": "host:10.0.8.1,handshake:6301,notify:61005"},
        {**JOINED, "http_address": "evil.example:8000"},
        {**JOINED, "transfer_mode": "READ"},
        {**JOINED, "http_address": "10.0.7.1:0"},
    ],
)
async def test_no_other_engine_joins(said: dict[str, Any]) -> None:
    table = Table(zmq={"networks": ["10.0.7.0/24"]})
    table.listen(**said)
    assert table.counts == {"refused": 1}
    assert table.urls() == [P, D]


async def test_the_number_of_engines_that_join_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "MOST", 3)
    table = Table(zmq={"networks": ["10.0.7.0/24"]})
    for number in range(1, 10):
        where = f"10.0.7.{number}"
        table.listen(http_address=f"{where}:8000", zmq_address=f"host:{where},handshake:1,notify:2")
    assert len(table.urls()) == 5
    assert table.counts == {"taken": 3, "refused": 6}


# Over ZeroMQ


@contextmanager
def listening() -> Iterator[tuple[Table, str]]:
    with address() as where:
        table = Table(where=where)
        table.registrations.start()
        try:
            yield table, where
        finally:
            table.registrations.close()


async def test_registrations_come_over_zeromq() -> None:
    with listening() as (table, where), sender(where, zmq.DEALER) as out:
        out.send(registered())
        await until(lambda: table.prefill.registered)


async def test_a_message_of_any_size_or_shape_does_no_harm() -> None:
    with listening() as (table, where):
        with sender(where, zmq.DEALER) as hostile:
            hostile.send(b"x" * 50_000_000)
        with sender(where, zmq.DEALER) as hostile:
            hostile.send_multipart([b"x"] * 5000)
            await until(lambda: table.counts["garbage"] == 1)
        with sender(where, zmq.REQ) as hostile:
            hostile.send(registered())
            await until(lambda: table.counts["garbage"] == 2)
        with sender(where, zmq.DEALER) as out:
            out.send(registered())
            await until(lambda: table.prefill.registered)


async def test_a_flood_leaves_the_event_loop_its_turns_and_other_engines_can_register() -> None:
    with listening() as (table, where), sender(where, zmq.DEALER) as hostile, sender(where, zmq.DEALER) as out:
        for number in range(20_000):
            hostile.send(registered(http_address=f"10.6.6.6:{number % 60_000 + 1}"))
        out.send(registered())
        await until(lambda: table.prefill.registered)
        turns = 0
        while table.counts["unknown"] < 20_000:
            await asyncio.sleep(0)
            turns += 1
        assert len(table.registrations._known) <= 2


async def test_a_flood_does_not_cause_a_flood_of_log_lines(caplog: pytest.LogCaptureFixture) -> None:
    table = Table()
    for number in range(1000):
        table.listen(http_address=f"10.6.6.6:{number + 1}")
        table.listen(zmq_address="host:10.6.6.6,handshake:6301,notify:61005")
        table.listen(zmq_address=f"host:10.0.0.1,handshake:{number + 1},notify:61005")
    assert len(caplog.records) <= 3
