"""Notices by which prefill engines say that a KV cache has arrived at its decode engine.

LMCache's senders push one for each tensor-parallel rank, a msgpack map `{"type": "ProxyNotif", "req_id": "…"}`, before
or after their HTTP answer. Decode that begins earlier finds memory that is set aside for the cache and not written yet,
and answers wrong.

Nobody vouches for a notice but the id in it, which is new for each try and known to its engines alone. What nobody
waits for (any more) is counted and forgotten.
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
    """The notices of one try. A context manager: nobody waits for them once it is left.

    Arguments:
        missing: how many are to come.
    """

    __slots__ = ("_done", "_name", "_notices", "missing")

    def __init__(self, notices: TransferNotifications, name: str, missing: int) -> None:
        self._notices = notices
        self._name = name
        self.missing = missing
        self._done: asyncio.Future[None] | None = None

    def __enter__(self) -> Expected:
        self._notices.waiting[self._name] = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._notices.waiting.pop(self._name, None)

    def came(self) -> None:
        """One of them is here."""
        self.missing -= 1
        if self._done is not None and self.missing <= 0 and not self._done.done():
            self._done.set_result(None)

    def lost(self, error: BackendError) -> None:
        """Whoever was to send them has gone."""
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)

    async def all(self, seconds: float) -> bool:
        """Wait until all of them are here; whether they came within so many seconds.

        Raises:
            BackendError: what was given to `lost`.
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
    """Who waits for notices, and the socket they come by.

    Attributes:
        waiting: by the name that is in the notices; as many as tries are between their prefill leg's start and end.
        counts: how many notices came: `taken`, `unexpected` or `garbage`.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._listener: ZmqListener | None = None
        self.waiting: dict[str, Expected] = {}
        self.counts: Counter[str] = Counter()

    def start(self) -> None:
        """Hear them, where there is an address to hear them at, and that is not done yet.

        Raises:
            CannotHear
        """
        if self._address and self._listener is None:
            self._listener = ZmqListener("PULL", self._address, self.listen)

    def close(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def expect(self, name: str, count: int) -> Expected:
        """`count` notices with a name, from now on."""
        return Expected(self, name, count)

    def listen(self, parts: Sequence[bytes]) -> None:
        """A message has come, whoever sent it."""
        try:
            if len(parts) != 1:
                raise Undecodable("a notice has one part")
            notice = _read(parts[0])
        except Undecodable as error:
            self.counts["garbage"] += 1
            log.debug("no notice: %s", error)
            return
        expected = self.waiting.get(notice.req_id)
        if expected is None:
            self.counts["unexpected"] += 1
            log.debug("a notice that nobody waits for: %r", notice.req_id)
            return
        self.counts["taken"] += 1
        expected.came()
