"""Transcriptions: forms that are forwarded while they arrive, and answers in one piece or as events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
from pd_proxy.api.single import KEPT

from tests.api.test_single import mixed, openai_client, retries
from tests.support import Running, running_gateway, simulators, soon, until

PATH = "/v1/audio/transcriptions"
AUDIO = b"RIFF" + bytes(range(256)) * 100
FIELDS = {"model": "sim"}
FILES = {"file": ("a.wav", AUDIO, "audio/wav")}
MODELS = b'{"data":[{"id":"sim"}]}'


def part(name: str, content: bytes, extra: str = "") -> bytes:
    return f'--b\r\nContent-Disposition: form-data; name="{name}"{extra}\r\n\r\n'.encode() + content + b"\r\n"


def form(*parts: bytes) -> dict[str, Any]:
    """The arguments of a request with a form of these parts."""
    return {
        "content": b"".join(parts) + b"--b--\r\n",
        "headers": {"content-type": "multipart/form-data; boundary=b"},
    }


@asynccontextmanager
async def sending(running: Running, *, length: int | None = None) -> AsyncIterator[tuple[Any, Any]]:
    """A connection on which the head of a form has been sent; in chunks unless a length is given."""
    reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
    framing = f"content-length: {length}" if length is not None else "transfer-encoding: chunked"
    head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: multipart/form-data; boundary=b\r\n{framing}\r\n\r\n"
    writer.write(head.encode())
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def answer_of(reader: asyncio.StreamReader) -> tuple[int, dict[str, Any]]:
    """Status and body of an answer with a content-length."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(head.partition(b"content-length: ")[2].split(b"\r\n")[0])
    return int(head.split()[1]), json.loads(await reader.readexactly(length))


Engine = Callable[[asyncio.StreamReader, asyncio.StreamWriter, bytes], Awaitable[None]]


