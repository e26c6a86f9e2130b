"""Whatever a receiver raises, its leg fails: no request waits for an answer that will not come."""

from __future__ import annotations

import asyncio
import logging

import pytest
from pd_proxy.dialects.chat import ChoicesReader
from pd_proxy.dialects.prompt_logprobs import PromptLogprobs
from pd_proxy.dialects.sglang import SGLANG
from pd_proxy.errors import BackendCut, BackendError, BackendGarbled
from pd_proxy.http.collected import Collected
from pd_proxy.http.connection import Connection
from pd_proxy.http.connection_state import ConnectionState
from pd_proxy.http.deadlines import Deadlines
from pd_proxy.http.origin import Origin

from tests.http.helpers import FakeTransport, Recorder

from .streams import DONE, HIDE, chat, event, opened

URL = "http://engine:80"
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
UNTIL_CLOSED = b"HTTP/1.1 200 OK\r\n\r\nok"


class Fault(Exception):
    """What the code of no room expects."""


class Faulty(Recorder):
    """A receiver that raises in the calls that the test names."""

    def __init__(self, *where: str) -> None:
        super().__init__()
        self.where = where

    def _may_fail(self, what: str) -> None:
        if what in self.where:
            raise Fault(what)

    def head(self, status: int, headers: dict[bytes, bytes]) -> None:
        self._may_fail("head")
        super().head(status, headers)

    def data(self, data: bytes, last: bool) -> None:
        self._may_fail("data")
        super().data(data, last)

    def end(self) -> None:
        self._may_fail("end")
        super().end()

    def lost(self, error: BackendError) -> None:
        self._may_fail("lost")
        super().lost(error)


def begun(receiver: Recorder, origin: Origin | None = None) -> tuple[Connection, FakeTransport]:
    connection, transport = Connection(origin or Origin(URL)), FakeTransport()
    connection.connection_made(transport)
    connection.begin(receiver, b"", (b"",))
    return connection, transport


@pytest.mark.parametrize("where", ["head", "data", "end"])
def test_an_exception_of_a_receiver_fails_its_leg(where: str, caplog: pytest.LogCaptureFixture) -> None:
    receiver = Faulty(where)
    connection, transport = begun(receiver)
    with caplog.at_level(logging.ERROR):
        connection.data_received(ANSWER)
    assert receiver.endings == ["lost"]
    assert isinstance(receiver.error, BackendGarbled)
    assert URL in str(receiver.error)
    assert transport.aborted
    [line] = caplog.records
    assert line.exc_info is not None
    assert isinstance(line.exc_info[1], Fault), "the traceback shows where it came from"


def test_an_exception_of_a_receiver_at_an_end_by_closing_fails_its_leg() -> None:
    receiver = Faulty("end")
    connection, _ = begun(receiver)
    connection.data_received(UNTIL_CLOSED)
    connection.connection_lost(None)
    assert receiver.endings == ["lost"]


@pytest.mark.parametrize("ending", ["garbage", "closed"])
def test_a_receiver_that_raises_when_its_leg_is_lost_harms_no_other(
    ending: str, caplog: pytest.LogCaptureFixture
) -> None:
    connection, transport = begun(Faulty("lost"))
    with caplog.at_level(logging.ERROR):
        if ending == "garbage":
            connection.data_received(b"no HTTP\r\n\r\n")
            assert transport.aborted
        else:
            connection.connection_lost(None)
    assert [line.levelname for line in caplog.records] == ["ERROR"]


def test_a_fault_of_the_protocol_that_has_the_reads_is_no_engines() -> None:
    """The event loop ends a connection whose protocol raises, and tells it why."""
    receiver = Recorder()
    connection, _ = begun(receiver)
    connection.connection_lost(Fault("in the fast path"))
    assert isinstance(receiver.error, BackendGarbled)
    receiver = Recorder()
    connection, _ = begun(receiver)
    connection.connection_lost(ConnectionResetError())
    assert isinstance(receiver.error, BackendCut)


async def test_one_request_that_cannot_be_sent_keeps_no_other_from_going_out() -> None:
    def fails() -> None:
        raise Fault("told that it was sent")

    origin, sound, faulty = Origin(URL), Recorder(), Recorder()
    first, _ = begun(faulty, origin)
    first._state = ConnectionState.IDLE
    first.begin(faulty, b"one", (b"",), origin._post, fails)
    second, transport = begun(sound, origin)
    second._state = ConnectionState.IDLE
    second.begin(sound, b"two", (b"",), origin._post)
    await asyncio.sleep(0)
    assert transport.written == b"two"
    assert isinstance(faulty.error, BackendGarbled)


