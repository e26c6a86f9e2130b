"""Requests whose framing two readers could understand in two ways: what each is answered, and what is seen of it.

Each is either refused, and nothing behind it is read as a request, or understood in the one way of RFC 9112. Whatever
implements the server's protocol must answer these requests so.
"""

from __future__ import annotations

import json
import re

import pytest

from .serving import Server

POST = b"POST / HTTP/1.1\r\nhost: a\r\n"
GET = b"GET / HTTP/1.1\r\nhost: a\r\n"
CLOSE = b"connection: close\r\n"
CHUNKED = b"transfer-encoding: chunked\r\n"
NEXT = b"GET /next HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"
"""A request behind the one at hand: seen in its place or not at all."""

INVALID = [
    POST + b"content-length: 0\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n" + NEXT,
    POST + CHUNKED + b"content-length: 0\r\n\r\n0\r\n\r\n" + NEXT,
    POST + b"content-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n" + NEXT,
    POST + CHUNKED + b"content-length: 3\r\n\r\n0\r\n\r\n" + NEXT,
    POST + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n" + NEXT,
    POST + CHUNKED + b"content-length: 5\r\n\r\n0\r\n\r\n" + NEXT,
    POST + b"content-length: 6\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n" + NEXT,
    POST + CHUNKED + b"content-length: 6\r\n\r\n0\r\n\r\n" + NEXT,
    POST + b"content-length: 100\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n" + NEXT,
    POST + CHUNKED + b"content-length: 100\r\n\r\n0\r\n\r\n" + NEXT,
    POST + b"content-length: 3\r\nTransfer-Encoding: Chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n" + NEXT,
    POST + b"content-length: 3\r\ntransfer-encoding: identity\r\n\r\nabc" + NEXT,
    POST + CLOSE + b"content-length: +3\r\n\r\nabc",
    POST + CLOSE + b"content-length: -3\r\n\r\nabc",
    POST + CLOSE + b"content-length: 0x3\r\n\r\nabc",
    POST + CLOSE + b"content-length: 3a\r\n\r\nabc",
    POST + CLOSE + b"content-length: 3 3\r\n\r\nabc",
    POST + CLOSE + b"content-length: 3,3\r\n\r\nabc",
    POST + CLOSE + b"content-length: 3, 4\r\n\r\nabc",
    POST + CLOSE + b"content-length: \r\n\r\nabc",
    POST + CLOSE + b"content-length:  \r\n\r\nabc",
    POST + CLOSE + b"content-length: 3.0\r\n\r\nabc",
    POST + CLOSE + b"content-length: 3;\r\n\r\nabc",
    POST + CLOSE + b"content-length: 3_0\r\n\r\nabc",
    POST + CLOSE + b"content-length: \xb2\r\n\r\nabc",
    POST + CLOSE + b"content-length: 18446744073709551616\r\n\r\nabc",
    POST + CLOSE + b"content-length: 18446744073709551619\r\n\r\nabc",
    POST + CLOSE + b"content-length: 4294967299000000000000000\r\n\r\nabc",
    POST + b"content-length: 3\r\ncontent-length: 3\r\n\r\nabc" + NEXT,
    POST + b"content-length: 3\r\ncontent-length: 4\r\n\r\nabc" + NEXT,
    POST + b"content-length: 4\r\ncontent-length: 3\r\n\r\nabc" + NEXT,
    POST + b"content-length: 0\r\ncontent-length: 3\r\n\r\nabc" + NEXT,
    POST + b"content-length: 3\r\ncontent-length: \r\n\r\nabc" + NEXT,
    POST + b"content-length: 3\r\nContent-Length: 3\r\n\r\nabc" + NEXT,
    POST + CLOSE + b"content-length : 3\r\n\r\nabc",
    POST + CLOSE + b"content-length\t: 3\r\n\r\nabc",
    POST + CLOSE + b" content-length: 3\r\n\r\nabc",
    POST + CLOSE + b"content length: 3\r\n\r\nabc",
    POST + CLOSE + b"content-length\x00: 3\r\n\r\nabc",
    POST + CLOSE + b"content-length\x0b: 3\r\n\r\nabc",
    POST + CLOSE + b"\x0ccontent-length: 3\r\n\r\nabc",
    POST + CLOSE + b"transfer-encoding : chunked\r\n\r\n0\r\n\r\n",
    POST + CLOSE + b"transfer-encoding\t: chunked\r\n\r\n0\r\n\r\n",
    POST + CLOSE + b" transfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    POST + CLOSE + b"transfer encoding: chunked\r\n\r\n0\r\n\r\n",
    POST + CLOSE + b"transfer-encoding\x00: chunked\r\n\r\n0\r\n\r\n",
    POST + CLOSE + b"X: y\r\n transfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    POST + CLOSE + b"transfer-encoding: chunked, chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    POST + CLOSE + b"transfer-encoding: chunked,\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    POST + CLOSE + b"transfer-encoding: chunked, gzip\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    POST + CLOSE + b"transfer-encoding: \r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    POST + CLOSE + b"transfer-encoding: \x0bchunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    POST + CLOSE + b"transfer-encoding: chunked\x0b\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    POST + CLOSE + b"transfer-encoding: \x00chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    POST + CLOSE + b"transfer-encoding: chunked\x00\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    POST + CLOSE + b"transfer-encoding: c\r\n hunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    POST + CHUNKED + CHUNKED + b"\r\n0\r\n\r\n" + NEXT,
    POST + CHUNKED + b"transfer-encoding: identity\r\n\r\n0\r\n\r\n" + NEXT,
    POST + CLOSE + CHUNKED + b"\r\n3 \r\nabc\r\n0\r\n\r\n",
    POST + CLOSE + CHUNKED + b"\r\n 3\r\nabc\r\n0\r\n\r\n",
    POST + CLOSE + CHUNKED + b"\r\n3\t\r\nabc\r\n0\r\n\r\n",
    POST + CLOSE + CHUNKED + b"\r\n+3\r\nabc\r\n0\r\n\r\n",
    POST + CLOSE + CHUNKED + b"\r\n-3\r\nabc\r\n0\r\n\r\n",
    POST + CLOSE + CHUNKED + b"\r\n0x3\r\nabc\r\n0\r\n\r\n",
    POST + CLOSE + CHUNKED + b"\r\n3x\r\nabc\r\n0\r\n\r\n",
    POST + CLOSE + CHUNKED + b"\r\n\r\nabc\r\n0\r\n\r\n",
    POST + CLOSE + CHUNKED + b"\r\ng\r\nabc\r\n0\r\n\r\n",
    POST + CLOSE + CHUNKED + b"\r\n3 3\r\nabc\r\n0\r\n\r\n",
    POST + CLOSE + CHUNKED + b"\r\n3,\r\nabc\r\n0\r\n\r\n",
    POST + CLOSE + CHUNKED + b"\r\n\xb3\r\nabc\r\n0\r\n\r\n",
    POST + CLOSE + CHUNKED + b"\r\n3\x00\r\nabc\r\n0\r\n\r\n",
    POST + CLOSE + CHUNKED + b"\r\n3;\n\r\nabc\r\n0\r\n\r\n",
    POST + CLOSE + CHUNKED + b"\r\n3;a\rb\r\nabc\r\n0\r\n\r\n",
    POST + CLOSE + CHUNKED + b"\r\n3;a\nb\r\nabc\r\n0\r\n\r\n",
    POST + CLOSE + CHUNKED + b"\r\nfffffffffffffffff\r\nabc\r\n0\r\n\r\n",
    POST + CLOSE + CHUNKED + b"\r\n10000000000000003\r\nabc\r\n0\r\n\r\n",
    POST + CLOSE + CHUNKED + b"\r\n3\r\r\nabc\r\n0\r\n\r\n",
    POST + CHUNKED + CLOSE + b"\r\n3\nabc\r\n0\r\n\r\n",
    POST + CHUNKED + CLOSE + b"\r\n3\r\nabc\n0\r\n\r\n",
    POST + CHUNKED + CLOSE + b"\r\n3\r\nabc0\r\n\r\n",
    POST + CHUNKED + CLOSE + b"\r\n3\r\nabcd\r\n0\r\n\r\n",
    POST + CHUNKED + CLOSE + b"\r\n3\rabc\r\n0\r\n\r\n",
    POST + CHUNKED + CLOSE + b"\r\n3\r\nabc\r\n0\n\r\n",
    POST + CHUNKED + CLOSE + b"\r\n3\r\nabc\r\n0\r\n\n",
    POST + CHUNKED + CLOSE + b"\r\n3\r\nabc\r0\r\n\r\n",
    POST + CHUNKED + CLOSE + b"\r\n3\r\nabc\r\n0\r\ncontent-length: 9\r\n\r\n",
    POST + CHUNKED + CLOSE + b"\r\n3\r\nabc\r\n0\r\ntransfer-encoding: chunked\r\n\r\n",
    POST + CHUNKED + CLOSE + b"\r\n3\r\nabc\r\n0\r\n x: y\r\n\r\n",
    POST + CHUNKED + CLOSE + b"\r\n3\r\nabc\r\n0\r\nx : y\r\n\r\n",
    POST + CHUNKED + CLOSE + b"\r\n3\r\nabc\r\n0\r\nx: a\x00b\r\n\r\n",
    b"GET / HTTP/1.1\nhost: a\n\n",
    b"GET / HTTP/1.1\r\nhost: a\n\r\n",
    b"GET / HTTP/1.1\rhost: a\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: a\r\r\n\r\n",
    GET + b"x: y\n\r\n",
    GET + b"x: y\rz: w\r\n\r\n",
    GET + b"x: a\r\n b\r\nconnection: close\r\n\r\n",
    GET + b"x: a\r\n\tb\r\nconnection: close\r\n\r\n",
    GET + b"x:\r\n y\r\n\r\n",
    GET + b"x: a\x00b\r\n\r\n",
    GET + b"x\x00: ab\r\n\r\n",
    GET + b"x: a\x7fb\r\nconnection: close\r\n\r\n",
    GET + b"x: a\x01b\r\nconnection: close\r\n\r\n",
    GET + b"x y\r\n\r\n",
    GET + b": y\r\n\r\n",
    GET + b"x\r\n\r\n",
    GET + b"(x): y\r\n\r\n",
    GET + b"x\xe9: y\r\n\r\n",
    GET + b"x;: y\r\n\r\n",
    b" GET / HTTP/1.1\r\nhost: a\r\n\r\n",
    b"GET / HTTP/1.1 \r\nhost: a\r\nconnection: close\r\n\r\n",
    b"GET /a b HTTP/1.1\r\nhost: a\r\n\r\n",
    b"GET\t/ HTTP/1.1\r\nhost: a\r\n\r\n",
    b"GET /\x00 HTTP/1.1\r\nhost: a\r\n\r\n",
    b"GET / HTTP/1.1 x\r\nhost: a\r\n\r\n",
    b"get / HTTP/1.1\r\nhost: a\r\n\r\n",
    b"GET / HTTP/1,1\r\nhost: a\r\n\r\n",
    b"GET / HTTP/01.1\r\nhost: a\r\n\r\n",
    b"GET / HTTPS/1.1\r\nhost: a\r\n\r\n",
    b"G\x00T / HTTP/1.1\r\nhost: a\r\n\r\n",
]

