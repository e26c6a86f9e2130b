"""The HTTP client of the control plane, for requests to engines that are not a leg of a client's request.

It serves probes, pages about models and versions, what connectors have to know of an engine, operators' orders and
stored responses. An engine may be broken, slow or hostile, and must not harm the gateway by it. So each exchange is
bounded: in time as a whole, and in the bytes of its body; httpx bounds the bytes of its head. No content coding is
accepted, since a small answer could inflate to any size. No redirect is followed, since only the fleet says where
engines are.

This client is not built on `connection.py`, since httpx has what it needs: any method and query, Unix sockets, and a
connection for each request, since a probe also finds out whether a new connection can be made.
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
"""Bytes of an answer's body, unless the caller sets another limit: enough for a list of some thousand adapters, or for
a long page of metrics."""
_OWN_CONNECTION = httpx.Limits(max_keepalive_connections=0)


class Answer(msgspec.Struct, frozen=True):
    """An engine's answer.

    Attributes:
        headers: names in lower case; of repeated headers the last.
        body: empty if the body is read piece by piece (`Control.stream`).
    """

    status: int
    headers: Mapping[bytes, bytes]
    body: bytes = b""

    @property
    def type(self) -> bytes:
        """The media type, in lower case and without parameters."""
        return self.headers.get(b"content-type", b"").partition(b";")[0].strip().lower()


def refuse_encoded(encoding: bytes) -> None:
    """Check the content-encoding header of an answer: the gateway's requests accept none.

    Raises:
        BackendGarbled
    """
    encoding = encoding.strip().lower()
    if encoding not in (b"", b"identity"):
        raise BackendGarbled(f"its answer is encoded ({encoding[:32].decode('latin-1')!r}), which was not asked for")


class Control:
    """Sends requests to engines.

    Certificates are checked against those that the system trusts, as on the legs. These are loaded when the first https
    backend is asked, since most fleets have no such backend, and they cost a gateway 2 MB and a tenth of its start.

    Arguments:
        timeout: seconds that an exchange may take in all, including the time to connect, unless the caller sets another
            limit.
        headers: those of every request, as whole lines, each ending in CRLF.
    """

    def __init__(self, timeout: float, headers: bytes = b"") -> None:
        self.timeout = timeout
        lines = [line.partition(b":") for line in headers.split(b"\r\n") if line]
        self._headers = {name: value.strip() for name, _, value in lines}

    @cached_property
    def trust(self) -> ssl.SSLContext:
        """The certificates that those of engines are checked against."""
        return ssl.create_default_context()

    @cached_property
    def _plain(self) -> httpx.AsyncClient:
        return self._client(httpx.AsyncHTTPTransport(verify=False, limits=_OWN_CONNECTION, trust_env=False))

    @cached_property
    def _secure(self) -> httpx.AsyncClient:
        return self._client(httpx.AsyncHTTPTransport(verify=self.trust, limits=_OWN_CONNECTION, trust_env=False))

    def _client(self, transport: httpx.AsyncBaseTransport) -> httpx.AsyncClient:
        headers = {b"accept-encoding": b"identity", b"connection": b"close", **self._headers}
        # trust_env: engines are on the gateway's own network, and an HTTP_PROXY variable is not meant for them.
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
        """Send a request and read the whole answer.

        Arguments:
            query: strings, numbers, and lists of them.
            body: JSON, or empty.
            seconds: that the exchange may take in all, including the time to connect.
            limit: bytes of the answer's body.
            socket: the Unix socket of a process on this machine, which is used instead of the URL's host.
        Raises:
            BackendUnreachable, BackendTimedOut, BackendCut, BackendGarbled: the message says why, without the address.
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
        """Send a request whose answer may be of any length; returns the head, and the pieces of the body as they come.
        The engine waits while they are not read.

        Arguments:
            idle: seconds of silence after which the exchange fails.
        Raises:
            BackendError: as by `ask`; also raised by the iterator.
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
        """Send a request and read the head of its answer.

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
    """Translate the errors of httpx."""
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
        # httpx has one error for a connection that ends too soon and for an answer that is not HTTP.
        if "without sending" in str(error):
            raise BackendCut("the connection ended") from error
        raise BackendGarbled(f"it did not speak HTTP: {error}") from error
    except (httpx.UnsupportedProtocol, httpx.InvalidURL, UnicodeError) as error:
        raise BackendUnreachable(str(error)) from error
    except httpx.HTTPError as error:
        raise BackendCut(str(error) or "the connection ended") from error


def _why(error: BaseException) -> str:
    """Why a connection failed, in few words and without its address: the message of the innermost system error."""
    found, inner = error, error.__cause__
    seen = {id(error)}  # two exceptions may be each other's cause
    while inner is not None and id(inner) not in seen:
        seen.add(id(inner))
        if isinstance(inner, OSError):
            found = inner
        inner = inner.exceptions[0] if isinstance(inner, BaseExceptionGroup) else inner.__cause__
    return str(getattr(found, "strerror", None) or str(found) or type(found).__name__)
