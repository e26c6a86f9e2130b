"""A real uvicorn server with our protocol and an application that a test sets, and what its raw clients need."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import uvicorn
from pd_proxy.http.response import EXTENSION, Receive, Scope, Send
from pd_proxy.http.server import GatewayProtocol
from pd_proxy.http.server_exchange import ServerExchange

from .helpers import TIMEOUT

TEXT = (b"content-type", b"text/plain")
App = Callable[[Scope, ServerExchange, Receive], Awaitable[None]]


class WatchedFlow:
    """A flow that says when it is paused, resumed and stopped."""

    def __init__(self) -> None:
        self.paused = asyncio.Event()
        self.resumed = asyncio.Event()
        self.stopped = asyncio.Event()

    def pause(self) -> None:
        self.paused.set()

    def resume(self) -> None:
        self.resumed.set()

    def stop(self) -> None:
        self.stopped.set()


class Server:
    """A server with one application, which a test sets.

    Attributes:
        seen: the path of every request that reached the application.
    """

    def __init__(self, port: int) -> None:
        self.port = port
        self.app: App = hello
        self.seen: list[str] = []
        self.connections: set[Any] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.seen.append(scope["path"])
        await self.app(scope, scope["extensions"][EXTENSION], receive)

    @contextlib.asynccontextmanager
    async def connect(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            async with asyncio.timeout(TIMEOUT):
                yield reader, writer
        finally:
            writer.transport.abort()

    async def say(self, *data: bytes) -> bytes:
        """Send this, and read until the server closes."""
        async with self.connect() as (reader, writer):
            for part in data:
                writer.write(part)
            return await reader.read()


async def hello(scope: Scope, client: ServerExchange, receive: Receive) -> None:
    """Answers with the request's method, path and body."""
    body = client.body
    if body is None:
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message["body"]
            if not message["more_body"]:
                break
    client.respond(200, [TEXT], f"{scope['method']} {scope['path']} ".encode() + body)


async def stream(scope: Scope, client: ServerExchange, receive: Receive) -> None:
    """Answers in three pieces, the middle one in an engine's own framing."""
    client.start(200, [TEXT])
    assert client.chunks() is None  # the head is not out yet
    client.write(b"one")
    if chunks := client.chunks():
        chunks(b"3\r\ntwo\r\n")
    else:
        client.write(b"two")
    client.end(b"three")


@contextlib.asynccontextmanager
async def serving() -> AsyncIterator[Server]:
    """A server that listens."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        app = Server(sock.getsockname()[1])
        config = uvicorn.Config(
            app,
            http=GatewayProtocol,
            ws="none",
            loop="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            timeout_graceful_shutdown=1,
        )
        running = uvicorn.Server(config)
        config.load()
        running.lifespan = config.lifespan_class(config)
        await running.startup(sockets=[sock])
        app.connections = running.server_state.connections
        try:
            yield app
        finally:
            for connection in list(running.server_state.connections):
                connection.transport.abort()
            running.force_exit = True  # wait for nobody
            await running.shutdown(sockets=[sock])


def request(path: str = "/", *lines: str, method: str = "GET", version: str = "1.1", body: bytes = b"") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/{version}", "host: gateway", *lines, "\r\n"]).encode() + body


def parts(answer: bytes) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and the rest of an answer."""
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    return int(status.split()[1]), {k.lower(): v for k, _, v in (line.partition(": ") for line in lines)}, body


def error(answer: bytes) -> tuple[int, dict[str, Any]]:
    """Status and error of an answer in OpenAI's shape, which is also well framed and the connection's last."""
    status, headers, body = parts(answer)
    assert headers["content-type"] == "application/json"
    assert headers["connection"] == "close"
    assert int(headers["content-length"]) == len(body)
    detail = json.loads(body)["error"]
    assert set(detail) == {"message", "type", "param", "code"}
    return status, detail


def reluctant(port: int) -> socket.socket:
    """A client whose socket holds little, so that the server's fills soon."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        sock.connect(("127.0.0.1", port))
    return sock
