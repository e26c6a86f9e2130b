"""A whole HTTP surface as one ASGI application: FastAPI, with the hot routes served before its router."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from contextlib import AbstractAsyncContextManager
from time import monotonic
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pd_proxy import __version__
from pd_proxy.api import docs_page as page
from pd_proxy.api.cross_origin import CrossOrigin
from pd_proxy.api.document import complete
from pd_proxy.api.exchange import no_route
from pd_proxy.api.responses import ABSENT
from pd_proxy.errors import (
    BodyTooLarge,
    GatewayError,
    InvalidRequest,
    LoopDetected,
    MethodNotAllowed,
    RequestTimedOut,
)
from pd_proxy.flow.hops import HEADER, Hops
from pd_proxy.flow.request import new_id
from pd_proxy.workers.peers import PeerWorkers

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


class Surface(FastAPI):
    """FastAPI for everything but the hot routes, which are found by one dictionary lookup.

    Arguments:
        hot: the ASGI applications of the hot routes, by path. They bound the bodies that they read. The gateway's own
            server calls them directly, by the attribute `direct`.
        offered: returns the paths that some engine has; errors and lists name these of `hot` and `rare` only.
        rare: applications as in `hot`, for requests that need their whole scope.
        routers: makes the other routes, whose bodies are bounded here. It is called by `make_routes`.
        body_seconds: seconds in which such a body must arrive.
        peers: the other workers of the gateway, which repeat every request that changes the gateway.
        cross_origin: the permissions of web pages of other origins; None: they have none.
        hops: recognises requests that this gateway has sent.
        docs: serve the OpenAPI document, and a page that shows it.
        bodies: the longest body of some paths, in bytes; on other paths it is 1 MiB.
    """

    def __init__(
        self,
        *,
        hot: dict[str, ASGIApp],
        routers: Callable[[], list[APIRouter]],
        rare: dict[str, ASGIApp] | None = None,
        offered: Callable[[], AbstractSet[str]] | None = None,
        lifespan: Lifespan | None = None,
        body_seconds: float = 60.0,
        peers: PeerWorkers | None = None,
        cross_origin: CrossOrigin | None = None,
        hops: Hops | None = None,
        docs: bool = False,
        bodies: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(
            title="pd-proxy",
            version=__version__,
            description="A prefill-decode disaggregation gateway for LLM serving.",
            lifespan=lifespan,
            redirect_slashes=False,
            openapi_url="/openapi.json" if docs else None,
            docs_url=None,  # FastAPI's pages load their scripts from other hosts
            redoc_url=None,
        )
        if docs:
            for path in ("/docs", "/redoc"):
                self.add_route(path, _docs)
        self._for_pages: ASGIApp | None = None
        if cross_origin is not None:
            hot = {path: cross_origin.around(app) for path, app in hot.items()}
            rare = {path: cross_origin.around(app) for path, app in (rare or {}).items()}
            self._for_pages = cross_origin.around(self._serve)
        self._hot = {**hot, **(rare or {})}
        self.direct = {path.encode("ascii"): app for path, app in hot.items()}
        self._offered = offered or hot.keys
        self._body_seconds = body_seconds
        self._bodies = bodies or {}
        self._peers = peers
        self._hops = hops
        self._own_paths: set[str] | None = None
        self.page: str | None = None
        self._routers: Callable[[], list[APIRouter]] | None = routers
        self.add_exception_handler(GatewayError, _gateway_error)
        self.add_exception_handler(HTTPException, _http_error)
        self.add_exception_handler(RequestValidationError, _validation_error)
        self.add_exception_handler(Exception, _unexpected)

    def make_routes(self) -> None:
        """Make the routes that are not hot, unless they exist. FastAPI takes about half a millisecond for each, so a
        process that serves calls this before it listens; otherwise the first request for such a route does."""
        if self._routers is None:
            return
        routers, self._routers = self._routers(), None
        for router in routers:
            # `include_router` would make each route a second time, and add nothing to it.
            self.router.routes += router.routes

    @property
    def routes(self) -> list[BaseRoute]:
        self.make_routes()
        return super().routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].endswith("/"):
            scope = _without_slash(scope)
        if scope["type"] == "http" and (endpoint := self._hot.get(scope["path"])) is not None:
            await endpoint(scope, receive, send)
        elif scope["type"] == "http":
            if self._for_pages is None or self._is_closed(scope):
                await self._serve(scope, receive, send)
            else:
                await self._for_pages(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request with FastAPI's router."""
        self.make_routes()
        if scope["method"] == "HEAD":
            scope, send = {**scope, "method": "GET"}, _without_body(send)
        receive, send = (
            _bounded(receive, self._body_seconds, self._bodies.get(scope["path"], _MOST_BODY)),
            _with_request_id(send),
        )
        if self._hops is not None and (said := dict(scope["headers"]).get(HEADER)) is not None:
            try:
                self._hops.passed(said)
            except LoopDetected as error:
                await answer(error)(scope, receive, send)
                return
        if self._peers is not None and self._peers.is_repeated(scope["method"], scope["path"]):
            await self._peers.repeat(super().__call__, scope, receive, send)
        else:
            await super().__call__(scope, receive, send)

    def _is_closed(self, scope: Scope) -> bool:
        """Whether web pages of other origins may never use the route of a request."""
        return scope["path"].startswith(_CLOSED) or any(
            isinstance(route, APIRoute)
            and not _FOR_NO_PAGE.isdisjoint(route.tags)
            and route.matches(scope)[0] is not Match.NONE
            for route in self.routes
        )

    def paths(self) -> list[str]:
        """The paths that an error about an unknown path may name: all but those for operators."""
        if self._own_paths is None:
            operations = {path: next(iter(item.values())) for path, item in self.openapi()["paths"].items()}
            self._own_paths = {path for path, one in operations.items() if not _OF_OPERATORS & set(one["tags"])}
        return sorted(self._own_paths - (self._hot.keys() - self._offered()))

    def allowed(self, scope: Scope) -> str:
        """The methods of a path, in the form of an Allow header."""
        methods: set[str] = set()
        for route in self.routes:
            if isinstance(route, Route) and route.matches(scope)[0] is not Match.NONE:
                methods |= route.methods or set()
        if "GET" in methods:
            methods.add("HEAD")
        return ", ".join(sorted(methods))

    def openapi(self) -> dict[str, Any]:
        if not self.openapi_schema:
            self.openapi_schema = complete(super().openapi(), self._hot)
        return self.openapi_schema


