"""Requests and answers through plain ASGI, as the routes that are asked for rarely have them."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from pd_proxy.errors import BodiesFull, GatewayError
from pd_proxy.http.body_memory import Bodies
from pd_proxy.http.client_connections import Connections
from pd_proxy.http.response import Receive, Scope, Send
from pd_proxy.http.server import GatewayProtocol
from pd_proxy.http.server_exchange import ServerExchange

from tests.support import until

from .serving import TEXT, Server, error, parts, request


class Plain(Server):
    """A server whose application gets ASGI's `receive` and `send`."""

    asgi: Any

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.seen.append(scope["path"])
        await type(self).asgi(scope, receive, send)


def serve_asgi(server: Server, app: Any) -> None:
    server.__class__ = type("Plain", (Plain,), {"asgi": staticmethod(app)})


def start(*headers: tuple[bytes, bytes], status: int = 200) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": list(headers)}


def body(data: bytes = b"", *, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


async def asked(server: Server, *messages: dict[str, Any], head: bytes | None = None) -> bytes:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in messages:
            await send(message)

    serve_asgi(server, app)
    return await server.say(head or request("/", "connection: close"))


LENGTH = (b"content-length", b"5")


async def test_an_answer_with_a_length_is_sent_as_it_is(server: Server) -> None:
    answer = await asked(server, start(LENGTH), body(b"he", more=True), body(b"llo"))
    assert answer == b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\nconnection: close\r\n\r\nhello"


async def test_an_answer_without_a_length_is_chunked(server: Server) -> None:
    answer = await asked(server, start(), body(b"he", more=True), body(b"", more=True), body(b"llo"))
    assert parts(answer)[1]["transfer-encoding"] == "chunked"
    assert answer.endswith(b"\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n")


async def test_an_older_client_gets_no_chunks_but_the_connections_end(server: Server) -> None:
    head = request("/", "connection: keep-alive", version="1.0")
    answer = await asked(server, start(), body(b"he", more=True), body(b"llo"), head=head)
    status, headers, rest = parts(answer)
    assert (status, rest) == (200, b"hello")
    assert headers == {"connection": "close"}


async def test_framing_that_an_application_sets_is_the_servers_own(server: Server) -> None:
    answer = await asked(server, start((b"transfer-encoding", b"chunked")), body(b"hello"))
    assert answer.count(b"transfer-encoding") == 1
    assert answer.endswith(b"5\r\nhello\r\n0\r\n\r\n")


@pytest.mark.parametrize("status", [204, 304])
async def test_an_answer_that_has_no_body_has_no_framing(server: Server, status: int) -> None:
    answer = await asked(server, start(status=status), body())
    assert b"chunked" not in answer
    assert answer.endswith(b"connection: close\r\n\r\n")


async def test_the_answer_to_head_is_its_head(server: Server) -> None:
    answer = await asked(server, start(LENGTH), body(b"hello"), head=request("/", "connection: close", method="HEAD"))
    assert answer == b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\nconnection: close\r\n\r\n"


async def test_an_application_can_end_the_connection(server: Server) -> None:
    answer = await asked(server, start(LENGTH, (b"Connection", b"Close")), body(b"hello"), head=request())
    assert answer.count(b"onnection: close") == 1


@pytest.mark.parametrize(
    "messages",
    [
        [start((b"x", b"a\r\nset-cookie: b"))],
        [start((b"x\r\ny", b"a"))],
        [start((b"x y", b"a"))],
        [start((b"", b"a"), (b"a:b", b""))],
        [start(status=600)],
        [body(b"hello")],
        [],
    ],
    ids=["value", "name", "space", "colon", "status", "no head", "nothing"],
)
async def test_a_faulty_application_is_answered_for_and_logged(
    server: Server, messages: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    status, detail = error(await asked(server, *messages, head=request()))
    assert (status, detail["code"]) == (500, "internal_error")
    assert "set-cookie" not in detail["message"]
    assert [record.name for record in caplog.records if record.levelno == logging.ERROR] == ["pd_proxy.http"]


@pytest.mark.parametrize(
    "messages",
    [
        [start(LENGTH), body(b"hell")],
        [start(LENGTH), body(b"hello!")],
        [start(LENGTH), body(b"he", more=True)],
        [start(), body(b"he", more=True), start()],
    ],
    ids=["short", "long", "unfinished", "twice"],
)
async def test_an_answer_that_cannot_be_ended_is_cut(
    server: Server, messages: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    answer = await asked(server, *messages, head=request())
    assert not answer.endswith(b"0\r\n\r\n")
    assert not answer.endswith(b"hello")
    assert any(record.levelno == logging.ERROR for record in caplog.records)


async def test_a_body_comes_in_pieces_and_then_the_disconnect(server: Server) -> None:
    heard: list[Any] = []
    first, ended = asyncio.Event(), asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            heard.append((message["type"], message.get("body"), message.get("more_body")))
            first.set()
            if message["type"] == "http.disconnect":
                ended.set()
                return

    serve_asgi(server, app)
    async with server.connect() as (_, writer):
        writer.write(request("/", "content-length: 6", method="POST") + b"one")
        await first.wait()
        writer.write(b"two")
        while len(heard) < 2:
            await asyncio.sleep(0)
        writer.close()
        await ended.wait()
    assert heard == [("http.request", b"one", True), ("http.request", b"two", False), ("http.disconnect", None, None)]


async def test_a_body_is_asked_for_only_when_it_is_read(server: Server) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        message = await receive()
        await send(start(LENGTH))
        await send(body(message["body"]))

    serve_asgi(server, app)
    async with server.connect() as (reader, writer):
        writer.write(request("/", "expect: 100-continue", "content-length: 5", method="POST"))
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"hello")
        assert (await reader.readuntil(b"hello")).startswith(b"HTTP/1.1 200 OK")


async def test_the_scope_is_asgis(server: Server) -> None:
    scopes: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scopes.append(scope)
        await send(start(LENGTH))
        await send(body(b"hello"))

    serve_asgi(server, app)
    await server.say(request("/a%20b/c%2Fd?x=%31&y", "connection: close", "X-Y: Z"))
    [scope] = scopes
    assert scope["type"] == "http" and scope["asgi"] == {"version": "3.0", "spec_version": "2.3"}
    assert (scope["http_version"], scope["method"], scope["scheme"], scope["root_path"]) == ("1.1", "GET", "http", "")
    assert (scope["path"], scope["raw_path"], scope["query_string"]) == ("/a b/c/d", b"/a%20b/c%2Fd", b"x=%31&y")
    assert scope["headers"] == [(b"host", b"gateway"), (b"connection", b"close"), (b"x-y", b"Z")]
    assert scope["server"] == ("127.0.0.1", server.port) and scope["client"][0] == "127.0.0.1"
    assert scope["state"] == {}


async def test_a_head_that_comes_in_two_reads_behind_a_running_request_is_whole(server: Server) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/first":
            begun.set()
            await go_on.wait()
        await send(start(LENGTH, (b"x-headers", b"%d" % len(scope["headers"]))))
        await send(body(b"hello"))

    serve_asgi(server, app)
    async with server.connect() as (reader, writer):
        writer.write(request("/first"))
        await begun.wait()
        [connection] = server.connections
        whole = request("/second", "a: b", "c: d", "connection: close")
        writer.write(whole[:30])
        while connection.url != b"/second":
            await asyncio.sleep(0)
        go_on.set()
        await reader.readuntil(b"hello")
        writer.write(whole[30:])
        assert b"x-headers: 4\r\n" in await reader.read()
    assert server.seen == ["/first", "/second"]


async def test_a_status_that_does_not_exist_is_answered_with_500(server: Server) -> None:
    async def app(scope: Scope, client: ServerExchange, receive: Receive) -> None:
        client.respond(600, [], b"")

    server.app = app
    assert error(await server.say(request()))[0] == 500


async def test_a_fault_after_the_answer_leaves_the_next_request_alone(server: Server) -> None:
    second, failed = asyncio.Event(), asyncio.Event()

    async def app(scope: Scope, client: ServerExchange, receive: Receive) -> None:
        if scope["path"] == "/first":
            client.respond(200, [TEXT], b"first")
            await second.wait()
            failed.set()
            raise ValueError
        second.set()
        await failed.wait()
        await asyncio.sleep(0)  # the other task has ended
        client.respond(200, [TEXT], b"second")

    server.app = app
    answers = await server.say(request("/first") + request("/second", "connection: close"))
    assert answers.count(b"200 OK") == 2
    assert answers.endswith(b"second")


async def test_a_fault_after_the_body_was_refused_does_not_cut_the_refusal(server: Server) -> None:
    failed = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        failed.set()
        raise ValueError

    serve_asgi(server, app)
    async with server.connect() as (reader, writer):
        writer.write(request("/", "transfer-encoding: chunked", method="POST") + b"no size\r\n")
        await failed.wait()
        for _ in range(20):
            writer.write(b"x" * 100_000)  # unread when the connection closes, it resets the connection
            await asyncio.sleep(0)
        assert error(await reader.read())[0] == 400


async def test_a_body_that_was_refused_is_not_asked_for(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    ended = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert (await receive())["type"] == "http.disconnect"
        ended.set()

    serve_asgi(server, app)
    said = request("/", "transfer-encoding: chunked", "expect: 100-continue", method="POST", body=b"no size\r\n")
    assert error(await server.say(said))[0] == 400
    await until(ended.is_set)
    assert not caplog.records


async def test_an_application_can_hold_nothing_for_a_client_that_has_gone(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = Connections()
    monkeypatch.setattr(GatewayProtocol, "shared", shared)
    begun, gone, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def decoding(scope: Scope, client: ServerExchange, receive: Receive) -> None:
        client.on_gone = gone.set
        begun.set()
        await gone.wait()
        with pytest.raises(GatewayError):
            client.hold(1000)
        ended.set()

    server.app = decoding
    async with server.connect() as (_, writer):
        writer.write(request("/", "content-length: 3", method="POST", body=b"abc"))
        await begun.wait()
        writer.close()
        await ended.wait()
    assert shared.bodies.held == 0


@pytest.mark.parametrize("rest", [b"", b"c"], ids=["stalled", "whole"])
async def test_a_body_that_was_refused_before_it_is_gathered_is_not_waited_for(server: Server, rest: bytes) -> None:
    begun, refused = asyncio.Event(), asyncio.Event()

    async def app(scope: Scope, client: ServerExchange, receive: Receive) -> None:
        begun.set()
        await refused.wait()
        with pytest.raises(BodiesFull):
            await client.gather(100)
        client.respond(503, [(b"connection", b"close")], b"full")

    server.app = app
    async with server.connect() as (reader, writer):
        writer.write(request("/", "content-length: 3", method="POST", body=b"ab"))
        await begun.wait()
        [connection] = server.connections
        exchange = connection.active
        exchange._looks_at_refusal = True  # as those of the routes that engines serve
        exchange.refuse(BodiesFull("full", retry_after=1))
        writer.write(rest)
        if rest:
            await until(lambda: exchange.whole)
        refused.set()
        assert (await reader.read()).endswith(b"full")


@pytest.mark.parametrize("bad", [b"size\r\n", b"1000\r\n" + b"x" * 4096], ids=["not valid", "too much"])
async def test_who_reads_a_body_while_it_answers_is_told_when_the_rest_is_refused(
    server: Server, monkeypatch: pytest.MonkeyPatch, bad: bytes
) -> None:
    monkeypatch.setattr(GatewayProtocol, "shared", Connections(bodies=Bodies(limit=2000, longest=1600)))
    begun, heard = asyncio.Event(), asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(start())
        await send(body(b"first", more=True))
        begun.set()
        while (await receive())["type"] != "http.disconnect":
            pass
        heard.set()
        await send(body(b"last"))

    serve_asgi(server, app)
    async with server.connect() as (reader, writer):
        writer.write(request("/", "transfer-encoding: chunked", method="POST"))
        await begun.wait()
        writer.write(bad)
        await heard.wait()
        assert (await reader.read()).endswith(b"5\r\nfirst\r\n4\r\nlast\r\n0\r\n\r\n")


async def test_a_body_that_was_put_back_can_be_received(server: Server) -> None:
    async def app(scope: Scope, client: ServerExchange, receive: Receive) -> None:
        body = client.body
        assert body is not None
        client.put_back(body)
        client.respond(200, [TEXT], (await receive())["body"])

    server.app = app
    whole = request("/", "content-length: 3", "connection: close", method="POST", body=b"abc")
    assert (await server.say(whole)).endswith(b"abc")


async def test_a_client_that_speaks_http_1_0_is_not_told_to_continue(server: Server) -> None:
    async with server.connect() as (reader, writer):
        writer.write(request("/", "expect: 100-continue", "content-length: 2", method="POST", version="1.0"))
        await until(lambda: bool(server.seen))
        writer.write(b"ok")
        assert (await reader.read()).startswith(b"HTTP/1.1 200 OK\r\n")