@asynccontextmanager
async def engine_that(serve: Engine) -> AsyncIterator[str]:
    """The URL of a healthy engine that calls `serve` with the head of each form."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            if head.startswith(b"POST"):
                await serve(reader, writer, head)
            else:
                lines = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close" % len(MODELS)
                writer.write(b"HTTP/1.1 200 OK\r\n" + lines + b"\r\n\r\n" + MODELS)
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_the_openai_client_gets_transcriptions_in_every_form() -> None:
    async with mixed() as (running, [engine]), openai_client(running) as client:
        whole = await client.audio.transcriptions.create(model="sim", file=("a.wav", AUDIO))
        assert whole.text
        text = await client.audio.transcriptions.create(model="sim", file=("a.wav", AUDIO), response_format="text")
        assert text == whole.text
        verbose = await client.audio.transcriptions.create(
            model="sim", file=("a.wav", AUDIO), response_format="verbose_json", timestamp_granularities=["word"]
        )
        assert verbose.text == whole.text
        assert engine.requests[-1].body["timestamp_granularities[]"] == [b"word"]
        translated = await client.audio.translations.create(model="sim", file=("a.wav", AUDIO))
        assert translated.text == whole.text
        events = await client.audio.transcriptions.create(model="sim", file=("a.wav", AUDIO), stream=True)
        said = [event.choices[0]["delta"]["content"] async for event in events]  # type: ignore[attr-defined]
        assert len(said) > 5 and "".join(said) == whole.text
        assert all(request.body["file"] == [AUDIO] for request in engine.requests)
        with pytest.raises(openai.NotFoundError):
            await client.audio.transcriptions.create(model="nobody", file=("a.wav", AUDIO))
        with pytest.raises(openai.BadRequestError, match="not supported"):
            await client.audio.transcriptions.create(model="sim", file=("a.wav", AUDIO), response_format="srt")
        assert len(engine.requests) == 6
        metrics = await running.metrics()
        assert metrics['pd_proxy_requests_total{endpoint="transcriptions",model="sim",outcome="ok"}'] == 4
        assert metrics['pd_proxy_requests_total{endpoint="translations",model="sim",outcome="ok"}'] == 1
        assert running.idle()


async def test_a_form_is_sent_to_the_engine_while_it_arrives() -> None:
    async with mixed() as (running, [engine]), sending(running) as (reader, writer):
        writer.write(chunk(part("model", b"sim") + part("file", b"x" * 300_000, '; filename="f"')[:-2]))
        await until(lambda: any(connection.received >= 300_000 for connection in engine.connections))
        [backend] = running.gateway.fleet
        assert backend.inflight_requests == 1 and not engine.requests
        writer.write(chunk(b"y" * 5) + chunk(b"\r\n--b--\r\n") + b"0\r\n\r\n")
        status, answer = await answer_of(reader)
        assert (status, bool(answer["text"])) == (200, True)
        assert engine.requests[0].body["file"] == [b"x" * 300_000 + b"y" * 5]
        assert engine.requests[0].headers["transfer-encoding"] == "chunked"
        assert running.idle()


async def test_an_engine_that_does_not_read_stops_the_upload_and_memory_stays_bounded() -> None:
    """While the gateway does not read from the client, it notices that the client has left only when the engine reads
    again or `timeouts.idle` ends."""
    stuck = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, head: bytes) -> None:
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        await stuck.wait()

    settings = {"kind": "openai", "timeouts": {"idle": 1.5}}
    async with engine_that(serve) as url, running_gateway(mixed=[url], **settings) as running:
        async with sending(running, length=60_000_000) as (_, writer):
            writer.write(part("model", b"sim") + part("file", b"", '; filename="f"')[:-2])
            sent = 0
            while True:
                writer.write(b"x" * 100_000)
                try:
                    async with asyncio.timeout(0.5):
                        await writer.drain()
                except TimeoutError:
                    break
                sent += 100_000
                assert sent < 30_000_000, "the gateway swallows what the engine does not read"
        await until(running.idle, 20.0)
        stuck.set()


async def test_a_leg_whose_engine_never_reads_ends_with_a_timeout() -> None:
    stuck = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, head: bytes) -> None:
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        await stuck.wait()

    settings = {"kind": "openai", "timeouts": {"idle": 0.3}, "retries": {"attempts": 1}}
    async with engine_that(serve) as url, running_gateway(mixed=[url], **settings) as running:
        body = b"x" * 30_000_000
        answer = await running.http.post(PATH, **form(part("model", b"sim"), part("file", body, '; filename="f"')))
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "backend_timeout")
        assert running.idle()
        stuck.set()


async def test_a_short_form_is_sent_to_another_backend_and_a_long_one_is_not() -> None:
    async with mixed(2) as (running, engines):
        for engine in engines:
            engine.faults.add("status", status=500, leg="local", count=1)
        answer = await running.http.post(PATH, data=FIELDS, files=FILES)
        assert answer.status_code == 200, answer.text
        assert await retries(running) == {'pd_proxy_retries_total{leg="decode",reason="failed"}': 2}
        received = [request.body["file"] for engine in engines for request in engine.requests]
        assert received == [[AUDIO]] * 3
        for engine in engines:
            engine.faults.add("status", status=500, leg="local", count=1)
        long = part("file", b"x" * (2 * KEPT), '; filename="f"')
        answer = await running.http.post(PATH, **form(part("model", b"sim"), long))
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "InternalServerError")
        assert sum(len(engine.requests) for engine in engines) == 4
        assert running.idle()


async def test_a_form_for_a_dead_backend_goes_to_another() -> None:
    async with mixed(2, health={"interval": 60.0}) as (running, [one, other]):
        one.kill()
        long = part("file", b"x" * (2 * KEPT), '; filename="f"')
        for _ in range(4):
            assert (await running.http.post(PATH, **form(part("model", b"sim"), long))).status_code == 200
        assert len(other.requests) == 4


async def test_when_an_engine_dies_during_a_long_form_the_client_gets_the_error() -> None:
    async with mixed(health={"interval": 60.0}) as (running, [engine]), sending(running) as (reader, writer):
        writer.write(chunk(part("model", b"sim") + part("file", b"x" * (2 * KEPT), '; filename="f"')[:-2]))
        await until(lambda: any(connection.received >= 2 * KEPT for connection in engine.connections))
        engine.kill()
        status, answer = await answer_of(reader)
        assert (status, answer["error"]["code"]) == (502, "backend_cut")
        assert running.idle()


LONG = part("file", b"x" * (2 * KEPT), '; filename="f"')


@pytest.mark.parametrize("size", [1000, 2 * KEPT])
async def test_the_model_may_follow_the_file_in_the_form(size: int) -> None:
    async with mixed() as (running, [engine]):
        file = part("file", b"x" * size, '; filename="f"')
        answer = await running.http.post(PATH, **form(file, part("model", b"sim")))
        assert answer.status_code == 200, answer.text
        assert (engine.requests[0].body["model"], len(engine.requests[0].body["file"][0])) == ([b"sim"], size)
        metrics = await running.metrics()
        assert metrics['pd_proxy_requests_total{endpoint="transcriptions",model="sim",outcome="ok"}'] == 1
        answer = await running.http.post(PATH, **form(file, part("model", b"nobody")))
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
        assert len(engine.requests) == 1, "what the engine has read of it was no whole form"
        assert running.idle()


async def test_the_model_of_another_backend_has_to_stand_before_a_long_file() -> None:
    async with (
        simulators("mixed", task="any", model="a") as [one],
        simulators("mixed", task="any", model="b") as [other],
        running_gateway(mixed=[one.url, other.url]) as running,
    ):
        for name, short in (("a", one), ("b", other)):
            answer = await running.http.post(
                PATH, **form(part("file", b"x", '; filename="f"'), part("model", name.encode()))
            )
            assert answer.status_code == 200 and len(short.requests) == 1
        seen = set()
        while len(seen) < 2:
            answer = await running.http.post(PATH, **form(LONG, part("model", b"b")))
            seen.add(answer.status_code)
            if answer.status_code != 200:
                error = answer.json()["error"]
                assert (answer.status_code, error["param"]) == (400, "model")
                assert error["message"] == "a long form must have its `model` before its file"
        assert all(request.body["model"] == [b"a"] for request in one.requests)


async def test_fields_that_clients_may_not_set_are_removed_from_the_form() -> None:
    async with mixed() as (running, [engine]):
        fields = [part(name, b"x") for name in ("kv_transfer_params", "rid", "kv_transfer_params[remote_host]")]
        xargs = part("vllm_xargs", b'{"rid":1,"a":2}')
        answer = await running.http.post(PATH, **form(*fields, xargs, part("model", b"sim"), part("file", b"x")))
        assert answer.status_code == 200
        assert engine.requests[0].body == {"vllm_xargs": [b'{"a":2}'], "model": [b"sim"], "file": [b"x"]}


@pytest.mark.parametrize(
    ("request_", "complaint"),
    [
        ({"content": b"nonsense", "headers": {"content-type": "text/plain"}}, "must be multipart/form-data"),
        ({"json": {"model": "sim"}}, "must be multipart/form-data"),
        ({"content": b"", "headers": {"content-type": "multipart/form-data"}}, "must be multipart/form-data"),
        ({"content": b"", "headers": {"content-type": "multipart/form-data; boundary=b"}}, "ends before"),
        ({"content": b"garbage", "headers": {"content-type": "multipart/form-data; boundary=b"}}, "does not begin"),
        ({**form(part("model", b"sim")), "content": part("model", b"sim")}, "ends before its last boundary"),
        (form(part("model", b"sim"), part("model", b"other")), "`model` is in the form twice"),
    ],
)
async def test_an_invalid_form_is_refused(request_: dict[str, Any], complaint: str) -> None:
    async with mixed() as (running, [engine]):
        answer = await running.http.post(PATH, **request_)
        assert answer.status_code == 400 and complaint in answer.json()["error"]["message"]
        assert not engine.requests
        assert running.idle()


async def test_a_form_without_a_model_goes_to_any_engine_and_engines_refuse_one_without_a_file() -> None:
    async with mixed() as (running, [engine]):
        assert (await running.http.post(PATH, files=FILES)).status_code == 200
        answer = await running.http.post(PATH, **form(part("model", b"sim")))
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "file")
        assert len(engine.requests) == 2


async def test_a_form_that_is_too_long_ends_its_leg() -> None:
    async with mixed(limits={"request_body": 400_000}) as (running, [engine]):
        answer = await running.http.post(PATH, data=FIELDS, files={"file": b"x" * 500_000})
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
        assert not any(connection.received for connection in engine.connections)
        async with sending(running) as (reader, writer):
            writer.write(chunk(part("model", b"sim") + part("file", b"x" * 300_000, '; filename="f"')[:-2]))
            await until(lambda: any(connection.received >= 300_000 for connection in engine.connections))
            writer.write(chunk(b"x" * 300_000))
            status, said = await answer_of(reader)
            assert (status, said["error"]["code"]) == (413, "body_too_large")
        await soon(running.idle, 0.5)
        assert not engine.requests


async def test_a_form_that_arrives_too_slowly_ends_with_an_error() -> None:
    async with mixed(timeouts={"request_body": 0.3}) as (running, [engine]), sending(running) as (reader, writer):
        writer.write(chunk(part("model", b"sim") + part("file", b"x", '; filename="f"')[:-2]))
        status, said = await answer_of(reader)
        assert (status, said["error"]["code"]) == (408, "request_timeout")
        await soon(running.idle, 0.5)
        assert not engine.requests


async def test_a_client_that_leaves_during_its_form_ends_its_leg_at_once() -> None:
    async with mixed() as (running, [engine]):
        async with sending(running) as (_, writer):
            writer.write(chunk(part("model", b"sim") + part("file", b"x" * 1000, '; filename="f"')[:-2]))
            await until(lambda: any(connection.received >= 900 for connection in engine.connections))
            open_ = len(engine.connections)
        await soon(lambda: running.idle() and len(engine.connections) < open_, 0.5)
        metrics = await running.metrics()
        assert sum(n for name, n in metrics.items() if name.startswith("pd_proxy_client_disconnects_total")) == 1
        assert not engine.requests


async def test_the_answer_of_an_engine_before_the_end_of_the_form_is_passed_on() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, head: bytes) -> None:
        body = b'{"error":{"message":"no room for it","type":"BadRequestError","param":null,"code":400}}'
        writer.write(
            b"HTTP/1.1 400 Bad\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body
        )
        await writer.drain()
        await reader.read()

    async with (
        engine_that(serve) as url,
        running_gateway(mixed=[url], kind="openai") as running,
        sending(running) as (reader, writer),
    ):
        writer.write(chunk(part("model", b"sim") + part("file", b"x" * 1000, '; filename="f"')[:-2]))
        status, said = await answer_of(reader)
        assert (status, said["error"]["message"]) == (400, "no room for it")
        await soon(running.idle, 0.5)


async def events_of(running: Running) -> tuple[int, list[bytes]]:
    async with running.http.stream("POST", PATH, data={**FIELDS, "stream": "true"}, files=FILES) as answer:
        body = await answer.aread()
        return answer.status_code, [event.removeprefix(b"data: ") for event in body.split(b"\n\n") if event]


async def test_an_error_event_as_the_first_event_is_retried() -> None:
    async with mixed(2) as (running, engines):
        engines[0].faults.add("error_event_first", count=1)
        engines[1].faults.add("error_event_first", count=1)
        status, events = await events_of(running)
        assert status == 200 and events[-1] == b"[DONE]" and b"error" not in b"".join(events)
        assert await retries(running) == {'pd_proxy_retries_total{leg="decode",reason="failed"}': 2}


@pytest.mark.parametrize(("ending", "code"), [("reset", "backend_cut"), ("close", "backend_cut"), ("error", None)])
async def test_a_stream_that_breaks_ends_with_an_error_event(ending: str, code: str | None) -> None:
    async with mixed(2) as (running, engines):
        for engine in engines:
            engine.faults.add("die_mid_stream", after_tokens=3, ending=ending)
        status, events = await events_of(running)
        assert status == 200 and len(events) == 4
        error = json.loads(events[-1])["error"]
        assert error["code"] == code if code else error["type"] == "InternalServerError"
        assert sum(len(engine.requests) for engine in engines) == 1, "what has begun is not begun again"
        assert running.idle()


async def test_a_client_that_does_not_read_its_events_slows_the_engine() -> None:
    event = b"data: " + json.dumps({"text": "x" * 10_000}).encode() + b"\n\n"
    written = 0
    ended = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, head: bytes) -> None:
        nonlocal written
        while not (await reader.readline()).startswith(b"--"):
            pass
        while not (await reader.read(65536)).endswith(b"0\r\n\r\n"):
            pass
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        try:
            while True:
                writer.write(chunk(event))
                await writer.drain()
                written += len(event)
        finally:
            ended.set()

    async with engine_that(serve) as url, running_gateway(mixed=[url], kind="openai") as running:
        async with running.http.stream("POST", PATH, data=FIELDS, files={"file": b"x"}) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            await until(lambda: any(not connection.writable for connection in running.connections))
            [backend] = running.gateway.fleet
            assert backend.inflight_requests == 1
            stream = answer.aiter_raw()
            await anext(stream)
            assert (await anext(stream)).count(b"x") > 0
            assert written < 60_000_000, "the gateway swallows what the client does not read"
        await asyncio.wait_for(ended.wait(), 30)
        await soon(running.idle, 0.5)


async def test_hand_off_fields_in_an_event_do_not_reach_the_client() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, head: bytes) -> None:
        await reader.readuntil(b"\r\n0\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n")
        writer.write(
            b'data: {"a":1,"kv_transfer_params":{"remote_host":"10.0.0.1"}}\n\ndata: {"b":2}\n\ndata: [DONE]\n\n'
        )
        await writer.drain()

    async with engine_that(serve) as url, running_gateway(mixed=[url], kind="openai") as running:
        status, events = await events_of(running)
        assert (status, events) == (200, [b'{"a":1}', b'{"b":2}', b"[DONE]"])


@pytest.mark.parametrize("kind", ["text/html", "application/xml", ""])
async def test_an_invalid_answer_of_an_engine_is_not_passed_on(kind: str) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, head: bytes) -> None:
        await reader.readuntil(b"\r\n0\r\n\r\n")
        writer.write(f"HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\nconnection: close\r\n\r\n<html>10.0.0.1".encode())
        await writer.drain()

    async with (
        engine_that(serve) as url,
        running_gateway(mixed=[url], kind="openai", retries={"attempts": 1}) as running,
    ):
        answer = await running.http.post(PATH, data=FIELDS, files=FILES)
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "backend_garbled")
        assert "10.0.0.1" not in answer.text
