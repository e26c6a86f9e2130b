"""Cross-origin requests (CORS): what web pages of other origins may request and read, by the settings' `cors`.

This follows the Fetch standard (https://fetch.spec.whatwg.org/#http-cors-protocol). A preflight is answered here,
without a key, since browsers send none with it. Every other answer, whole, streamed or an error, gets the headers that
let the page read it. Where no origin is allowed, requests do not pass this module.
"""

from __future__ import annotations

import re

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pd_proxy.http.response import EXTENSION
from pd_proxy.http.server_exchange import ServerExchange
from pd_proxy.settings.bounds import CorsSettings

Headers = list[tuple[bytes, bytes]]

EXPOSED = b"x-request-id, x-pd-proxy-fallback, retry-after"
"""The headers of answers that a page may read, besides those that every page may."""

_METHODS = b"GET, HEAD, POST"
_HEADER_NAMES = re.compile(rb"[A-Za-z0-9!#$%&'*+.^_`|~-]+([ \t]*,[ \t]*[A-Za-z0-9!#$%&'*+.^_`|~-]+)*").fullmatch
_MOST_NAMES = 2048  # bytes of the header names that a preflight asks for


class CrossOrigin:
    """Answers preflights, and adds the CORS headers to other answers."""

    def __init__(self, settings: CorsSettings) -> None:
        self._any = "*" in settings.origins
        self._origins = frozenset(origin.encode("ascii") for origin in settings.origins)
        self._credentials: Headers = [(b"access-control-allow-credentials", b"true")] if settings.credentials else []
        self._max_age = b"%d" % settings.max_age

    def around(self, app: ASGIApp) -> ASGIApp:
        """Wrap an application so that pages of other origins can use it."""

        async def serve(scope: Scope, receive: Receive, send: Send) -> None:
            asked = {name: value for name, value in scope["headers"] if name in _ASKED}
            origin: bytes | None = asked.get(b"origin")
            if scope["method"] == "OPTIONS" and origin is not None and b"access-control-request-method" in asked:
                await _respond(send, self._preflight(origin, asked.get(b"access-control-request-headers", b"")))
                return
            await app(scope, receive, _marked(scope, send, self._answered(origin)))

        return serve

    def _allowed(self, origin: bytes) -> Headers:
        """The headers that allow an origin to read an answer; none where it may not."""
        if self._any:
            return [(b"access-control-allow-origin", b"*")]
        if origin in self._origins:
            return [(b"access-control-allow-origin", origin), *self._credentials]
        return []

    def _answered(self, origin: bytes | None) -> Headers:
        """The headers of an ordinary answer. `vary` tells caches that the answer depends on the request's origin; a
        request without an origin gets it too."""
        headers: Headers = [] if self._any else [(b"vary", b"Origin")]
        if origin is not None and (allowed := self._allowed(origin)):
            headers += [*allowed, (b"access-control-expose-headers", EXPOSED)]
        return headers

    def _preflight(self, origin: bytes, wanted: bytes) -> Headers:
        """The headers of the answer to a preflight."""
        headers: Headers = [(b"vary", b"Origin, Access-Control-Request-Method, Access-Control-Request-Headers")]
        if allowed := self._allowed(origin):
            headers += [*allowed, (b"access-control-allow-methods", _METHODS)]
            if len(wanted) <= _MOST_NAMES and _HEADER_NAMES(wanted):
                # By name, since `*` does not cover Authorization.
                headers.append((b"access-control-allow-headers", wanted))
            headers.append((b"access-control-max-age", self._max_age))
        return headers


_ASKED = frozenset({b"origin", b"access-control-request-method", b"access-control-request-headers"})


def _marked(scope: Scope, send: Send, headers: Headers) -> Send:
    """A `send` that adds headers to the answer. A `ServerExchange`, which does not use `send`, gets the headers too."""
    client = scope.get("extensions", {}).get(EXTENSION)
    if isinstance(client, ServerExchange):
        client.add_headers(headers)
        return send

    async def send_marked(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*headers, *message.get("headers", ())]}
        await send(message)

    return send_marked


async def _respond(send: Send, headers: Headers) -> None:
    await send({"type": "http.response.start", "status": 204, "headers": headers})
    await send({"type": "http.response.body"})
