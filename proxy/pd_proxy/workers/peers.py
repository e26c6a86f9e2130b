"""Requests between the workers of one gateway: for metrics, and to repeat an operator's change in all of them.

Each listens on a socket of its own in a directory that no other user may enter, so these requests need no key.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from pd_proxy.decoding import decode_json, decode_text
from pd_proxy.errors import BackendError
from pd_proxy.http.control import Answer, Control

log = logging.getLogger("pd_proxy.api")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

METRICS = "/metrics"
_REPEATED = ("/instances/", "/admin/backends/")
"""Paths of requests that change the gateway itself, and so each of its workers."""
_control = Control(2.0)  # another worker has so many seconds to answer
_MOST = 64 * 1024 * 1024  # bytes of its answer: metrics of a large fleet


def socket_of(directory: Path, worker: int) -> Path:
    """Where a worker listens for the others."""
    return directory / f"{worker}.sock"


def page_of(directory: Path, worker: int) -> Path:
    """Where a worker keeps what it has shown of its metrics."""
    return directory / f"{worker}.page"


def departed_page(directory: Path) -> Path:
    """Where the supervisor keeps the counts of workers that have died."""
    return directory / "departed.page"


def write(path: Path, text: str) -> None:
    """Replace a file, whole."""
    new = path.with_suffix(f".{os.getpid()}")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


class PeerWorkers:
    """The other workers of this gateway.

    Arguments:
        directory: of their sockets.
        worker: this one's number.
        workers: how many there are.
    """

    def __init__(self, directory: Path, worker: int, workers: int) -> None:
        self._directory = directory
        self._worker = worker
        self._paths = [socket_of(directory, other) for other in range(workers) if other != worker]

    async def metrics(self) -> list[str]:
        """The others' metrics in the text format. One that does not answer is left out: it is starting, or gone."""
        answers = await asyncio.gather(*(self._ask(path, "GET", METRICS) for path in self._paths))
        return [decode_text(answer.body) for answer in answers if answer is not None and _is_good(answer)]

    async def not_ready(self) -> str:
        """Why one of the others cannot serve a request, or an empty string. One that does not answer accepts none."""
        for answer in await asyncio.gather(*(self._ask(path, "GET", "/ready") for path in self._paths)):
            if answer is not None and not _is_good(answer):
                return str(decode_json(answer.body)["error"]["message"])
        return ""

    def remember(self, page: str) -> None:
        """Keep what this worker has just shown of its metrics, so that its counts do not go back should it die."""
        write(page_of(self._directory, self._worker), page)

    def departed(self) -> str:
        """What workers that have died had shown of theirs."""
        try:
            return departed_page(self._directory).read_text(encoding="utf-8")
        except FileNotFoundError:
            return ""

    async def backends(self) -> list[dict[str, Any]]:
        """The backends as one of the others knows them; none where no other answers: the gateway is just starting."""
        for path in self._paths:
            answer = await self._ask(path, "GET", "/admin/backends")
            if answer is not None and _is_good(answer):
                found: list[dict[str, Any]] = decode_json(answer.body)["backends"]
                return found
        return []

    async def decisions(self, limit: int, request_id: str) -> list[dict[str, Any]]:
        """The others' last decisions (`/admin/decisions`). One that does not answer has none."""
        target = f"/admin/decisions?{urlencode({'limit': limit, 'request_id': request_id})}"
        answers = await asyncio.gather(*(self._ask(path, "GET", target) for path in self._paths))
        return [
            one
            for answer in answers
            if answer is not None and _is_good(answer)
            for one in decode_json(answer.body)["decisions"]
        ]

    async def post(self, target: str) -> None:
        """Send a POST to each of the others."""
        await asyncio.gather(*(self._ask(path, "POST", target) for path in self._paths))

    async def drained(self, url: str) -> bool:
        """Whether none of the others needs a backend that they drain. One that does not answer has nothing there."""
        for answer in await asyncio.gather(*(self._ask(path, "GET", "/admin/backends") for path in self._paths)):
            if answer is not None and _is_good(answer):
                for backend in decode_json(answer.body)["backends"]:
                    if backend["url"] == url and not backend["drained"]:
                        return False
        return True

    async def forward(self, worker: int, path: str, body: bytes) -> Answer | None:
        """Have one of the others serve a POST; None where it does not answer, or there is none of that number."""
        other = socket_of(self._directory, worker)
        return await self._ask(other, "POST", path, body) if other in self._paths else None

    def is_repeated(self, method: str, path: str) -> bool:
        """Whether a request is one that every worker is to serve."""
        return method == "POST" and path.startswith(_REPEATED)

    async def repeat(self, app: App, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve a request, and have the others serve it too if it was served well."""
        body, status = bytearray(), 0

        async def received() -> Message:
            message = await receive()
            body.extend(message.get("body", b""))
            return message

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if status < 300:
                    await self._repeat(scope, bytes(body))  # done before the operator gets the answer
            await send(message)

        await app(scope, received, sent)

    async def _repeat(self, scope: MutableMapping[str, Any], body: bytes) -> None:
        path = scope.get("raw_path") or scope["path"].encode()
        target = (path + (b"?" + scope["query_string"] if scope["query_string"] else b"")).decode("latin-1")
        await asyncio.gather(*(self._ask(other, scope["method"], target, body) for other in self._paths))

    @staticmethod
    async def _ask(path: Path, method: str, target: str, body: bytes = b"") -> Answer | None:
        try:
            answer = await _control.ask(f"http://worker{target}", method=method, body=body, socket=path, limit=_MOST)
        except BackendError as error:
            log.debug("another worker did not answer %s %s: %s", method, target, error)
            return None
        if not _is_good(answer) and method != "GET":
            log.warning("another worker answered %d to %s %s", answer.status, method, target)
        return answer


def _is_good(answer: Answer) -> bool:
    return answer.status < 300
