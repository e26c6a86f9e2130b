"""The control plane's client: its requests, the certificates that it trusts, and its bounds for hostile engines."""

from __future__ import annotations

import asyncio
import gzip
import ssl
from functools import cache
from pathlib import Path
from time import monotonic

import pytest
from pd_proxy.errors import BackendCut, BackendError, BackendGarbled, BackendTimedOut, BackendUnreachable
from pd_proxy.http.control import Control

from tests.fleet.raw import Raw, answer, raw_engine
from tests.support import until


@pytest.mark.parametrize(
    "said",
    [
        answer(b'{"a":1}'),
        b'HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\n{"a\r\n4\r\n":1}\r\n0\r\n\r\n',
        b'HTTP/1.1 200 OK\r\n\r\n{"a":1}',  # the end of the connection is the end of the answer
        b"HTTP/1.1 100 Continue\r\n\r\n" + answer(b'{"a":1}'),
        answer(b'{"a":1}', b"content-encoding: identity"),
    ],
    ids=["length", "chunks", "until the end", "after a 100", "identity"],
)
async def test_an_answer_is_read_whole_with_every_framing(said: bytes) -> None:
    async with raw_engine(said) as engine:
        got = await Control(5.0).ask(engine.url + "/v1/models?of=this", query={"level": 2})
        assert (got.status, got.body) == (200, b'{"a":1}')
        [head] = engine.heads
    assert head.startswith(b"GET /v1/models?of=this&level=2 HTTP/1.1\r\n")
    assert b"\r\naccept-encoding: identity\r\n" in head.lower()


async def test_requests_carry_the_key_of_the_backends() -> None:
    async with raw_engine(answer()) as engine:
        await Control(5.0, b"authorization: Bearer k\r\n").ask(engine.url)
        assert engine.heads[0].startswith(b"GET / HTTP/1.1\r\n")
        assert b"\r\nauthorization: Bearer k\r\n" in engine.heads[0].lower().replace(b"bearer k", b"Bearer k")


async def test_a_proxy_of_the_environment_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    async with raw_engine(answer()) as engine:
        assert (await Control(5.0).ask(engine.url)).status == 200


async def test_a_redirect_is_not_followed() -> None:
    async with raw_engine(answer()) as other, raw_engine(b"") as engine:
        redirect = answer(b"", b"location: %b" % other.url.encode(), status=b"307 Temporary Redirect")
        async with raw_engine(redirect) as engine:
            assert (await Control(5.0).ask(engine.url + "/health")).status == 307
        assert other.heads == []


async def test_certificates_are_loaded_with_the_first_https_backend_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[ssl.SSLContext] = []
    default = ssl.create_default_context

    def create() -> ssl.SSLContext:
        made.append(default())
        return made[-1]

    monkeypatch.setattr(ssl, "create_default_context", create)
    control = Control(30.0)
    async with raw_engine(answer()) as engine:
        await control.ask(engine.url)
        assert made == []
    for _ in range(2):
        with pytest.raises(BackendUnreachable):
            await control.ask("https://127.0.0.1:1")
    [context] = made
    assert context.verify_mode == ssl.CERT_REQUIRED and context.check_hostname


# Hostile engines


async def trickle(head: bytes, writer: asyncio.StreamWriter) -> None:
    """A body that comes byte by byte and never ends."""
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n")
    while not writer.is_closing():
        writer.write(b" ")
        await writer.drain()
        await asyncio.sleep(0.01)


