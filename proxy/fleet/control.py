"""The HTTP client of the control plane: probes, what backends say of themselves, and orders to them.

Certificates are those that the system trusts, as on the legs; they are loaded when the first https backend is asked,
since most fleets have none and they cost a gateway 2 MB and a tenth of its start.
"""

from __future__ import annotations

import ssl

import httpx


class _Https(httpx.AsyncBaseTransport):
    """A transport that is made when it is first used."""

    def __init__(self) -> None:
        self._transport: httpx.AsyncHTTPTransport | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if self._transport is None:
            self._transport = httpx.AsyncHTTPTransport(verify=ssl.create_default_context(), trust_env=False)
        return await self._transport.handle_async_request(request)

    async def aclose(self) -> None:
        if self._transport is not None:
            await self._transport.aclose()


def control_client(timeout: float, key: str | None) -> httpx.AsyncClient:
    """A client for a fleet's backends.

    Arguments:
        timeout: seconds that a connection and each read may take.
        key: what backends ask for as a bearer token, or None.
    """
    return httpx.AsyncClient(
        timeout=timeout,
        headers={"authorization": f"Bearer {key}"} if key else None,
        trust_env=False,  # backends are neighbours; an HTTP_PROXY variable is not meant for them
        verify=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),  # for http; it trusts nobody
        mounts={"https://": _Https()},
    )
