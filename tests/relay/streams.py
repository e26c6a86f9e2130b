"""Events as engines write them, and one relayed stream held at both its ends."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import msgspec
from pd_proxy.dialects.chat import CHAT
from pd_proxy.dialects.dialect import Dialect
from pd_proxy.dialects.edit import Edit
from pd_proxy.dialects.prompt_logprobs import PromptLogprobs
from pd_proxy.errors import BackendError
from pd_proxy.http.connection import Connection
from pd_proxy.http.deadlines import Deadlines
from pd_proxy.http.origin import Origin
from pd_proxy.relay.stream import StreamRelay
from pd_proxy.relay.transcript import Transcript
from pd_proxy.telemetry.records import ITL_BOUNDS, Distribution

from tests.http.helpers import TIMEOUT, FakeTransport, RecordingClient

URL = "http://engine:80"
DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
HIDE = Edit(hide_ids=True)
COUNTS = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10, "prompt_tokens_details": {"cached_tokens": 4}}


def event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


def chat(delta: dict[str, Any], **more: Any) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None, **more}
    return event({"id": "chatcmpl-1", "object": "chat.completion.chunk", "choices": [choice]})


def text(token: str, **more: Any) -> bytes:
    return event({"id": "cmpl-1", "choices": [{"index": 0, "text": token, "finish_reason": None}], **more})


def chunk(data: bytes) -> bytes:
    """One chunk of the chunked coding."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def identity(**members: Any) -> dict[str, msgspec.Raw]:
    return {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in members.items()}


def members(shown: bytes) -> dict[str, Any]:
    """What one event carries."""
    value = json.loads(shown.removeprefix(b"data: "))
    assert isinstance(value, dict)
    return value


ROLE = chat({"role": "assistant", "content": ""})
FIRST, SECOND, THIRD = (chat({"content": token}) for token in ("Hel", "lo", " you"))
END = chat({}, finish_reason="stop")
USAGE = event({"id": "chatcmpl-1", "choices": [], "usage": COUNTS})
FAILURE = event({"error": {"message": "Internal server error", "type": "InternalServerError", "code": 500}})


class Clock:
    """A clock that a test turns by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class CountingConnection(Connection):
    """A connection that keeps the reads that were its own to parse."""

    def __init__(self, origin: Origin) -> None:
        super().__init__(origin)
        self.reads: list[bytes] = []

    def data_received(self, data: bytes) -> None:
        self.reads.append(data)
        super().data_received(data)


class Stream:
    """One relayed stream, from both its ends.

    Arguments:
        finished: the client has its `finish_reason` already, so that `[DONE]` ends the answer.
    """

    def __init__(
        self,
        *,
        edit: Edit | None = None,
        inexact: str = "",
        transcript: Transcript | None = None,
        finished: bool = True,
        drop_usage: bool = True,
        idle: float | None = None,
        first_token: float | None = None,
        status: int = 200,
        chunks: bool = True,
        client: RecordingClient | None = None,
        framing: bytes = b"transfer-encoding: chunked",
        dialect: Dialect = CHAT,
        prompts: int = 0,
        logprobs: PromptLogprobs | None = None,
        pace: Callable[[float], object] | None = None,
    ) -> None:
        self.client = client or RecordingClient(chunks)
        self.gaps = Distribution(ITL_BOUNDS)
        self.transcript = transcript or Transcript(inexact)
        self.transcript.finished = finished
        self.begun = 0
        self.first_tokens: list[StreamRelay] = []
        reader = dialect.reader(
            URL, edit or Edit(), self.transcript, drop_usage=drop_usage, prompts=prompts, logprobs=logprobs
        )
        self.relay = StreamRelay(
            URL,
            self.client,
            reader,
            self.transcript,
            self.gaps,
            self._begin,
            on_first_token=self.first_tokens.append,
            pace=pace,
            idle=Deadlines(idle),
        )
        self.origin = Origin(URL)
        self.connection = CountingConnection(self.origin)
        self.transport = FakeTransport()
        self.connection.connection_made(self.transport)
        self.connection.begin(self.relay, b"", (b"",))
        self.feed(b"HTTP/1.1 %d X\r\n%b\r\n\r\n" % (status, framing))
        self.running = asyncio.ensure_future(self.relay.run(self.connection, Deadlines(first_token)))

    def _begin(self, relay: StreamRelay) -> None:
        assert relay is self.relay
        self.begun += 1
        if not self.client.started:
            self.client.start(200, ())

    @property
    def protocol(self) -> asyncio.Protocol:
        """Who has the reads now."""
        protocol = self.transport.protocol or self.connection
        assert isinstance(protocol, asyncio.Protocol)
        return protocol

    def feed(self, *reads: bytes) -> None:
        """Reads as they come from the socket, until the connection is done with."""
        for data in reads:
            if self.connection._receiver is not None:
                self.protocol.data_received(data)

    def read(self, *events: bytes) -> None:
        """Each of these is one chunk, and one read."""
        self.feed(*map(chunk, events))

    def end(self) -> None:
        self.feed(b"0\r\n\r\n")

    def lose(self, error: Exception | None) -> None:
        """The connection breaks."""
        self.protocol.connection_lost(error)

    def parsed(self, *events: bytes) -> list[bytes]:
        """Which of these reads went through the parser."""
        before = len(self.connection.reads)
        self.read(*events)
        return [data.partition(b"\r\n")[2][:-2] for data in self.connection.reads[before:]]

    async def outcome(self) -> BackendError | None:
        """How it ended."""
        try:
            async with asyncio.timeout(TIMEOUT):
                await self.running
        except BackendError as error:
            return error
        return None


async def opened(**options: Any) -> Stream:
    """A stream whose relay waits for its first event."""
    stream = Stream(**options)
    await asyncio.sleep(0)
    return stream


async def relayed(*events: bytes, **options: Any) -> Stream:
    """A stream that ended well after these reads."""
    stream = await opened(**options)
    stream.read(*events)
    stream.end()
    assert await stream.outcome() is None
    assert stream.client.ended
    assert stream.protocol is stream.connection
    return stream
