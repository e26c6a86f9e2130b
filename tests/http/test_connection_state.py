"""The states of a connection to an engine: the table, and that each event moves a connection along it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pd_proxy.http.connection import Connection
from pd_proxy.http.connection_state import TRANSITIONS, ConnectionState
from pd_proxy.http.origin import Origin
from pd_proxy.http.upload import Upload
from pd_proxy.transitions import ImpossibleTransition

from .helpers import FakeTransport, Recorder, faults

IDLE, UNSENT, HEAD, BODY, WHOLE, LAST, OVER = ConnectionState
REQUEST = b"POST / HTTP/1.1\r\n\r\n"


class Checked:
    """A connection that looks up each assignment of a state in the table."""

    seen: list[tuple[ConnectionState, ConnectionState]]

    @property
    def _state(self) -> ConnectionState:
        return self.now

    @_state.setter
    def _state(self, then: ConnectionState) -> None:
        if hasattr(self, "now"):
            self.seen.append((self.now, then))
            self.now = TRANSITIONS[self.now][then]
        else:
            self.now, self.seen = then, []


class CheckedConnection(Checked, Connection):
    pass


class CheckedUpload(Checked, Upload):
    pass


class Leaving(Recorder):
    """A receiver that aborts its exchange when it gets the head."""

    connection: Connection

    def head(self, status: int, headers: dict[bytes, bytes]) -> None:
        super().head(status, headers)
        self.connection.abort()


class Bed:
    """One connection on a transport without a socket, and the receivers of its exchanges."""

    def __init__(self, kind: type[CheckedConnection | CheckedUpload] = CheckedConnection) -> None:
        self.origin = Origin("http://engine:80")
        self.transport = FakeTransport()
        self.connection = kind(self.origin)
        self.connection.connection_made(self.transport)
        self.recorders: list[Recorder] = []
        self.lost = False

    def do(self, step: str) -> None:
        """Do one step, if it can happen now."""
        if step in READS:
            protocol = self.transport.protocol or self.connection
            assert isinstance(protocol, asyncio.Protocol)
            protocol.data_received(READS[step])
        elif not step.startswith("begins") or self.connection.now is IDLE:
            ACTIONS[step](self)

    def begin(self, post: Callable[[Connection], object] | None = None, recorder: Recorder | None = None) -> None:
        self.recorders.append(recorder or Recorder())
        self.connection.begin(self.recorders[-1], REQUEST, (b"",), post)

    def begin_leaving(self) -> None:
        recorder = Leaving()
        recorder.connection = self.connection
        self.begin(recorder=recorder)

    def lose(self, error: Exception | None) -> None:
        self.connection.connection_lost(error)
        self.lost = True


OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
READS = {
    "an answer": OK,
    "two answers": OK + OK,
    "an answer that is the last": OK.replace(b"OK\r\n", b"OK\r\nconnection: close\r\n"),
    "an answer without a body": b"HTTP/1.1 204 No Content\r\n\r\n",
    "early hints": b"HTTP/1.1 103 Early Hints\r\nlink: a\r\n\r\n",
    "half a head": CHUNKED[:20],
    "the other half": CHUNKED[20:],
    "a head": CHUNKED,
    "a head of an answer until the close": b"HTTP/1.1 200 OK\r\n\r\n",
    "a chunk": b"2\r\nok\r\n",
    "an end": b"0\r\n\r\n",
    "an end with a trailer": b"0\r\nx: y\r\n\r\n",
    "a status out of range": b"HTTP/1.1 999 X\r\n\r\n",
    "another protocol": b"HTTP/1.1 101 X\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n",
    "no HTTP": b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
}
ACTIONS: dict[str, Callable[[Bed], object]] = {
    "begins": Bed.begin,
    "begins, to be sent later": lambda bed: bed.begin(lambda connection: None),
    "begins, and leaves at the head": Bed.begin_leaving,
    "is sent": lambda bed: bed.connection.send(),
    "is aborted": lambda bed: bed.connection.abort(),
    "the engine closes": lambda bed: bed.lose(None),
    "the connection is reset": lambda bed: bed.lose(ConnectionResetError()),
    "the transport is closing": lambda bed: bed.transport.close(),
    "is paused": lambda bed: bed.connection.pause(),
    "is resumed": lambda bed: bed.connection.resume(),
    "is diverted": lambda bed: bed.connection.divert(bed.connection),
    "the origin closes": lambda bed: bed.origin.close(),
}
SCRIPTS: dict[tuple[ConnectionState, ConnectionState], list[str]] = {
    (IDLE, UNSENT): ["begins, to be sent later"],
    (IDLE, OVER): ["is aborted"],
    (UNSENT, HEAD): ["begins, to be sent later", "is sent"],
    (UNSENT, OVER): ["begins, to be sent later", "the engine closes"],
    (HEAD, BODY): ["begins", "a head"],
    (HEAD, OVER): ["begins", "no HTTP"],
    (BODY, WHOLE): ["begins", "a head", "a chunk", "an end"],
    (BODY, LAST): ["begins", "an answer that is the last"],
    (BODY, OVER): ["begins", "a head of an answer until the close", "the engine closes"],
    (WHOLE, IDLE): ["begins", "an answer"],
    (WHOLE, LAST): ["begins", "two answers"],
    (WHOLE, OVER): ["begins", "the transport is closing", "an answer"],
    (LAST, OVER): ["begins", "an answer that is the last"],
    (OVER, OVER): ["is aborted", "is aborted"],
}


@pytest.mark.parametrize("then", ConnectionState)
@pytest.mark.parametrize("now", ConnectionState)
def test_each_transition_of_the_table_happens_and_no_other_is_possible(
    now: ConnectionState, then: ConnectionState
) -> None:
    if (now, then) in SCRIPTS:
        bed = Bed()
        for step in SCRIPTS[now, then]:
            bed.do(step)
        assert (now, then) in bed.connection.seen
    else:
        with pytest.raises(ImpossibleTransition, match=f"a connection that is {now.value} cannot become {then.value}"):
            TRANSITIONS[now][then]


def test_an_exchange_cannot_begin_on_a_connection_that_has_one_or_is_over() -> None:
    bed = Bed()
    bed.begin()
    with pytest.raises(ImpossibleTransition, match="a connection that is head cannot become unsent"):
        bed.begin()
    bed.connection.abort()
    with pytest.raises(ImpossibleTransition, match="a connection that is over cannot become unsent"):
        bed.begin()


def test_an_upload_that_was_not_sent_whole_is_the_last_exchange_of_its_connection() -> None:
    bed = Bed(CheckedUpload)
    bed.do("begins")
    bed.do("an answer")
    assert bed.connection.seen[-3:] == [(BODY, WHOLE), (WHOLE, LAST), (LAST, OVER)]


def test_bytes_that_come_before_the_first_exchange_leave_its_request_unread() -> None:
    """The engine may send them between the turn in which the connection is made and the one in which it is used."""
    bed = Bed()
    bed.do("no HTTP")
    bed.do("begins")
    assert bed.recorders[0].endings == ["lost"]
    assert bed.connection.seen == [(IDLE, UNSENT), (UNSENT, OVER)]


@given(
    kind=st.sampled_from([CheckedConnection, CheckedUpload]),
    steps=st.lists(st.sampled_from([*READS, *ACTIONS]), max_size=15),
)
def test_whatever_happens_moves_a_connection_along_the_table(
    kind: type[CheckedConnection | CheckedUpload], steps: list[str]
) -> None:
    bed = Bed(kind)
    with faults() as found:
        for step in ["begins", *steps]:
            if bed.lost and step in READS:
                continue  # nothing is read from a connection that has ended
            bed.do(step)
            assert bed.connection.now not in (WHOLE, LAST), "they pass within one read"
            assert (bed.connection._receiver is None) is (bed.connection.now in (IDLE, OVER))
            assert all(len(recorder.endings) <= 1 for recorder in bed.recorders)
            if bed.connection.now is IDLE:
                assert all(recorder.endings for recorder in bed.recorders)
    assert found == []
