"""Answers of engines and requests of clients that cannot be decoded: each gets an error at once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import httpx
import pytest

from tests.support import Running, chat, pools, running_gateway, simulators, until

pytestmark = pytest.mark.cross_product

CHAT, MESSAGES, RESPONSES, COMPLETIONS = "/v1/chat/completions", "/v1/messages", "/v1/responses", "/v1/completions"
REQUESTS: dict[str, dict[str, Any]] = {
    CHAT: chat(),
    COMPLETIONS: {"model": "sim", "prompt": "a", "max_tokens": 4},
    MESSAGES: {"model": "sim", "messages": [{"role": "user", "content": "a"}], "max_tokens": 4},
    RESPONSES: {"model": "sim", "input": "a"},
    "/v1/embeddings": {"model": "sim", "input": "a"},
}
BAD_BYTE = b'{"error":{"message":"caf\xe9"}}'
DEEP = b'{"error":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
HUGE = b"1" + b"0" * 400


def answer(body: bytes, status: bytes = b"200 OK", kind: bytes = b"application/json") -> bytes:
    """An answer as it goes over the wire."""
    return b"HTTP/1.1 %b\r\ncontent-type: %b\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%b" % (
        status,
        kind,
        len(body),
        body,
    )


def events(*payloads: bytes) -> bytes:
    return answer(b"".join(b"data: %b\n\n" % payload for payload in payloads), kind=b"text/event-stream")


class Scripted:
    """An engine that is healthy, and answers each POST as the test sets.

    Attributes:
        asked: paths of the POSTs.
    """

    def __init__(self, says: bytes | Callable[[bytes], bytes]) -> None:
        self.says = says
        self.asked: list[bytes] = []
        self.url = ""
        self.pages = {b"/health": b"{}", b"/v1/models": b'{"data":[{"id":"sim"}]}', b"/version": b'{"version":"1"}'}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            method, path, _ = head.split(b" ", 2)
            if method == b"GET":
                found = self.pages.get(path)
                writer.write(answer(found) if found else answer(b"{}", b"404 Not Found"))
            else:
                length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
                body = await reader.readexactly(length)
                self.asked.append(path)
                writer.write(self.says(body) if callable(self.says) else self.says)
            await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def scripted(says: bytes | Callable[[bytes], bytes]) -> AsyncIterator[Scripted]:
    engine = Scripted(says)
    server = await asyncio.start_server(engine.serve, "127.0.0.1", 0)
    engine.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield engine
    finally:
        server.close()


async def ask(running: Running, path: str, stream: bool = False) -> tuple[int, dict[str, Any]]:
    """Status and error of an answer. No time limit of the gateway's is anywhere near."""
    async with asyncio.timeout(20):
        got = await running.http.post(path, json={**REQUESTS[path], **({"stream": True} if stream else {})})
    said = got.json() if got.headers["content-type"] == "application/json" else {}
    return got.status_code, said.get("error", {})


STREAMED = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


@STREAMED
@pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES])
@pytest.mark.parametrize("body", [BAD_BYTE, DEEP, b"\xff", b""], ids=["byte", "deep", "bytes", "empty"])
async def test_a_refusal_that_cannot_be_decoded_is_a_refusal_at_once(path: str, body: bytes, stream: bool) -> None:
    async with (
        scripted(answer(body, b"400 Bad Request")) as engine,
        running_gateway(mixed=[engine.url]) as running,
    ):
        status, error = await ask(running, path, stream)
        assert status == 400
        assert error["message"]
        assert len(engine.asked) == 1, "it is not tried again"
        await until(running.idle)


@pytest.mark.slow
@STREAMED
@pytest.mark.parametrize("body", [BAD_BYTE, DEEP], ids=["byte", "deep"])
async def test_a_failure_that_cannot_be_decoded_is_tried_again(body: bytes, stream: bool) -> None:
    async with (
        scripted(answer(body, b"500 Internal Server Error")) as engine,
        running_gateway(mixed=[engine.url], retries={"attempts": 2}) as running,
    ):
        status, error = await ask(running, CHAT, stream)
        assert status == 500
        assert error["message"]
        assert len(engine.asked) == 2


@STREAMED
@pytest.mark.parametrize("path", [CHAT, MESSAGES])
@pytest.mark.parametrize(
    "body", [b'{"choices":"caf\xe9","type":"caf\xe9"}', b'{"id":' + b"[" * 100_000], ids=["byte", "deep"]
)
async def test_an_answer_that_cannot_be_decoded_is_tried_again_and_then_a_502(
    path: str, body: bytes, stream: bool
) -> None:
    says = events(body) if stream else answer(body)
    async with (
        scripted(says) as engine,
        running_gateway(mixed=[engine.url], retries={"attempts": 2}) as running,
    ):
        status, error = await ask(running, path, stream)
        assert status == 502
        assert error["type"] == ("api_error" if path == MESSAGES else "backend_error")
        assert len(engine.asked) == 2
        outcomes = [name for name in await running.metrics() if name.startswith("pd_proxy_requests_total")]
        assert any('outcome="backend_garbled"' in name for name in outcomes), outcomes
        await until(running.idle)


