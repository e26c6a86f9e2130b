"""Stored responses: asked for, and cancelled, at the backend that has them.

These are not generation: one upstream request, nothing to retry elsewhere, since nobody else has the response.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Annotated

import httpx
from fastapi import APIRouter, Query, Request
from starlette.background import BackgroundTask
from starlette.responses import Response, StreamingResponse

from proxy.api.credentials import Credentials
from proxy.api.error_shapes import RESPONSES
from proxy.api.inference import not_stored
from proxy.decoding import Undecodable
from proxy.errors import BackendCut, BackendError, BackendGarbled, BackendTimedOut, BackendUnreachable, NoBackend
from proxy.fleet.fleet import Fleet
from proxy.flow.stored import StoredResponses
from proxy.handoff.endpoints import LAYOUTS
from proxy.relay import events
from proxy.relay.answers import engine_error, strip_handoff
from proxy.relay.dialects import DIALECTS
from proxy.relay.edit import HANDOFF_MARK
from proxy.settings import Settings

_PATH = LAYOUTS["responses"].path
_DIALECT = DIALECTS["responses"]


def responses(
    settings: Settings, fleet: Fleet, stored: StoredResponses, credentials: Credentials, http: httpx.AsyncClient
) -> APIRouter:
    """`GET /v1/responses/{id}`, streamed or not, and `POST /v1/responses/{id}/cancel`."""
    router = APIRouter(tags=["responses"])
    patience = httpx.Timeout(settings.timeouts.idle, connect=settings.timeouts.connect)

    def holder(request: Request, response_id: str) -> str:
        """URL of the backend that has it."""
        headers = request.headers
        name = credentials.check_client(
            headers.get("authorization", "").encode("latin-1"), headers.get("x-api-key", "").encode("latin-1")
        )
        url = stored.holder(response_id, name, (backend.url for backend in fleet))
        if not url:
            raise not_stored(response_id, param="response_id")
        if not any(backend.url == url and backend.up for backend in fleet):
            raise NoBackend("the backend that has this response is not up", retry_after=1)
        return url

    async def ask(url: str, method: str, path: str, query: dict[str, str | int]) -> httpx.Response:
        """The head of a backend's answer, which was a 200.

        Raises:
            BackendError: it was none.
        """
        request = http.build_request(method, url + path, params=query, timeout=patience)
        try:
            answer = await http.send(request, stream=True)
            if answer.status_code == 200:
                return answer
            async with aclosing(answer):
                body = await answer.aread()
        except httpx.HTTPError as error:
            raise _translated(url, error) from error
        headers = {name.lower(): value for name, value in answer.headers.raw}
        raise engine_error(url, answer.status_code, headers, body)

    async def whole(url: str, answer: httpx.Response) -> Response:
        try:
            async with aclosing(answer):
                body = await answer.aread()
        except httpx.HTTPError as error:
            raise _translated(url, error) from error
        return Response(strip_handoff(body), media_type="application/json")

    async def relayed(url: str, answer: httpx.Response) -> AsyncIterator[bytes]:
        """Events for the client. A stream that breaks ends with an error."""
        reader = events.EventReader()
        sequence = -1
        done = False
        try:
            async for data in answer.aiter_raw():
                for event, payload in events.read(reader.feed(data)):
                    if payload:
                        named = _DIALECT.read(payload)
                        sequence = max(sequence, named.sequence_number)
                        done = done or named.type in _DIALECT.last | _DIALECT.failed
                        if HANDOFF_MARK in event:
                            event = _DIALECT.stripped(named.type, payload)
                    yield event
            if not done:
                raise BackendCut(f"{url} ended its stream before its last event")
        except httpx.HTTPError as error:
            yield RESPONSES.event(_translated(url, error), sequence)
        except Undecodable as error:
            yield RESPONSES.event(BackendGarbled(f"{url} sent what cannot be read: {error}"), sequence)
        except BackendError as error:
            yield RESPONSES.event(error, sequence)

    @router.get(_PATH + "/{response_id}", response_class=Response)
    async def retrieve(
        request: Request,
        response_id: str,
        stream: Annotated[bool, Query(description="its events, where it runs in the background")] = False,
        starting_after: Annotated[
            int | None, Query(description="`sequence_number` of the last event not wanted")
        ] = None,
    ) -> Response:
        """A stored response, from the backend that has it."""
        url = holder(request, response_id)
        query: dict[str, str | int] = {"stream": "true"} if stream else {}
        if starting_after is not None:
            query["starting_after"] = starting_after
        answer = await ask(url, "GET", f"{_PATH}/{response_id}", query)
        if not stream:
            return await whole(url, answer)
        return StreamingResponse(
            relayed(url, answer),
            media_type="text/event-stream",
            headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
            background=BackgroundTask(answer.aclose),
        )

    @router.post(_PATH + "/{response_id}/cancel", response_class=Response)
    async def cancel(request: Request, response_id: str) -> Response:
        """End a response that runs in the background."""
        url = holder(request, response_id)
        return await whole(url, await ask(url, "POST", f"{_PATH}/{response_id}/cancel", {}))

    return router


def _translated(url: str, error: httpx.HTTPError) -> BackendError:
    """What an HTTP client's error says of a backend."""
    if isinstance(error, httpx.TimeoutException):
        return BackendTimedOut(f"{url} did not answer in time")
    if isinstance(error, httpx.ConnectError):
        return BackendUnreachable(f"{url}: {error}")
    return BackendCut(f"{url} broke off: {error}")