_OF_OPERATORS = {"administration", "engines"}
_FOR_NO_PAGE = _OF_OPERATORS | {"metrics"}
_CLOSED = ("/admin", "/instances")  # also where such a path does not exist


def _without_slash(scope: Scope) -> Scope:
    """Remove the slash at the end of a path. A redirect would do the same, but many clients then omit key or body."""
    path = scope["path"].rstrip("/") or "/"
    raw: bytes | None = scope.get("raw_path")
    return {**scope, "path": path, "raw_path": (raw.rstrip(b"/") or b"/") if raw is not None else None}


def _without_body(send: Send) -> Send:
    """A `send` for the answer to HEAD: the answer to GET without its body."""

    async def send_head(message: Message) -> None:
        if message["type"] == "http.response.body":
            message = {**message, "body": b""}
        await send(message)

    return send_head


_MOST_BODY = 1024 * 1024  # bytes; much longer than any list of backends


def _bounded(receive: Receive, seconds: float, most: int) -> Receive:
    """A `receive` that raises where a body is too long or too slow. FastAPI reads bodies before it checks keys."""
    taken = 0
    end = monotonic() + seconds

    async def receive_bounded() -> Message:
        nonlocal taken
        try:
            async with asyncio.timeout(end - monotonic()):
                message = await receive()
        except TimeoutError:
            raise HTTPException(408, f"the request body did not arrive within {seconds:g} s") from None
        taken += len(message.get("body", b""))
        if taken > most:
            raise HTTPException(413, f"the request body exceeds the limit of {most} bytes")
        return message

    return receive_bounded


def _with_request_id(send: Send) -> Send:
    """A `send` that adds an X-Request-Id to the answer."""

    async def send_with_id(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", new_id().encode("ascii"))]
        await send(message)

    return send_with_id


def answer(error: GatewayError) -> Response:
    """The answer to a request that ended with `error`."""
    headers = {"content-type": "application/json"}
    if error.retry_after is not None:
        headers["retry-after"] = str(error.retry_after)
    if isinstance(error, MethodNotAllowed):
        headers["allow"] = error.allow
    return Response(error.body(), status_code=error.status, headers=headers)


async def _docs(request: Request) -> Response:
    """The page of the OpenAPI document. It is made at the first request."""
    app = request.app
    if app.page is None:
        app.page = page.render(app.openapi())
    return HTMLResponse(app.page, headers=page.HEADERS)


async def _gateway_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, GatewayError)
    return answer(error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path
    if error.status_code == 405 and not (request.method == "POST" and path in ABSENT):
        allow = request.app.allowed(request.scope)
        return answer(MethodNotAllowed(f"{path} takes {allow}", allow=allow))
    if error.status_code in (404, 405):
        return answer(no_route(path, request.app.paths(), request.app.openapi_url or ""))
    kind = {408: RequestTimedOut, 413: BodyTooLarge}.get(error.status_code, InvalidRequest)
    return answer(kind(str(error.detail)))


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    return answer(InvalidRequest(f"{where or 'body'}: {first['msg']}", param=where or None))


async def _unexpected(request: Request, error: Exception) -> Response:
    return answer(GatewayError("the gateway failed on this request; its log says more"))