@pytest.mark.slow
@STREAMED
@pytest.mark.parametrize("body", [BAD_BYTE, DEEP, b'{"choices":"\xe9","kv_transfer_params":"\xe9"}'])
@pytest.mark.parametrize("status", [b"200 OK", b"500 Internal Server Error"])
async def test_a_prefill_leg_that_cannot_be_decoded_fails(body: bytes, status: bytes, stream: bool) -> None:
    async with (
        scripted(answer(body, status)) as prefill,
        simulators("decode") as [decode],
        httpx.AsyncClient(base_url=decode.url, verify=False) as engine,
    ):
        for page in ("/v1/models", "/version"):
            prefill.pages[page.encode()] = (await engine.get(page)).content
        await exchange_through(running_gateway(prefill=[prefill.url], decode=[decode.url]), prefill, stream)


async def exchange_through(gateway: AbstractAsyncContextManager[Running], prefill: Scripted, stream: bool) -> None:
    async with gateway as running:
        got, _ = await ask(running, CHAT, stream)
        assert got == 200, "decode computes the prompt itself"
        assert prefill.asked
        await until(running.idle)


@STREAMED
@pytest.mark.parametrize(
    "status",
    [b"600 X", b"999 X", b"099 X", b"204 No Content", b"304 Not Modified", b"101 Switching Protocols", b"302 X"],
)
async def test_a_status_that_no_engine_has_is_a_502(status: bytes, stream: bool) -> None:
    async with (
        scripted(answer(b"{}", status)) as engine,
        running_gateway(mixed=[engine.url], retries={"attempts": 2}) as running,
    ):
        got, error = await ask(running, CHAT, stream)
        assert got == 502
        assert error["message"]
        await until(running.idle)


@pytest.mark.slow
@STREAMED
@pytest.mark.parametrize("status", [b"418 X", b"499 X", b"451 X", b"520 X", b"599 X"])
async def test_a_status_without_a_name_is_answered_all_the_same(status: bytes, stream: bool) -> None:
    async with (
        scripted(answer(b'{"error":{"message":"m"}}', status)) as engine,
        running_gateway(mixed=[engine.url], retries={"attempts": 1}) as running,
    ):
        got, error = await ask(running, CHAT, stream)
        assert got == int(status[:3])
        assert error["message"] == "m"


async def test_an_early_hint_of_any_number_is_followed_by_the_answer() -> None:
    said = answer(b'{"id":"a","choices":[{"message":{"role":"assistant","content":"hello"}}]}')
    async with (
        scripted(b"HTTP/1.1 199 X\r\n\r\n" + said) as engine,
        running_gateway(mixed=[engine.url]) as running,
    ):
        assert (await ask(running, CHAT))[0] == 200


# Whole answers that are none


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "body"),
    [
        *((path, body) for path in (CHAT, COMPLETIONS) for body in (b"{}", b'{"choices":[]}', b'{"choices":null}')),
        *((CHAT, body) for body in (b'{"choices":[1]}', b'{"choices":{}}', b'{"choices":[{}]}', b'{"error":null}')),
        *((MESSAGES, body) for body in (b"{}", b'{"content":null}', b'{"content":"a"}')),
        *((RESPONSES, body) for body in (b"{}", b'{"output":null}')),
    ],
)
async def test_a_whole_answer_without_an_answer_is_tried_elsewhere(path: str, body: bytes) -> None:
    async with (
        scripted(answer(body)) as bad,
        simulators("mixed") as [good],
        running_gateway(mixed=[bad.url, good.url], policy={"mixed": "round_robin"}) as running,
    ):
        for _ in range(2):
            assert (await ask(running, path))[0] == 200
        assert bad.asked
        metrics = await running.metrics()
        assert any("garbled" in name for name in metrics if name.startswith("pd_proxy_retries_total"))


# Why an engine refused


@pytest.mark.slow
@STREAMED
@pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES, "/v1/embeddings"])
@pytest.mark.parametrize(
    "body",
    [
        b'{"detail":"too long"}',
        b'{"detail":[{"loc":["body","input"],"msg":"too long"}]}',
        b"too long",
        b'{"object":"error","message":"too long","type":"BadRequestError","param":null,"code":400}',
    ],
)
async def test_the_reason_of_a_refusal_reaches_the_client(path: str, body: bytes, stream: bool) -> None:
    async with (
        scripted(answer(body, b"422 Unprocessable Entity")) as engine,
        running_gateway(mixed=[engine.url]) as running,
    ):
        status, error = await ask(running, path, stream and path != "/v1/embeddings")
        assert status == 422
        assert error["message"].endswith("too long")


# Usage


