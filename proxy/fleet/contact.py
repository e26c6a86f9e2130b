"""Whether something listens at an address, and why nothing came of asking it."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Iterator

_CODES: tuple[tuple[type[BaseException], str], ...] = (
    (ssl.SSLCertVerificationError, "certificate"),
    (ssl.SSLError, "no_tls"),
    (socket.gaierror, "unresolved"),
    (ConnectionRefusedError, "refused"),
    (ConnectionResetError, "no_http"),
    (BrokenPipeError, "no_http"),
    (TimeoutError, "timeout"),
    (OSError, "unreachable"),
)
"""What an exception says of a connection, from what says most to what says least."""


def code_of(error: BaseException) -> str:
    """Why a request came to nothing, as a code of `findings.py`: by the error, and by those that it was raised from."""
    chain = list(_chain(error))
    return next((code for kind, code in _CODES if any(isinstance(one, kind) for one in chain)), "no_http")


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        waiting += [one.__cause__, one.__context__]
        if isinstance(one, BaseExceptionGroup):
            waiting += one.exceptions


async def why_unreachable(host: str, port: int, seconds: float) -> str:
    """Why no TCP connection to an address comes about, for people; empty where one does. It is closed at once."""
    try:
        async with asyncio.timeout(seconds):
            _, writer = await asyncio.open_connection(host, port)
    except TimeoutError:
        return f"no answer within {seconds:g} s"
    except (OSError, ValueError, OverflowError) as error:
        return {"refused": "connection refused", "unresolved": "no such host"}.get(code_of(error), "no way there")
    writer.transport.abort()
    return ""


async def speaks_tls(host: str, port: int, seconds: float) -> bool:
    """Whether what listens there begins a TLS handshake. Its certificate does not matter, and nothing is sent to it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        async with asyncio.timeout(seconds):
            _, writer = await asyncio.open_connection(host, port, ssl=context)
    except (OSError, ValueError):  # ssl.SSLError and TimeoutError are among the former
        return False
    writer.transport.abort()
    return True
