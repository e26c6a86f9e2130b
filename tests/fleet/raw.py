"""An engine that answers with any bytes that a test gives it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

Serve = Callable[[bytes, asyncio.StreamWriter], Awaitable[object]]


@dataclass
class Raw:
    """A running raw engine.

    Attributes:
        url: where it listens.
        heads: the heads of the requests that came.
        sent: the number of bytes that it could send; the `serve` function counts them.
    """

    url: str = ""
    heads: list[bytes] = field(default_factory=list)
    sent: int = 0

    def asked(self, path: bytes) -> list[bytes]:
        """The heads of the requests for a path."""
        return [head for head in self.heads if head.split(b" ")[1] == path]


@asynccontextmanager
async def raw_engine(serve: Serve | bytes) -> AsyncIterator[Raw]:
    """Run an engine that serves the first request of each connection with `serve(head, writer)` or these bytes."""
    raw, tasks = Raw(), set[asyncio.Task[None]]()

    async def serve_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            head = await reader.readuntil(b"\r\n\r\n")
            raw.heads.append(head)
            if callable(serve):
                await serve(head, writer)
            else:
                writer.write(serve)
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve_one, "127.0.0.1", 0)
    raw.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield raw
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def answer(body: bytes = b"{}", *headers: bytes, status: bytes = b"200 OK") -> bytes:
    """A whole answer."""
    lines = b"".join(line + b"\r\n" for line in headers)
    return b"HTTP/1.1 %b\r\n%bcontent-length: %d\r\n\r\n%b" % (status, lines, len(body), body)
