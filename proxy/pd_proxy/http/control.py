"""The HTTP client of the control plane: the one way to ask an engine anything aside from a request's legs.

Probes, models, versions, what connectors have to know of an engine, orders of operators, stored responses. An engine
may be broken, slow or hostile, and whoever asks must not suffer for it. httpx carries the exchange, and each one is
bounded here: in time as a whole, and in the bytes of its body; httpx bounds those of its head. No encoding is
accepted, since a small answer could inflate to any size, and no redirect is followed, since the fleet says where
engines are.

Each request has a connection of its own. Whether a new one can be made is a part of what a probe is to find out.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpx
import msgspec

from pd_proxy.errors import BackendCut, BackendError, BackendGarbled, BackendTimedOut, BackendUnreachable

MOST_BODY = 4 * 1024 * 1024
"""Bytes of an answer's body, where nothing else is said: a list of some thousand adapters, a long page of metrics."""
_OWN_CONNECTION = httpx.Limits(max_keepalive_connections=0)


class Answer(msgspec.Struct, frozen=True):
    """What an engine answered.

    Attributes:
        headers: names in lower case; of repeated ones the last.
        body: empty for an answer whose body is read piece by piece.
    """

    status: int
    headers: Mapping[bytes, bytes]
    body: bytes = b""

    @property
    def type(self) -> bytes:
        """Its media type, in lower case and without parameters."""
        return self.headers.get(b"content-type", b"").partition(b";")[0].strip().lower()


def refuse_encoded(encoding: bytes) -> None:
    """Check the content-encoding of an answer: no request accepts one, since a small answer could inflate to any size.

    Raises:
        BackendGarbled
    """
    encoding = encoding.strip().lower()
    if encoding not in (b"", b"identity"):
        raise BackendGarbled(f"its answer is encoded ({encoding[:32].decode('latin-1')!r}), which was not asked for")


