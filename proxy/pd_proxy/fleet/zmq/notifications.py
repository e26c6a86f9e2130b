"""Transfer notifications: prefill engines report that a KV cache has arrived at its decode engine.

LMCache's senders push one for each tensor-parallel rank, a msgpack map `{"type": "ProxyNotif", "req_id": "…"}`, before
or after their HTTP answer. A decode leg that begins earlier reads memory that is reserved for the cache and not written
yet, and its answer is wrong.

Only the id in a notification shows that it is genuine: it is new for each try, and known to its engines alone. A
notification that no try waits for is counted and ignored.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence
from types import TracebackType
from typing import Annotated, Literal

import msgspec

from pd_proxy.decoding import Undecodable, msgpack_decoder
from pd_proxy.errors import BackendError
from pd_proxy.fleet.zmq.listener import ZmqListener

log = logging.getLogger("pd_proxy.fleet")


class ProxyNotif(msgspec.Struct):
    """One rank of prefill has written its part of a request's KV cache."""

    type: Literal["ProxyNotif"]
    req_id: Annotated[str, msgspec.Meta(min_length=1, max_length=128)]


_read = msgpack_decoder(ProxyNotif)


class Expected:
    """The notifications of one try. It is a context manager: notifications that come after its end are unexpected.

    Arguments:
        name: the id in the notifications.
        missing: how many are to come.
    Attributes:
        missing: how many have not come yet.
    """

    __slots__ = ("_done", "_name", "_notifications", "missing")

    def __init__(self, notifications: TransferNotifications, name: str, missing: int) -> None:
        self._notifications = notifications
        self._name = name
        self.missing = missing
        self._done: asyncio.Future[None] | None = None

    def __enter__(self) -> Expected:
        self._notifications.waiting[self._name] = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._notifications.waiting.pop(self._name, None)

    def came(self) -> None:
        """Note that one of them has come."""
        self.missing -= 1
        if self._done is not None and self.missing <= 0 and not self._done.done():
            self._done.set_result(None)

    def lost(self, error: BackendError) -> None:
        """Let the wait fail: the engine that was to send them has failed."""
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)

    async def all(self, seconds: float) -> bool:
        """Wait until all of them have come; returns whether they came within `seconds`.

        Raises:
            BackendError: the error that `lost` was called with.
        """
        if self.missing <= 0:
            return True
        self._done = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(seconds):
                await self._done
        except TimeoutError:
            return False
        return True


class TransferNotifications:
    """The notifications that tries wait for, and the socket on which they come.

    Arguments:
        address: `host:port` to listen on; empty if no notifications are expected.
    Attributes:
        waiting: by the id in the notifications; there are as many as tries between their prefill leg's start and end.
        counts: the number of notifications by outcome: `taken`, `unexpected` or `garbage`.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._listener: ZmqListener | None = None
        self.waiting: dict[str, Expected] = {}
        self.counts: Counter[str] = Counter()

    def start(self) -> None:
        """Listen, if there is an address. It does nothing if called again.

        Raises:
            CannotListen
        """
        if self._address and self._listener is None:
            self._listener = ZmqListener("PULL", self._address, self.listen)

    def close(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def expect(self, name: str, count: int) -> Expected:
        """Expect `count` notifications with the id `name`, from the start of the returned context on."""
        return Expected(self, name, count)

    def listen(self, parts: Sequence[bytes]) -> None:
        """Handle a message, from any sender."""
        try:
            if len(parts) != 1:
                raise Undecodable("a notification has one part")
            notification = _read(parts[0])
        except Undecodable as error:
            self.counts["garbage"] += 1
            log.debug("a message that is not a notification: %s", error)
            return
        expected = self.waiting.get(notification.req_id)
        if expected is None:
            self.counts["unexpected"] += 1
            log.debug("a notification that no request waits for: %r", notification.req_id)
            return
        self.counts["taken"] += 1
        expected.came()
