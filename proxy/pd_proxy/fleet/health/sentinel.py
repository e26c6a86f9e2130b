"""One connection to an engine that is held open, and what was learnt over it, which holds as long as it does.

A process that ends takes its connections with it, and its kernel says so before another can listen in its place. So
while the connection is open the engine is the one that was asked, whatever it has been before or will be. Asking from
time to time would leave a gap in which an engine may have been started anew with another block size.

An engine closes a connection that is idle for long (vLLM after 5 s); each health check asks for something over it.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable

from pd_proxy.errors import BackendError
from pd_proxy.http.exchange import Address, Wire, connect


class SentinelClosed(Exception):
    """The connection could not be made, or is over; the text says why."""


class Sentinel:
    """A connection for requests one after the other.

    Arguments:
        on_lost: called once when the connection ends, by whatever hand but `close`.
    """

    def __init__(self, url: str, headers: bytes, on_lost: Callable[[], object]) -> None:
        self._url, self._headers = url, headers
        self._wire = Wire(on_lost)

    @classmethod
    async def connect(
        cls,
        url: str,
        headers: bytes,
        on_lost: Callable[[], object],
        seconds: float,
        trust: Callable[[], ssl.SSLContext] = ssl.create_default_context,
    ) -> Sentinel:
        """Connect.

        Arguments:
            headers: whole lines, each ending in CRLF.
            trust: gives what certificates are checked against, where the URL is of https.
        Raises:
            TetherBroken: it did not come about within `seconds`.
        """
        sentinel = cls(url, headers, on_lost)
        try:
            await connect(sentinel._wire, url, seconds, trust)
        except BackendError as error:
            sentinel.close()
            raise SentinelClosed(str(error)) from None
        return sentinel

    @property
    def holds(self) -> bool:
        """Whether the connection is open."""
        return self._wire.holds

    async def ask(self, path: str, seconds: float) -> tuple[int, bytes]:
        """GET something: status and body.

        Raises:
            TetherBroken: there was no whole answer within `seconds`. The connection is over then.
        """
        try:
            async with asyncio.timeout(seconds):
                answer = await self._wire.ask(Address.of(self._url).request("GET", path, self._headers))
        except TimeoutError:
            raise SentinelClosed(f"{path} was not answered in time") from None
        except BackendError as error:
            raise SentinelClosed(str(error)) from None
        return answer.status, answer.body

    def close(self) -> None:
        """End the connection; nobody is told."""
        self._wire.close()