class Control:
    """Asks engines.

    Certificates are those that the system trusts, as on the legs; they are loaded when the first https backend is
    asked, since most fleets have none and they cost a gateway 2 MB and a tenth of its start.

    Arguments:
        timeout: seconds that an exchange may take in all, connecting included, where nothing else is said.
        headers: what every request carries, as whole lines, each ending in CRLF.
    """

    def __init__(self, timeout: float, headers: bytes = b"") -> None:
        self.timeout = timeout
        lines = [line.partition(b":") for line in headers.split(b"\r\n") if line]
        self._headers = {name: value.strip() for name, _, value in lines}

    @cached_property
    def trust(self) -> ssl.SSLContext:
        """What certificates are checked against."""
        return ssl.create_default_context()

    @cached_property
    def _plain(self) -> httpx.AsyncClient:
        return self._client(httpx.AsyncHTTPTransport(verify=False, limits=_OWN_CONNECTION, trust_env=False))

    @cached_property
    def _secure(self) -> httpx.AsyncClient:
        return self._client(httpx.AsyncHTTPTransport(verify=self.trust, limits=_OWN_CONNECTION, trust_env=False))

    def _client(self, transport: httpx.AsyncBaseTransport) -> httpx.AsyncClient:
        headers = {b"accept-encoding": b"identity", b"connection": b"close", **self._headers}
        # trust_env: engines are neighbours; an HTTP_PROXY variable is not meant for them.
        return httpx.AsyncClient(transport=transport, headers=headers, follow_redirects=False, trust_env=False)

    async def ask(
        self,
        url: str,
        *,
        method: str = "GET",
        query: Mapping[str, Any] | None = None,
        body: bytes = b"",
        seconds: float | None = None,
        limit: int = MOST_BODY,
        socket: Path | None = None,
    ) -> Answer:
        """One exchange.

        Arguments:
            query: strings, numbers, and lists of them.
            body: JSON, where there is any.
            seconds: that it may take in all, connecting included.
            limit: bytes of the answer's body.
            socket: of a process of this machine, to be reached there instead of at the URL's host.
        Raises:
            BackendUnreachable, BackendTimedOut, BackendCut, BackendGarbled: the message says why, and not of whom.
        """
        seconds = self.timeout if seconds is None else seconds
        try:
            async with asyncio.timeout(seconds):
                timeout = httpx.Timeout(None, connect=min(seconds, self.timeout))
                async with self._exchange(url, method, query, body, timeout, socket) as answer:
                    pieces, size = [], 0
                    async for piece in answer.aiter_raw():
                        size += len(piece)
                        if size > limit:
                            raise BackendGarbled(f"it answered with more than {limit} bytes")
                        pieces.append(piece)
                    return Answer(answer.status_code, _headers(answer), b"".join(pieces))
        except TimeoutError:
            raise BackendTimedOut(f"no whole answer within {seconds:g} s") from None

    @asynccontextmanager
    async def stream(
        self, url: str, *, query: Mapping[str, Any] | None = None, idle: float
    ) -> AsyncIterator[tuple[Answer, AsyncIterator[bytes]]]:
        """An exchange whose body is of any length: its head, and the pieces of the body as they come. While they are
        not taken, the engine waits.

        Arguments:
            idle: seconds of silence after which it is given up.
        Raises:
            BackendError: as `ask`; the iterator likewise.
        """
        timeout = httpx.Timeout(idle, connect=min(idle, self.timeout))
        exchange = self._exchange(url, "GET", query, b"", timeout)
        try:
            async with asyncio.timeout(idle):
                answer = await exchange.__aenter__()
        except TimeoutError:
            raise BackendTimedOut(f"no answer within {idle:g} s") from None

        async def pieces() -> AsyncIterator[bytes]:
            with _translated():
                async for piece in answer.aiter_raw():
                    yield piece

        try:
            yield Answer(answer.status_code, _headers(answer)), pieces()
        finally:
            await exchange.__aexit__(None, None, None)

    @asynccontextmanager
    async def _exchange(
        self,
        url: str,
        method: str,
        query: Mapping[str, Any] | None,
        body: bytes,
        timeout: httpx.Timeout,
        socket: Path | None = None,
    ) -> AsyncIterator[httpx.Response]:
        """A request, and its answer up to the body.

        Raises:
            BackendError
        """
        if query:
            url += ("&" if "?" in url else "?") + urlencode(query, doseq=True)
        headers = {"content-type": "application/json"} if body else None
        if socket is None:
            client = self._secure if url.startswith("https:") else self._plain
        else:
            client = self._client(httpx.AsyncHTTPTransport(uds=str(socket), limits=_OWN_CONNECTION, trust_env=False))
        with _translated():
            request = client.build_request(method, url, content=body or None, headers=headers, timeout=timeout)
            answer = await client.send(request, stream=True)
            try:
                refuse_encoded(answer.headers.get("content-encoding", "").encode("latin-1"))
                if answer.status_code < 200:
                    raise BackendGarbled("it wanted to switch protocols")
                yield answer
            finally:
                await answer.aclose()


def _headers(answer: httpx.Response) -> dict[bytes, bytes]:
    return {name.lower(): value for name, value in answer.headers.raw}


@contextmanager
def _translated() -> Iterator[None]:
    """httpx's errors as ours."""
    try:
        yield
    except BackendError:
        raise
    except httpx.ConnectTimeout as error:
        raise BackendUnreachable("no connection in time") from error
    except httpx.ConnectError as error:
        raise BackendUnreachable(_why(error)) from error
    except httpx.TimeoutException as error:
        raise BackendTimedOut("it fell silent") from error
    except httpx.RemoteProtocolError as error:
        # httpx has one error for a connection that ends too soon and for what is no HTTP.
        if "without sending" in str(error):
            raise BackendCut("the connection ended") from error
        raise BackendGarbled(f"it did not speak HTTP: {error}") from error
    except (httpx.UnsupportedProtocol, httpx.InvalidURL, UnicodeError) as error:
        raise BackendUnreachable(str(error)) from error
    except httpx.HTTPError as error:
        raise BackendCut(str(error) or "the connection ended") from error


def _why(error: BaseException) -> str:
    """What a failed connection says, in few words and without its address: the system's own error knows best."""
    found, inner = error, error.__cause__
    seen = {id(error)}  # of two exceptions, each may be the other's cause
    while inner is not None and id(inner) not in seen:
        seen.add(id(inner))
        if isinstance(inner, OSError):
            found = inner
        inner = inner.exceptions[0] if isinstance(inner, BaseExceptionGroup) else inner.__cause__
    return str(getattr(found, "strerror", None) or str(found) or type(found).__name__)
