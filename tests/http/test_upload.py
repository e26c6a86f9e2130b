"""A request whose body is sent while it is being received."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from pd_proxy.errors import BackendCut, BackendUnreachable
from pd_proxy.http.origin import Origin
from pd_proxy.http.upload import Upload

from .helpers import TIMEOUT, Engine, Recorder

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    async with Engine() as engine:
        yield engine


@pytest.fixture
async def origin(engine: Engine) -> AsyncIterator[Origin]:
    origin = Origin(engine.url)
    yield origin
    origin.close()


async def begin(origin: Origin) -> tuple[Upload, Recorder]:
    recorder = Recorder()
    return await Upload.open(
        origin, "/x", b"multipart/form-data; boundary=b", b"x-request-id: 7\r\n", recorder
    ), recorder


async def test_the_body_is_sent_in_chunks_as_it_is_written(engine: Engine, origin: Origin) -> None:
    upload, recorder = await begin(origin)
    peer = await engine.accept()
    head = await peer.reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"POST /x HTTP/1.1\r\nhost: 127.0.0.1")
    for line in (b"content-type: multipart/form-data; boundary=b", b"transfer-encoding: chunked", b"x-request-id: 7"):
        assert b"\r\n%b\r\n" % line in head
    await upload.write(b"a" * 17)
    assert await peer.reader.readexactly(23) == b"11\r\n" + b"a" * 17 + b"\r\n"
    upload.finish()
    assert await peer.reader.readexactly(5) == b"0\r\n\r\n"
    peer.say(OK)
    assert (await recorder.ended(), recorder.body) == ("end", b"ok")


async def test_a_connection_is_used_again_only_after_a_whole_request(engine: Engine, origin: Origin) -> None:
    upload, recorder = await begin(origin)
    peer = await engine.accept()
    upload.finish()
    peer.say(OK)
    await recorder.ended()
    again = Recorder()
    assert await origin.send("/y", b"", (b"{}",), again) is upload
    peer.say(OK)
    await again.ended()
    early, recorder = await begin(origin)
    peer = await engine.accept()
    peer.say(OK)
    assert (await recorder.ended(), recorder.body) == ("end", b"ok")
    assert await peer.left(), "half a request has been sent on it"
    await early.write(b"more")  # it is not sent
    early.finish()


async def test_every_upload_makes_a_new_connection(engine: Engine, origin: Origin) -> None:
    first = Recorder()
    connection = await origin.send("/y", b"", (b"{}",), first)
    (await engine.accept()).say(OK)
    await first.ended()
    upload, _ = await begin(origin)
    assert upload is not connection
    upload.abort()


async def test_a_writer_waits_for_an_engine_that_does_not_read_until_its_connection_ends(
    engine: Engine, origin: Origin
) -> None:
    upload, recorder = await begin(origin)
    peer = await engine.accept()
    peer.reader._transport.pause_reading()  # type: ignore[attr-defined]
    written = 0

    async def write() -> None:
        nonlocal written
        while not recorder.endings:
            await upload.write(b"x" * 100_000)
            written += 100_000

    writing = asyncio.create_task(write())
    async with asyncio.timeout(TIMEOUT):
        while upload._room is None or not written:
            await asyncio.sleep(0.001)
    assert written < 30_000_000
    peer.writer.transport.abort()
    async with asyncio.timeout(TIMEOUT):
        await writing
    assert isinstance(recorder.error, BackendCut)


async def test_an_engine_that_is_not_there_is_unreachable(origin: Origin, engine: Engine) -> None:
    await engine.__aexit__(None, None, None)
    with pytest.raises(BackendUnreachable):
        await begin(origin)