async def test_one_time_limit_that_cannot_be_enforced_keeps_no_other_from_being_so() -> None:
    calls: list[str] = []
    everyone = asyncio.Event()

    class Broken:
        def overdue(self, seconds: float) -> None:
            calls.append("broken")
            raise Fault

    class Sound:
        def overdue(self, seconds: float) -> None:
            calls.append("sound")
            everyone.set()

    limits = Deadlines(0.001)
    for waiting in (Broken(), Sound()):
        limits.watch(waiting, asyncio.get_running_loop())
    async with asyncio.timeout(5):
        await everyone.wait()
    assert calls == ["broken", "sound"]


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 600 X",
        b"HTTP/1.1 999 X",
        b"HTTP/1.1 099 X",
        b"HTTP/1.1 000 X",
    ],
)
async def test_a_status_that_is_none_is_a_garbled_answer(head: bytes) -> None:
    collected = Collected(URL, limit=100)
    connection = Connection(Origin(URL))
    connection.connection_made(FakeTransport())
    connection.begin(collected, b"", (b"",))
    collected.connection = connection
    connection.data_received(head + b"\r\ncontent-length: 2\r\n\r\nok")
    with pytest.raises(BackendGarbled):
        await collected.wait(Deadlines(5))


# The relay of a stream


@pytest.mark.parametrize("place", ["_pass_on", "_write", "_go_live", "_open_fast_path", "_inspect"])
async def test_a_fault_in_the_relay_ends_the_stream(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = await opened(edit=HIDE)

    def fails(*arguments: object) -> object:
        raise Fault(place)

    monkeypatch.setattr(ChoicesReader if place == "_inspect" else type(stream.relay), place, fails)
    stream.read(chat({"role": "assistant"}), chat({"content": "a"}, token_ids=[5]))
    error = await stream.outcome()
    assert isinstance(error, BackendGarbled)
    assert stream.transport.aborted


async def test_a_stream_is_not_resumed_after_a_fault_since_it_is_not_known_what_the_client_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = await opened(edit=HIDE, finished=False)
    stream.read(
        event({"id": "1", "prompt_token_ids": [1, 2], "choices": [{"index": 0, "delta": {"role": "assistant"}}]}),
        chat({"content": "a"}, token_ids=[5]),
    )
    assert stream.transcript.continuable
    assert stream.relay.live

    def fails(*arguments: object) -> object:
        raise Fault

    monkeypatch.setattr(type(stream.relay), "_write", fails)
    stream.read(chat({}, token_ids=[6]), chat({"content": "b"}, finish_reason="stop", token_ids=[7]))
    assert isinstance(await stream.outcome(), BackendGarbled)
    assert not stream.transcript.continuable
    assert not stream.transcript.finished
    assert stream.transcript.inexact == "fault"


@pytest.mark.parametrize("status", [400, 500])
async def test_a_fault_at_the_end_of_a_refusal_ends_the_stream(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object) -> object:
        raise Fault

    monkeypatch.setattr("pd_proxy.relay.stream.engine_error", fails)
    stream = await opened(status=status)
    stream.read(b"{}")
    stream.end()
    assert isinstance(await stream.outcome(), BackendGarbled)


async def test_a_fault_in_the_clients_last_bytes_ends_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = await opened()

    def fails(data: bytes = b"") -> None:
        raise Fault

    monkeypatch.setattr(stream.client, "end", fails)
    stream.read(chat({"content": "a"}), DONE)
    stream.end()
    assert isinstance(await stream.outcome(), BackendGarbled)


async def test_a_fault_in_what_had_to_wait_ends_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    logprobs = PromptLogprobs(asyncio.get_running_loop())
    stream = await opened(dialect=SGLANG, logprobs=logprobs)
    stream.read(b'data: {"text":"a","meta_info":{}}\n\n')

    def fails(*arguments: object) -> object:
        raise Fault

    monkeypatch.setattr(type(stream.relay), "_pass_on", fails)
    logprobs.take(b'{"meta_info":{}}')
    assert isinstance(await stream.outcome(), BackendGarbled)
