"""Whether something listens at an address, and why a connection or a request failed."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Iterator

from pd_proxy.errors import BackendUnreachable
from pd_proxy.http.address import Address, connect
from pd_proxy.http.control import Control

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
"""The code for each exception, from the most specific one to the least."""


def code_of(error: BaseException) -> str:
    """Why a request failed, as a code of `findings.py`: by the error and by those that it was raised from."""
    chain = list(_chain(error))
    return next((code for kind, code in _CODES if any(isinstance(one, kind) for one in chain)), "no_http")


def reason_of(error: BaseException) -> str:
    """Why a request failed, for people. Common reasons have fixed words, since those of asyncio and resolvers vary."""
    return _WORDS.get(code_of(error)) or str(error) or type(error).__name__


_WORDS = {"refused": "connection refused", "unresolved": "no such host"}


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, its causes and contexts, and the members of groups; each once."""
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


async def why_unreachable(control: Control, host: str, port: int, seconds: float) -> str:
    """Why a connection to an address fails, for people; empty if it does not. The connection is closed at once."""
    try:
        await _connect(control, "http", host, port, seconds)
    except BackendUnreachable as error:
        return reason_of(error)
    return ""


async def speaks_tls(control: Control, host: str, port: int, seconds: float) -> bool:
    """Whether an address accepts a TLS handshake, whatever its certificate."""
    try:
        await _connect(control, "https", host, port, seconds)
    except BackendUnreachable as error:
        return code_of(error) == "certificate"
    return True


async def _connect(control: Control, scheme: str, host: str, port: int, seconds: float) -> None:
    try:
        address = Address.of(f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}")
        transport, _ = await connect(address, asyncio.Protocol, seconds, control.trust if address.tls else None)
    except ValueError as error:  # the host or the port is not valid
        raise BackendUnreachable(str(error)) from error
    transport.abort()
