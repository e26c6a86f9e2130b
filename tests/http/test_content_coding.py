"""Request bodies with a content coding."""

from __future__ import annotations

import gzip
import json
import zlib
from typing import Any

import pytest

from tests.support import Running, chat, pools, soon

pytestmark = pytest.mark.cross_product

CHAT = "/v1/chat/completions"
KB = 1024


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


def in_parts(data: bytes) -> bytes:
    return b"".join(gzip.compress(data[place : place + 40]) for place in range(0, len(data), 40))


async def post(running: Running, body: bytes, coding: str, path: str = CHAT) -> Any:
    return await running.http.post(path, content=body, headers={"content-encoding": coding})


@pytest.mark.parametrize(
    ("coding", "pack"),
    [
        ("gzip", gzip.compress),
        ("x-gzip", gzip.compress),
        ("GZIP", gzip.compress),
        ("gzip, identity", gzip.compress),
        ("gzip", in_parts),
        ("deflate", zlib.compress),
        ("deflate", raw_deflate),
        ("identity", bytes),
        ("", bytes),
    ],
)
async def test_known_codings_are_decoded(coding: str, pack: Any) -> None:
    async with pools() as (running, [p], [d]):
        answer = await post(running, pack(json.dumps(chat()).encode()), coding)
        assert answer.status_code == 200, answer.text
        assert (
            await post(running, pack(b'{"model":"sim","prompt":"one two"}'), coding, "/tokenize")
        ).status_code == 200
        assert not any("content-encoding" in request.headers for request in (*p.requests, *d.requests))


@pytest.mark.parametrize("coding", ["br", "zstd", "compress", "gzip, br", "gzip, gzip", "aes128gcm", "\x01", "x" * 500])
@pytest.mark.parametrize("path", [CHAT, "/v1/messages", "/v1/embeddings", "/v1/audio/transcriptions"])
async def test_other_codings_are_refused_with_their_name_and_those_that_are_accepted(coding: str, path: str) -> None:
    async with pools() as (running, [p], _):
        answer = await post(running, b"\x00\xff", coding, path)
        if coding == "\x01":
            assert answer.status_code == 400
            return
        assert answer.status_code == 415, answer.text
        assert answer.headers["accept-encoding"] == "gzip, deflate"
        assert "gzip, deflate" in answer.json()["error"]["message"]
        assert coding[:64] in answer.json()["error"]["message"]
        assert not p.requests


@pytest.mark.parametrize(
    ("coding", "body", "hint"),
    [
        ("gzip", b'{"model":"sim"}', "not valid gzip"),
        ("deflate", b'{"model":"sim"}', "not valid deflate"),
        ("gzip", gzip.compress(b'{"model":"sim"}', mtime=0)[:-4], "before the end of its gzip"),
        ("gzip", b"", "before the end of its gzip"),
        ("deflate", zlib.compress(b"{}") + b"more", "bytes after the end"),
        ("gzip", gzip.compress(b"{}", mtime=0) + b"more", "not valid gzip"),
        ("gzip", gzip.compress(b"", mtime=0) * 1000, "bytes after the end"),
        ("gzip", gzip.compress(b"", mtime=0), "empty"),
        ("gzip", gzip.compress(b"nope", mtime=0), "not valid JSON"),
    ],
)
async def test_a_body_that_is_not_valid_in_its_coding_is_refused(coding: str, body: bytes, hint: str) -> None:
    async with pools() as (running, _, _):
        answer = await post(running, body, coding)
        assert answer.status_code == 400
        assert hint in answer.json()["error"]["message"]


async def test_a_decoded_body_is_bounded_and_counted() -> None:
    limits = {"request_body": 1024 * KB, "bodies": 8192 * KB}
    async with pools(limits=limits) as (running, _, _):
        bomb = gzip.compress(b" " * 64 * 1024 * KB)
        answer = await post(running, bomb, "gzip")
        assert answer.status_code == 413
        assert "once its gzip is decoded" in answer.json()["error"]["message"]
        kind: Any = running.server.config.http_protocol_class
        await soon(lambda: kind.shared.bodies.held == 0, 5)


async def test_a_form_is_not_decoded() -> None:
    async with pools() as (running, _, _):
        headers = {"content-encoding": "gzip", "content-type": "multipart/form-data; boundary=b"}
        answer = await running.http.post("/v1/audio/transcriptions", content=gzip.compress(b"--b--"), headers=headers)
        assert answer.status_code == 415
        assert "form" in answer.json()["error"]["message"]


async def test_a_body_is_decoded_once_if_its_route_is_looked_up() -> None:
    async with pools() as (running, _, _):
        answer = await post(running, gzip.compress(json.dumps(chat()).encode()), "gzip", "/invocations")
        assert answer.status_code == 200, answer.text
