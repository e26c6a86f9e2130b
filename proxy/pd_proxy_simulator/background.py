"""Responses that run in the background: the answer goes to the store instead of a client.

Invariant: a stored response ends exactly once: answered, failed, or cancelled.
"""

from __future__ import annotations

from collections.abc import Callable

from pd_proxy_simulator import encoding
from pd_proxy_simulator.http import Exchange
from pd_proxy_simulator.responses import StoredResponse


class Recorder(Exchange):
    """An exchange without a connection: what is written to it goes into a stored response."""

    def __init__(self, stored: StoredResponse, changed: Callable[[], None]) -> None:
        self._stored = stored
        self._changed = changed
        self.status: int | None = None
        self.on_writable = None

    @property
    def open(self) -> bool:
        """Whether the answer can still be written to."""
        return not self._stored.over

    @property
    def writable(self) -> bool:
        """Whether the reader keeps up: always true, since there is no client."""
        return True

    def respond(
        self,
        status: int,
        body: bytes,
        content_type: str = "application/json",
        headers: dict[str, str] | None = None,
        *,
        length: int | None = None,
    ) -> None:
        """Keep a whole answer."""
        if status == 200:
            self._stored.body.update(encoding.loads(body))
        else:
            self._fail()
        self._over()

    def respond_in_part(self, status: int, part: bytes, length: int) -> None:
        """Fail the response: an answer that breaks off is not kept."""
        self.cut()

    def start_stream(self, content_type: str = "text/event-stream; charset=utf-8") -> None:
        """Begin a stream of events."""
        self._stored.body["status"] = "in_progress"

    def write(self, data: bytes) -> None:
        """Keep an event."""
        if not self._stored.over:
            self._stored.events.append(data)
            self._changed()

    def raw(self, data: bytes) -> None:
        """Drop bytes that are no event."""

    def end_stream(self) -> None:
        """End the stream: it is whole."""
        last = self._stored.events[-1].partition(b"data: ")[2]
        self._stored.body.update(encoding.loads(last)["response"])
        self._over()

    def cut(self, *, polite: bool = False) -> None:
        """Fail the response: the answer broke off."""
        self._fail()
        self._over()

    def _fail(self) -> None:
        if not self._stored.over:
            self._stored.body["status"] = "failed"

    def _over(self) -> None:
        self._stored.over = True
        self._changed()
