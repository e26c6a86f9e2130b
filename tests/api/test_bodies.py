"""Request bodies in memory: bounded in total on all routes, and freed however their requests end."""

from __future__ import annotations

import asyncio
import json

import pytest
from pd_proxy.http.body_memory import Bodies
from pd_proxy.http.server import GatewayProtocol

from tests.support import Running, chat, pools, soon

MB = 1 << 20
CHAT = "/v1/chat/completions"
AUDIO = "/v1/audio/transcriptions"
LIMITS = {"request_body": MB, "bodies": 4 * MB}


def head(path: str, length: int, content_type: str = "application/json") -> bytes:
    lines = [f"POST {path} HTTP/1.1", "host: x", f"content-type: {content_type}", f"content-length: {length}", "", ""]
    return "\r\n".join(lines).encode()


def _shared(running: Running) -> Bodies:
    kind = running.server.config.http_protocol_class
    assert issubclass(kind, GatewayProtocol)
    return kind.shared.bodies


async def half(running: Running, path: str, size: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
    writer.write(head(path, MB) + b'{"messages":"' + b"x" * (size - 13))
    await writer.drain()
    return reader, writer


async def answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], dict[str, object]]:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
    return int(lines[0].split()[1]), headers, json.loads(await reader.readexactly(int(headers["content-length"])))


@pytest.mark.parametrize("path", [CHAT, "/v1/messages", "/v1/embeddings", "/tokenize"])
async def test_stalled_uploads_are_refused_when_memory_is_full_and_small_requests_are_served(path: str) -> None:
    async with pools(limits=LIMITS) as (running, _, _):
        held = _shared(running)
        uploads = [await half(running, path, 900_000) for _ in range(6)]
        waiting = {asyncio.create_task(answer(reader)) for reader, _ in uploads}
        await soon(lambda: held.refused["full"] >= 2, 5)
        done, pending = await asyncio.wait(waiting, timeout=30, return_when=asyncio.FIRST_COMPLETED)
        assert held.held <= 3.5 * MB
        for task in done:
            status, headers, body = task.result()
            assert status == 503
            assert headers["retry-after"] == "1"
            assert headers["connection"] == "close"
            error = body["error"]
            assert isinstance(error, dict)
            assert "as many as it may" in str(error["message"])
        assert (await running.http.post(CHAT, json=chat())).status_code == 200
        metrics = await running.metrics()
        assert metrics["pd_proxy_request_body_bytes"] == held.held > 2 * MB
        assert metrics['pd_proxy_request_bodies_refused_total{reason="full"}'] == held.refused["full"]
        for task in pending:
            task.cancel()
        for _, writer in uploads:
            writer.close()
        await soon(lambda: held.held == 0, 5)


async def test_the_memory_of_answered_requests_is_free_again() -> None:
    async with pools(limits=LIMITS) as (running, _, _):
        held = _shared(running)
        for _ in range(8):
            assert (await running.http.post(CHAT, json=chat("word " * 100_000, max_tokens=1))).status_code in (200, 400)
            assert (await running.http.post(CHAT, content=b"[" + b" " * 900_000)).status_code == 400
            assert (await running.http.post("/v1/nothing", content=b" " * 900_000)).status_code == 404
            assert (await running.http.post("/instances/add", content=b" " * 900_000)).status_code == 400
        await soon(lambda: held.held == 0, 5)
        assert held.refused == {"full": 0, "stalled": 0}


async def test_a_form_holds_only_the_bytes_that_are_kept_for_retries() -> None:
    limits = {"request_body": 16 * MB, "bodies": 16 * MB}
    async with pools(limits=limits) as (running, _, _):
        held = _shared(running)
        most = 0

        async def watch() -> None:
            nonlocal most
            while True:
                most = max(most, held.held)
                await asyncio.sleep(0)

        watching = asyncio.create_task(watch())
        files = {"file": ("a.wav", b"RIFF" + b"x" * 8 * MB)}
        await running.http.post(AUDIO, data={"model": "sim"}, files=files)
        watching.cancel()
        assert most <= 2 * MB
        await soon(lambda: held.held == 0, 5)


async def test_a_refused_form_and_a_refused_unrouted_body_are_answered() -> None:
    async with pools(limits=LIMITS) as (running, _, _):
        held = _shared(running)
        uploads = [await half(running, CHAT, 900_000) for _ in range(3)]
        await soon(lambda: held.held > 2.5 * MB, 5)
        boundary = "multipart/form-data; boundary=b"
        start = b'--b\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n'
        for path, kind in ((AUDIO, boundary), ("/instances/add", "application/json")):
            reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
            writer.write(head(path, MB, kind) + start + b"x" * 1_000_000)
            status, _, _ = await asyncio.wait_for(answer(reader), 60)
            assert status in (503, 401, 404)
            writer.close()
        for _, writer in uploads:
            writer.close()
        await soon(lambda: held.held == 0, 5)
