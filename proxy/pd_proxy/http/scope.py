"""The scopes of ASGI that a request's application gets."""

from __future__ import annotations

import asyncio
import urllib.parse
from typing import Any

import httptools
from uvicorn import Config

from pd_proxy.decoding import decode_text
from pd_proxy.http.response import Scope


def whole_scope(
    scope: Scope, target: bytes, config: Config, state: dict[str, Any], transport: asyncio.Transport
) -> Scope:
    """A scope with all that ASGI 2.3 has.

    Arguments:
        scope: as hot routes get it.
        target: of the request line.
        state: what the lifespan has left for requests.
    Raises:
        httptools.HttpParserInvalidURLError, Undecodable: the target is no URL.
    """
    url = httptools.parse_url(target)
    path = decode_text(url.path, "ascii")
    server = transport.get_extra_info("sockname")
    return {
        **scope,
        "asgi": {"version": config.asgi_version, "spec_version": "2.3"},
        "server": tuple(server[:2]) if isinstance(server, tuple) else (str(server), None),
        "scheme": "https" if transport.get_extra_info("sslcontext") else "http",
        "root_path": config.root_path,
        "path": config.root_path + (urllib.parse.unquote(path) if "%" in path else path),
        "raw_path": config.root_path.encode("ascii") + url.path,
        "query_string": url.query or b"",
        "state": state.copy(),
    }
