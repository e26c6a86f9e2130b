"""HTTP requests between the workers of one gateway: to collect metrics, and to repeat an operator's change in all
workers.

Each worker listens on a Unix socket of its own. The sockets are in a directory that is closed to other users, so these
requests need no key.
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
"""The beginnings of the paths of requests that change the gateway, and so have to change each worker."""
_control = Control(2.0)  # seconds that another worker has to answer
_MAX_ANSWER = 64 * 1024 * 1024  # bytes; enough for the metrics of a large fleet


def socket_of(directory: Path, worker: int) -> Path:
    """The path of the socket on which a worker serves the other workers."""
    return directory / f"{worker}.sock"


def page_of(directory: Path, worker: int) -> Path:
    """The path of the file in which a worker saves the metrics that it has shown."""
    return directory / f"{worker}.page"


def departed_page(directory: Path) -> Path:
    """The path of the file in which the supervisor saves the counts of workers that have ended."""
    return directory / "departed.page"


def write(path: Path, text: str) -> None:
    """Replace a file in one step, so that a reader never sees half of it."""
    new = path.with_suffix(f".{os.getpid()}")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


class PeerWorkers:
    """Asks the other workers of this gateway.

    Arguments:
        directory: holds the workers' sockets.
        worker: this worker's number.
        workers: how many workers there are.
    """

    def __init__(self, directory: Path, worker: int, workers: int) -> None:
        self._directory = directory
        self._worker = worker
        self._paths = [socket_of(directory, other) for other in range(workers) if other != worker]

    async def metrics(self) -> list[str]:
        """The other workers' metrics, in the text format. A worker that does not answer is left out: it has not started
        yet, or has ended."""
        answers = await asyncio.gather(*(self._ask(path, "GET", METRICS) for path in self._paths))
        return [decode_text(answer.body) for answer in answers if answer is not None and _is_good(answer)]

    async def not_ready(self) -> str:
        """Why another worker cannot serve a request; empty where all can. A worker that does not answer is ignored,
        since it accepts no connections either."""
        for answer in await asyncio.gather(*(self._ask(path, "GET", "/ready") for path in self._paths)):
            if answer is not None and not _is_good(answer):
                return str(decode_json(answer.body)["error"]["message"])
        return ""

    def remember(self, page: str) -> None:
        """Save the metrics that this worker has just shown, so that its counts are not lost if it dies."""
        write(page_of(self._directory, self._worker), page)

    def departed(self) -> str:
        """The saved metrics of workers that have died, in the text format."""
        try:
            return departed_page(self._directory).read_text(encoding="utf-8")
        except FileNotFoundError:
            return ""

    async def backends(self) -> list[dict[str, Any]]:
        """The backends as another worker knows them; an empty list where no other worker answers, as when the gateway
        has just started."""
        for path in self._paths:
            answer = await self._ask(path, "GET", "/admin/backends")
            if answer is not None and _is_good(answer):
                found: list[dict[str, Any]] = decode_json(answer.body)["backends"]
                return found
        return []

    async def decisions(self, limit: int, request_id: str) -> list[dict[str, Any]]:
        """The last decisions of the other workers (`/admin/decisions`). A worker that does not answer is left out."""
        target = f"/admin/decisions?{urlencode({'limit': limit, 'request_id': request_id})}"
        answers = await asyncio.gather(*(self._ask(path, "GET", target) for path in self._paths))
        return [
            one
            for answer in answers
            if answer is not None and _is_good(answer)
            for one in decode_json(answer.body)["decisions"]
        ]

    async def post(self, target: str) -> None:
        """Send a POST without a body to each of the other workers."""
        await asyncio.gather(*(self._ask(path, "POST", target) for path in self._paths))

    async def drained(self, url: str) -> bool:
        """Whether a draining backend is drained in all other workers. A worker that does not answer has nothing
        there."""
        for answer in await asyncio.gather(*(self._ask(path, "GET", "/admin/backends") for path in self._paths)):
            if answer is not None and _is_good(answer):
                for backend in decode_json(answer.body)["backends"]:
                    if backend["url"] == url and not backend["drained"]:
                        return False
        return True

    async def forward(self, worker: int, path: str, body: bytes) -> Answer | None:
        """Send a POST to one of the other workers. Returns its answer; None where it does not answer or does not
        exist."""
        other = socket_of(self._directory, worker)
        return await self._ask(other, "POST", path, body) if other in self._paths else None

    def is_repeated(self, method: str, path: str) -> bool:
        """Whether every worker has to serve this request."""
        return method == "POST" and path.startswith(_REPEATED)

    async def repeat(self, app: App, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve a request, and send it to the other workers too where it succeeded."""
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
                    await self._repeat(scope, bytes(body))  # before the operator gets the answer
            await send(message)

        await app(scope, received, sent)

    async def _repeat(self, scope: MutableMapping[str, Any], body: bytes) -> None:
        path = scope.get("raw_path") or scope["path"].encode()
        target = (path + (b"?" + scope["query_string"] if scope["query_string"] else b"")).decode("latin-1")
        await asyncio.gather(*(self._ask(other, scope["method"], target, body) for other in self._paths))

    @staticmethod
    async def _ask(path: Path, method: str, target: str, body: bytes = b"") -> Answer | None:
        try:
            url = f"http://worker{target}"
            answer = await _control.ask(url, method=method, body=body, socket=path, limit=_MAX_ANSWER)
        except BackendError as error:
            log.debug("another worker did not answer %s %s: %s", method, target, error)
            return None
        if not _is_good(answer) and method != "GET":
            log.warning("another worker answered %d to %s %s", answer.status, method, target)
        return answer


def _is_good(answer: Answer) -> bool:
    return answer.status < 300
