"""A control plane's client whose answers are mocked at httpx's edge, with respx."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx

from proxy.errors import BackendCut, BackendTimedOut, BackendUnreachable
from proxy.fleet.control import Answer, Control


class Mocked(Control):
    """Asks what respx mocks. To be used in a running event loop."""

    def __init__(self, timeout: float = 0.05) -> None:
        super().__init__(timeout)
        self._http = httpx.AsyncClient()

    async def ask(
        self, url: str, *, method: str = "GET", query: Mapping[str, Any] | None = None, **more: Any
    ) -> Answer:
        try:
            answer = await self._http.request(method, url, params=query)
        except httpx.TimeoutException:
            raise BackendTimedOut("no whole answer in time") from None
        except httpx.ConnectError as error:
            raise BackendUnreachable(str(error)) from None
        except httpx.HTTPError as error:
            raise BackendCut(str(error) or "the connection ended") from None
        headers = {name.lower(): value for name, value in answer.headers.raw}
        return Answer(answer.status_code, headers, answer.content)
