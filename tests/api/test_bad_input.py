"""Invalid requests: each gets a clear error in OpenAI's form, and nothing remains in flight."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.support import Running, chat, pools, until

CHAT = "/v1/chat/completions"


async def raw(running: Running, data: bytes, *, seconds: float = 5.0) -> tuple[int, dict[str, str], Any]:
    """Send bytes; return status, headers and the parsed body of what comes back until the connection closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
    try:
        writer.write(data)
        async with asyncio.timeout(seconds):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            status = int(head.split(" ", 2)[1])
            headers = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if line)
            body = await reader.readexactly(int(headers["content-length"]))
        return status, headers, json.loads(body)
    finally:
        writer.close()


def post(body: bytes, *headers: str, path: str = CHAT) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "host: x", *headers, f"content-length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode() + body


def is_error(answer: Any, code: str) -> bool:
    error = answer["error"]
    return set(error) == {"message", "type", "param", "code"} and error["code"] == code and bool(error["message"])


@pytest.mark.parametrize(
    ("body", "hint"),
    [
        (b"", "JSON"),
        (b"not json", "JSON"),
        (b'{"model": "sim", ', "JSON"),
        (b'{"model": "sim"} trailing', "JSON"),
        (b"[1, 2]", "object"),
        (b'"text"', "object"),
        (b"null", "object"),
        (b"[" * 100_000, ""),
        (b'{"a":' * 100_000, ""),
        (b'{"model": 5, "messages": []}', "model"),
        (b'{"model": "sim", "stream": "maybe", "messages": []}', "stream"),
        (b'{"model": "sim", "n": "two", "messages": []}', "n"),
        (b'{"model": "sim", "max_tokens": {}, "messages": []}', "max_tokens"),
        (b'{"model": "sim", "stream_options": 3, "messages": []}', "stream_options"),
    ],
)
async def test_a_body_that_the_gateway_cannot_read_is_400(body: bytes, hint: str) -> None:
    async with pools() as (running, [p], [d]):
        answer = await running.http.post(CHAT, content=body)
        assert answer.status_code == 400
        assert is_error(answer.json(), "invalid_request")
        assert hint in answer.json()["error"]["message"]
        assert answer.headers["x-request-id"]
        assert running.idle()
        assert not [r for e in (p, d) for r in e.requests if r.path == CHAT]


async def test_unknown_routes_methods_and_models_have_their_own_errors() -> None:
    async with pools() as (running, _, _):
        unknown = await running.http.post("/v1/nothing", json={})
        assert unknown.status_code == 404 and is_error(unknown.json(), "unknown_route")
        assert CHAT in unknown.json()["error"]["message"]
        for path in (CHAT, "/ready", "/instances/add"):
            wrong = await running.http.delete(path)
            assert wrong.status_code == 405 and is_error(wrong.json(), "method_not_allowed"), path
            assert wrong.headers["allow"]
        model = await running.http.post(CHAT, json=chat(model="another"))
        assert model.status_code == 404 and is_error(model.json(), "model_not_found")
        assert model.json()["error"]["param"] == "model"
        one = await running.http.get("/v1/models/another")
        assert one.status_code == 404 and is_error(one.json(), "model_not_found")


async def test_a_body_over_the_limit_is_413_with_or_without_a_content_length() -> None:
    async with pools(limits={"request_body": 2000}) as (running, _, _):
        large = json.dumps(chat("x" * 3000)).encode()
        answer = await running.http.post(CHAT, content=large)
        assert answer.status_code == 413 and is_error(answer.json(), "body_too_large")

        async def pieces() -> Any:
            for at in range(0, len(large), 500):
                yield large[at : at + 500]

        answer = await running.http.post(CHAT, content=pieces())
        assert answer.status_code == 413 and is_error(answer.json(), "body_too_large")
        await until(running.idle)


async def test_two_content_lengths_are_400() -> None:
    async with pools() as (running, _, _):
        for headers in (["content-length: 5"], ["transfer-encoding: chunked"]):
            status, _, answer = await raw(running, post(b"{}", *headers))
            assert status == 400 and is_error(answer, "invalid_request")


async def test_a_header_of_a_megabyte_is_431() -> None:
    async with pools() as (running, _, _):
        status, headers, answer = await raw(running, post(b"{}", "x-large: " + "y" * 1_000_000))
        assert status == 431 and is_error(answer, "headers_too_large")
        assert headers["connection"] == "close"


async def test_bytes_that_are_not_http_are_400() -> None:
    async with pools() as (running, _, _):
        status, _, answer = await raw(running, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 hello\r\n\r\n")
        assert status == 400 and is_error(answer, "invalid_request")


async def test_a_body_that_arrives_byte_by_byte_is_408() -> None:
    async with pools(timeouts={"request_body": 0.3}) as (running, _, _):
        body = json.dumps(chat()).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        head = post(body)[: -len(body)]

        async def drip() -> None:
            writer.write(head)
            for byte in body:
                writer.write(bytes([byte]))
                await asyncio.sleep(0.02)  # the client has to be slow here

        dripping = asyncio.create_task(drip())
        async with asyncio.timeout(5):
            answer = await reader.readuntil(b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 408 ")
        dripping.cancel()
        writer.close()
        await until(running.idle)


async def test_nothing_is_left_of_a_client_that_leaves_during_its_body() -> None:
    async with pools() as (running, _, _):
        _, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(post(json.dumps(chat()).encode())[:-20])
        await until(lambda: running.gateway.gate.inside == 1)
        writer.close()
        await until(running.idle)


async def test_messages_of_the_wrong_type_get_the_engines_own_400() -> None:
    async with pools() as (running, _, _):
        answer = await running.http.post(CHAT, json={"model": "sim", "messages": {"role": "user"}})
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == 400, "vLLM's code is its status"


async def test_expect_100_continue_is_answered() -> None:
    async with pools() as (running, _, _):
        body = json.dumps(chat()).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(post(body, "expect: 100-continue")[: -len(body)])
        async with asyncio.timeout(5):
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100")
            writer.write(body)
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        writer.close()