UNKNOWN_CODINGS = [
    POST + CLOSE + b"transfer-encoding: xchunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    POST + CLOSE + b"transfer-encoding: chunkedx\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    POST + CLOSE + b"transfer-encoding: ,chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    POST + CLOSE + b"transfer-encoding: gzip, chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    POST + CLOSE + b"transfer-encoding: identity\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    POST + CLOSE + b"transfer-encoding: chunked;q=1\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    POST + CLOSE + b'transfer-encoding: "chunked"\r\n\r\n3\r\nabc\r\n0\r\n\r\n',
    POST + CLOSE + b"transfer-encoding: 'chunked'\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    POST + CLOSE + b"transfer-encoding: chunked\t\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    POST + CLOSE + b"transfer-encoding: chunked\xa0\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    POST + b"transfer-encoding: identity\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n" + NEXT,
    b"POST / HTTP/1.0\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
]

ANSWERED = [
    (POST + CLOSE + b"content-length: \t3\r\n\r\nabc", ["200 POST / abc"]),
    (POST + CLOSE + b"content-length: 3\t\r\n\r\nabc", ["200 POST / abc"]),
    (POST + CLOSE + b"content-length: 03\r\n\r\nabc", ["200 POST / abc"]),
    (POST + CLOSE + b"content-length: 0003\r\n\r\nabc", ["200 POST / abc"]),
    (POST + CLOSE + b"content_length: 3\r\n\r\nabc", ["200 POST /"]),
    (POST + CLOSE + b"transfer_encoding: chunked\r\n\r\n0\r\n\r\n", ["200 POST /"]),
    (POST + CLOSE + b"transfer-encoding: CHUNKED\r\n\r\n3\r\nabc\r\n0\r\n\r\n", ["200 POST / abc"]),
    (POST + CLOSE + b"transfer-encoding: \tchunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", ["200 POST / abc"]),
    (b"POST / HTTP/1.0\r\nhost: a\r\ncontent-length: 3\r\n\r\nabc" + NEXT, ["200 POST / abc"]),
    (POST + CLOSE + CHUNKED + b"\r\n3\r\nabc\r\n0\r\n\r\n", ["200 POST / abc"]),
    (POST + CLOSE + CHUNKED + b"\r\n03\r\nabc\r\n0\r\n\r\n", ["200 POST / abc"]),
    (POST + CLOSE + CHUNKED + b"\r\n0000003\r\nabc\r\n0\r\n\r\n", ["200 POST / abc"]),
    (POST + CLOSE + CHUNKED + b"\r\n3;a=b\r\nabc\r\n0\r\n\r\n", ["200 POST / abc"]),
    (POST + CLOSE + CHUNKED + b'\r\n3;a="b"\r\nabc\r\n0\r\n\r\n', ["200 POST / abc"]),
    (POST + CHUNKED + CLOSE + b"\r\n3\r\nabc\r\n00\r\n\r\n", ["200 POST / abc"]),
    (POST + CHUNKED + CLOSE + b"\r\n3\r\nabc\r\n0;x\r\n\r\n", ["200 POST / abc"]),
    (POST + CHUNKED + CLOSE + b"\r\n3\r\nabc\r\n0\r\nhost: b\r\n\r\n", ["200 POST / abc"]),
    (GET + b"x: \xff\r\nconnection: close\r\n\r\n", ["200 GET /"]),
    (b"\r\nGET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n", ["200 GET /"]),
    (b"GET  / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n", ["200 GET /"]),
    (b"GET / HTTP/2.0\r\nhost: a\r\n\r\n", ["505 this gateway speaks HTTP/1.1 and HTTP/1.0"]),
    (GET + b"content-length: 3\r\n\r\nabc" + NEXT, ["200 GET / abc", "200 GET /next"]),
    (GET + b"\r\n" + NEXT, ["200 GET /", "200 GET /next"]),
    (GET + b"\r\n\r\n\r\n" + NEXT, ["200 GET /", "200 GET /next"]),
    (POST + b"content-length: 3\r\n\r\nabc\r\n" + NEXT, ["200 POST / abc", "200 GET /next"]),
    (POST + b"content-length: 3\r\n\r\nabcX" + NEXT, ["200 POST / abc", "400 the request is not valid HTTP/1.1"]),
    (POST + CHUNKED + b"\r\n0\r\n\r\n" + NEXT, ["200 POST /", "200 GET /next"]),
    (POST + CHUNKED + b"\r\n0\r\n\r\nX" + NEXT, ["200 POST /", "400 the request is not valid HTTP/1.1"]),
    (POST + CLOSE + b"content-length: 3\r\n\r\nabc" + NEXT, ["200 POST / abc"]),
    (b"HEAD / HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: 0\r\n\r\n", ["200"]),
    (
        GET + b"connection: upgrade\r\nupgrade: h2c\r\ncontent-length: 3\r\n\r\nabc" + NEXT,
        ["200 GET / abc", "200 GET /next"],
    ),
    (
        POST + CHUNKED + b"connection: upgrade, close\r\nupgrade: websocket\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        ["200 POST / abc"],
    ),
    (POST + b"content-length: 3\r\nconnection: content-length\r\n\r\nabc" + NEXT, ["200 POST / abc", "200 GET /next"]),
    (POST + b"expect: 100-continue\r\ncontent-length: 3\r\n\r\nabc" + NEXT, ["200 POST / abc", "200 GET /next"]),
]


def outcomes(answers: bytes) -> list[str]:
    """Of each answer: its status with its body, or with its error's message."""
    found = []
    while answers:
        head, _, rest = answers.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        count = int(length[1]) if length else 0
        body, answers = rest[:count], rest[count:]
        text = json.loads(body)["error"]["message"] if b"application/json" in head else body.decode()
        found.append(f"{head.split()[1].decode()} {text}".rstrip())
    return found


@pytest.mark.parametrize("said", INVALID)
async def test_what_is_not_valid_is_refused(server: Server, said: bytes) -> None:
    assert outcomes(await server.say(said)) == ["400 the request is not valid HTTP/1.1"]
    assert "/next" not in server.seen


@pytest.mark.parametrize("said", UNKNOWN_CODINGS)
async def test_transfer_codings_but_chunked_are_refused(server: Server, said: bytes) -> None:
    answers = outcomes(await server.say(said))
    assert answers == ["400 of all transfer codings only chunked, in HTTP/1.1, is understood"]
    assert server.seen == []


@pytest.mark.parametrize(("said", "expected"), ANSWERED)
async def test_what_can_be_read_in_one_way_is_answered(server: Server, said: bytes, expected: list[str]) -> None:
    assert outcomes(await server.say(said)) == expected
