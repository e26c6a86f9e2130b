"""Why a connection or a request failed."""

from __future__ import annotations

import asyncio
import socket
import ssl

import pytest
from pd_proxy.http.control import Control
from pd_proxy.http.reachability import code_of, speaks_tls, why_unreachable

from tests.support import stuck_backend

CONTROL = Control(5.0)


def raised(error: BaseException, cause: BaseException | None = None) -> BaseException:
    try:
        raise error from cause
    except BaseException as caught:
        return caught


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConnectionRefusedError(), "refused"),
        (raised(RuntimeError("all attempts failed"), ConnectionRefusedError()), "refused"),
        (raised(OSError("all attempts failed"), ExceptionGroup("", [OSError(), ConnectionRefusedError()])), "refused"),
        (raised(OSError(), socket.gaierror()), "unresolved"),
        (raised(OSError(), ssl.SSLCertVerificationError()), "certificate"),
        (raised(OSError(), ssl.SSLError()), "no_tls"),
        (TimeoutError(), "timeout"),
        (OSError(), "unreachable"),
        (ConnectionResetError(), "no_http"),
        (ValueError("not HTTP"), "no_http"),
    ],
)
def test_the_most_specific_error_counts_wherever_it_is_in_the_chain(error: BaseException, code: str) -> None:
    assert code_of(error) == code


def test_a_chain_of_causes_that_is_a_circle_ends() -> None:
    one, other = ValueError(), ValueError()
    one.__cause__, other.__cause__ = other, one
    assert code_of(one) == "no_http"


async def test_an_address_is_reachable_or_there_is_a_reason_why_not() -> None:
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    assert await why_unreachable(CONTROL, "127.0.0.1", port, 5) == ""
    server.close()
    await server.wait_closed()
    assert await why_unreachable(CONTROL, "127.0.0.1", port, 5) == "connection refused"
    assert await why_unreachable(CONTROL, "no-such-host.invalid", 80, 5)
    assert await why_unreachable(CONTROL, "127.0.0.1", 1 << 40, 5)
    assert await why_unreachable(CONTROL, "a\0b", 80, 5)
    with stuck_backend() as url:
        assert "within 0.05 s" in await why_unreachable(CONTROL, "127.0.0.1", int(url.rpartition(":")[2]), 0.05)


async def test_a_plain_server_does_not_speak_tls() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        assert not await speaks_tls(CONTROL, "127.0.0.1", server.sockets[0].getsockname()[1], 5)
    assert not await speaks_tls(CONTROL, "no-such-host.invalid", 80, 5)