async def trickled_head(head: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nx-slow: ")
    while not writer.is_closing():
        writer.write(b"y")
        await writer.drain()
        await asyncio.sleep(0.01)


async def many_early_hints(head: bytes, writer: asyncio.StreamWriter) -> None:
    while not writer.is_closing():
        writer.write(b"HTTP/1.1 103 Early Hints\r\n\r\n")
        await writer.drain()
        await asyncio.sleep(0.01)


async def silence(head: bytes, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(60)


@pytest.mark.parametrize("serve", [trickle, trickled_head, many_early_hints, silence])
async def test_an_exchange_is_bounded_in_time_as_a_whole(serve: object) -> None:
    async with raw_engine(serve) as engine:  # type: ignore[arg-type]
        started = monotonic()
        with pytest.raises(BackendTimedOut, match=r"no whole answer within 0\.2 s"):
            await Control(0.2).ask(engine.url + "/health")
        assert monotonic() - started < 5


def endless(start: bytes, piece: bytes, raw: list[Raw]) -> object:
    async def serve(head: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(start)
        while not writer.is_closing():
            writer.write(piece)
            await writer.drain()
            raw[0].sent += len(piece)

    return serve


CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
ENDLESS = [
    ("a body", b"HTTP/1.1 200 OK\r\n\r\n", b" " * 65536, "more than 100000 bytes"),
    ("a body in chunks", CHUNKED, b"1000\r\n" + b" " * 4096 + b"\r\n", "more than 100000 bytes"),
    ("one chunk", CHUNKED + b"fffffff\r\n", b" " * 65536, "more than 100000 bytes"),
    ("headers", b"HTTP/1.1 200 OK\r\n", b"x: %b\r\n" % (b"y" * 1000), "did not speak HTTP"),
    ("one header", b"HTTP/1.1 200 OK\r\nx: ", b"y" * 1000, "did not speak HTTP"),
    ("trailers", CHUNKED + b"0\r\n", b"x: %b\r\n" % (b"y" * 1000), "did not speak HTTP"),
    ("a chunk's extension", CHUNKED + b"1;", b"y" * 1000, "did not speak HTTP"),
]


@pytest.mark.parametrize(("start", "piece", "reason"), [e[1:] for e in ENDLESS], ids=[e[0] for e in ENDLESS])
async def test_an_exchange_is_bounded_in_bytes(start: bytes, piece: bytes, reason: str) -> None:
    raws: list[Raw] = []
    async with raw_engine(endless(start, piece, raws)) as engine:  # type: ignore[arg-type]
        raws.append(engine)
        with pytest.raises(BackendGarbled, match=reason):
            await Control(30.0).ask(engine.url + "/health", limit=100_000)
        # By then the engine has sent the limit and what socket buffers hold, and it sends no more.
        assert engine.sent < 16 * 1024 * 1024


@cache
def bomb() -> bytes:
    return gzip.compress(bytes(50 * 1024 * 1024))


@pytest.mark.parametrize("encoding", [b"gzip", b"GZip", b"br", b"deflate", b"identity, gzip", b"x"])
async def test_an_encoded_answer_is_refused_and_not_inflated(encoding: bytes) -> None:
    async with raw_engine(answer(bomb(), b"content-encoding: %b" % encoding)) as engine:
        started = asyncio.get_running_loop().time()
        with pytest.raises(BackendGarbled, match="encoded"):
            await Control(30.0).ask(engine.url)
        assert asyncio.get_running_loop().time() - started < 5


@pytest.mark.parametrize(
    ("said", "error"),
    [
        (b"", BackendCut),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf", BackendCut),
        (CHUNKED + b"5\r\nhalf", BackendCut),
        (b"SSH-2.0-OpenSSH_9.2\r\n", BackendCut),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", BackendGarbled),
        (b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n", BackendGarbled),
    ],
)
async def test_an_answer_that_is_not_whole_is_an_error(said: bytes, error: type[BackendError]) -> None:
    async with raw_engine(said) as engine:
        with pytest.raises(error):
            await Control(5.0).ask(engine.url)


@pytest.mark.parametrize("host", ["127.0.0.1:1", "[::1]:1", "no.such.host.invalid:1"])
async def test_an_address_where_nothing_listens_is_unreachable(host: str) -> None:
    with pytest.raises(BackendUnreachable):
        await Control(10.0).ask(f"http://{host}")
    with pytest.raises(BackendUnreachable):
        await Control(1.0).ask("http://worker/", socket=Path("/nonexistent.sock"))


async def test_a_stream_waits_for_its_reader_and_ends_when_the_engine_is_silent() -> None:
    raws: list[Raw] = []
    piece = b"8000\r\n" + b" " * 0x8000 + b"\r\n"
    async with raw_engine(endless(CHUNKED, piece, raws)) as engine:  # type: ignore[arg-type]
        raws.append(engine)
        async with Control(5.0).stream(engine.url, idle=5.0) as (head, pieces):
            assert head.status == 200
            before = -1
            while engine.sent != before:  # until the engine cannot send any more
                before = engine.sent
                await asyncio.sleep(0.1)
            assert before < 16 * 1024 * 1024
            taken = 0
            while taken < before + 1024 * 1024:
                taken += len(await anext(pieces))
    async with (
        raw_engine(silence_after_head) as engine,
        Control(5.0).stream(engine.url, idle=0.1) as (head, pieces),
    ):
        with pytest.raises(BackendTimedOut, match="fell silent"):
            await anext(pieces)


async def silence_after_head(head: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(CHUNKED)
    await asyncio.sleep(60)


async def test_an_exchange_that_is_cancelled_leaves_no_connection() -> None:
    async with raw_engine(trickle) as engine:
        asking = asyncio.create_task(Control(30.0).ask(engine.url))
        await until(lambda: bool(engine.heads))
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
