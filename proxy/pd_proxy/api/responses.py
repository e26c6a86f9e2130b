"""Stored responses: retrieved and cancelled at the backend that has them.

Each is one request to one backend, without retries, since no other backend has the response.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.background import BackgroundTask
from starlette.responses import Response, StreamingResponse

from pd_proxy.api.credentials import Credentials
from pd_proxy.api.error_shapes import RESPONSES
from pd_proxy.api.inference import not_stored
from pd_proxy.decoding import Undecodable
from pd_proxy.dialects import sse as events
from pd_proxy.dialects.engine_errors import engine_error
from pd_proxy.dialects.responses import RESPONSES as EVENTS
from pd_proxy.dialects.strip import strip_event, strip_handoff
from pd_proxy.errors import BackendCut, BackendError, BackendGarbled, BackendTimedOut, NoBackend
from pd_proxy.fleet.fleet import Fleet
from pd_proxy.flow.stored_responses import StoredResponses
from pd_proxy.http.control import Answer, Control
from pd_proxy.requests.endpoints import LAYOUTS
from pd_proxy.settings.tree import Settings

_PATH = LAYOUTS["responses"].path
ABSENT = frozenset({f"{_PATH}/compact", f"{_PATH}/input_tokens"})
"""Paths of OpenAI's API that no engine has. They are not the names of stored responses."""
_MOST_REFUSAL = 64 * 1024  # bytes of an error answer that are read where a stream was asked for


class _Holders:
    """Sends requests to the backends that have stored responses."""

    def __init__(
        self, settings: Settings, fleet: Fleet, stored: StoredResponses, credentials: Credentials, control: Control
    ) -> None:
        self._idle, self._limit = settings.timeouts.idle, settings.limits.answer
        self._fleet = fleet
        self._stored = stored
        self._credentials = credentials
        self._control = control

    def holder(self, request: Request, response_id: str) -> str:
        """The URL of the backend that has a response. Checks the client's key.

        Raises:
            Unauthorized, ResponseNotFound, NoBackend
        """
        headers = request.headers
        name = self._credentials.check_client(
            headers.get("authorization", "").encode("latin-1"), headers.get("x-api-key", "").encode("latin-1")
        )
        url = self._stored.holder(response_id, name, (backend.url for backend in self._fleet))
        if not url:
            raise not_stored(response_id, param="response_id")
        if not any(backend.url == url and backend.up for backend in self._fleet):
            raise NoBackend("the backend that has this response is not up", retry_after=1)
        return url

    async def whole(self, url: str, method: str, path: str, query: dict[str, str | int]) -> Response:
        """The backend's answer in one piece."""
        try:
            answer = await self._control.ask(
                url + path, method=method, query=query, seconds=self._idle, limit=self._limit
            )
        except BackendError as error:
            raise _named(url, error) from error
        try:
            return Response(strip_handoff(_good(url, answer).body), media_type="application/json")
        except Undecodable as error:
            raise BackendGarbled(f"{url} sent what cannot be read: {error}") from None

    async def streamed(self, url: str, path: str, query: dict[str, str | int]) -> Response:
        """The backend's answer as a stream of events."""
        async with AsyncExitStack() as stack:
            try:
                head, pieces = await stack.enter_async_context(
                    self._control.stream(url + path, query=query, idle=self._idle)
                )
                if head.status != 200:
                    body = b""
                    async with asyncio.timeout(self._idle):
                        async for piece in pieces:
                            body += piece
                            if len(body) > _MOST_REFUSAL:
                                break
                    head = Answer(head.status, head.headers, body)
            except TimeoutError:
                raise BackendTimedOut(f"{url}: no whole answer within {self._idle:g} s") from None
            except BackendError as error:
                raise _named(url, error) from error
            _good(url, head)
            kept = stack.pop_all()
        return StreamingResponse(
            _relayed(url, pieces),
            media_type="text/event-stream",
            headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
            background=BackgroundTask(kept.aclose),
        )


def responses(
    settings: Settings, fleet: Fleet, stored: StoredResponses, credentials: Credentials, control: Control
) -> APIRouter:
    """The routes `GET /v1/responses/{id}`, streamed or not, and `POST /v1/responses/{id}/cancel`."""
    router = APIRouter(tags=["responses"])
    holders = _Holders(settings, fleet, stored, credentials, control)

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
        url = holders.holder(request, response_id)
        query: dict[str, str | int] = {"stream": "true"} if stream else {}
        if starting_after is not None:
            query["starting_after"] = starting_after
        path = f"{_PATH}/{response_id}"
        return await holders.streamed(url, path, query) if stream else await holders.whole(url, "GET", path, query)

    @router.post(_PATH + "/{response_id}/cancel", response_class=Response)
    async def cancel(request: Request, response_id: str) -> Response:
        """Cancel a response that runs in the background."""
        url = holders.holder(request, response_id)
        return await holders.whole(url, "POST", f"{_PATH}/{response_id}/cancel", {})

    return router


def _good(url: str, answer: Answer) -> Answer:
    """A backend's answer, whose status has to be 200.

    Raises:
        BackendError: the status is another.
    """
    if answer.status != 200:
        raise engine_error(url, answer.status, dict(answer.headers), answer.body)
    return answer


async def _relayed(url: str, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The events for the client. Where the backend's stream breaks, the last one is an error event."""
    reader = events.EventReader()
    sequence = -1
    done = False
    try:
        async for data in pieces:
            for event, payload in events.read(reader.feed(data)):
                if payload:
                    named = EVENTS.read(payload)
                    sequence = max(sequence, named.sequence_number)
                    done = done or named.type in EVENTS.last | EVENTS.failed
                    event = strip_event(event, payload, named.type.encode())
                yield event
        if not done:
            raise BackendCut(f"{url} ended its stream before its last event")
    except Undecodable as error:
        yield RESPONSES.event(BackendGarbled(f"{url} sent what cannot be read: {error}"), sequence)
    except BackendError as error:
        yield RESPONSES.event(_named(url, error), sequence)


def _named(url: str, error: BackendError) -> BackendError:
    """An error of `Control`, with the backend's URL, which its message lacks."""
    return type(error)(f"{url}: {error}")