@STREAMED
@pytest.mark.parametrize("number", [HUGE, b"-5", b"1.5", b"true", b'"7"'])
async def test_a_usage_that_counts_no_tokens_breaks_no_metric(number: bytes, stream: bool) -> None:
    usage = b'"usage":{"prompt_tokens":%b,"completion_tokens":%b,"total_tokens":1}' % (number, number)
    whole = answer(b'{"id":"a","choices":[{"message":{"role":"assistant","content":"hello"}}],%b}' % usage)
    streamed = events(
        b'{"id":"a","object":"o","created":1,"model":"m","choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}',
        b'{"id":"a","choices":[{"index":0,"delta":{"content":"hello"},"finish_reason":null}]}',
        b'{"id":"a","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}',
        b'{"id":"a","choices":[],%b}' % usage,
        b"[DONE]",
    )
    async with (
        scripted(streamed if stream else whole) as engine,
        running_gateway(mixed=[engine.url]) as running,
    ):
        assert (await ask(running, CHAT, stream))[0] == 200
        page = await running.http.get("/metrics")
        assert page.status_code == 200
        metrics = await running.metrics()
        others = ("_bucket", "_per_second")
        counted = {
            name: value for name, value in metrics.items() if "tokens" in name and not any(map(name.count, others))
        }
        assert all(0 <= value < 100 for value in counted.values() if value == value), counted


# The hand-off's members

ADDRESS = b"10.9.8.7"


@STREAMED
@pytest.mark.parametrize("name", [b"kv_transfer_params", rb"kv\u005ftransfer_params", rb"\u0065c_transfer_params"])
async def test_no_client_is_given_a_hand_off_however_it_is_spelled(name: bytes, stream: bool) -> None:
    member = b'"%b":{"remote_host":"%b"}' % (name, ADDRESS)
    whole = answer(
        b'{"id":"a",%b,"choices":[{"message":{"role":"assistant","content":"hello"},%b}]}' % (member, member)
    )
    streamed = events(
        b'{"id":"a",%b,"choices":[{"index":0,"delta":{"role":"assistant","content":""},%b}]}' % (member, member),
        b'{"id":"a","choices":[{"index":0,"delta":{"content":"hello"},"finish_reason":null}],%b}' % member,
        b'{"id":"a","choices":[{"index":0,"delta":{"content":"more"},"finish_reason":null,%b}]}' % member,
        b'{"id":"a","choices":[{"index":0,"delta":{},"finish_reason":"stop"}],%b}' % member,
        b'{"id":"a","choices":[],"usage":{"prompt_tokens":1,"completion_tokens":2},%b}' % member,
        b"[DONE]",
    )
    async with (
        scripted(streamed if stream else whole) as engine,
        running_gateway(mixed=[engine.url]) as running,
    ):
        got = await running.http.post(
            CHAT, json={**chat(), "stream": stream, "stream_options": {"include_usage": True}} if stream else chat()
        )
        assert got.status_code == 200
        assert "hello" in got.text
        assert ADDRESS.decode("ascii") not in got.text
        assert "remote_host" not in got.text


# Clients


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (RESPONSES, b'{"model":"sim","input":"a","tools":[{"type":"caf\xe9"}]}'),
        (RESPONSES, b'{"model":"sim","input":"a","tool_choice":{"type":"caf\xe9"}}'),
        (MESSAGES, b'{"model":"sim","max_tokens":1,"messages":[],"tool_choice":{"type":"caf\xe9"}}'),
        (MESSAGES, b'{"model":"sim","max_tokens":1,"messages":[],"tools":[{"type":"caf\xe9"}]}'),
        (CHAT, b'{"model":"caf\xe9","messages":[]}'),
        (CHAT, b'{"model":"sim","messages":[],"stream_options":"caf\xe9"}'),
        (CHAT, b'{"model":"sim","messages":[],"vllm_xargs":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001),
        (CHAT, b'{"model":"sim","messages":' + b"[" * 100_000),
        (CHAT, b'{"caf\xe9":1}'),
        (COMPLETIONS, b'{"model":"sim","prompt":"a","max_tokens":1' + b"0" * 5000 + b"}"),
        ("/v1/embeddings", b'{"model":"sim","input":' + b"[" * 100_000),
    ],
)
async def test_a_request_that_cannot_be_decoded_is_the_clients_to_mend(path: str, body: bytes) -> None:
    async with pools(1, 1) as (running, _, _):
        got = await running.http.post(path, content=body, headers={"content-type": "application/json"})
        assert got.status_code == 400
        assert json.loads(got.content)["error"]["message"]
        await until(running.idle)


@pytest.mark.parametrize("value", [b'{"a":' * 20_000 + b"1" + b"}" * 20_000, b'{"a":"caf\xe9"}', b"{"])
async def test_a_form_that_cannot_be_decoded_is_the_clients_to_mend(value: bytes) -> None:
    parts = [
        (b'name="model"', b"sim"),
        (b'name="vllm_xargs"', value),
        (b'name="file"; filename="a.wav"', b"RIFF"),
    ]
    form = b"".join(b"--x\r\ncontent-disposition: form-data; %b\r\n\r\n%b\r\n" % part for part in parts) + b"--x--\r\n"
    async with (
        simulators("mixed", task="transcribe") as [engine],
        running_gateway(mixed=[engine.url]) as running,
    ):
        got = await running.http.post(
            "/v1/audio/transcriptions", content=form, headers={"content-type": "multipart/form-data; boundary=x"}
        )
        assert got.status_code == 400
        assert json.loads(got.content)["error"]["message"]
