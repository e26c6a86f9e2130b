"""The simulated MooncakeLayerwiseConnector fails where the real one fails."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.support import until

from .helpers import Client, Start, greedy, start_pair

ID = "00112233445566778899aabbccddeeff"
PATH = "/v1/completions"


@asynccontextmanager
async def metaserver(status: int = 200) -> AsyncIterator[tuple[str, asyncio.Queue[dict[str, Any]]]]:
    """A metaserver: its URL, and the messages that it has received."""
    calls: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = int(head.lower().split("content-length: ")[1].split("\r\n")[0])
        calls.put_nowait(json.loads(await reader.readexactly(length)))
        writer.write(f"HTTP/1.1 {status} X\r\ncontent-length: 0\r\n\r\n".encode())
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1/metaserver", calls


def decode_leg(url: str, **body: Any) -> dict[str, Any]:
    return greedy(**body) | {"kv_transfer_params": {"do_remote_prefill": True, "metaserver": url}}


def prefill_leg(params: dict[str, Any], **body: Any) -> dict[str, Any]:
    return greedy(**body) | {"max_tokens": 1, "kv_transfer_params": params}


@pytest.fixture
async def layerwise(start: Start) -> tuple[Any, Any]:
    return await start_pair(start, "ascend_layerwise", lease=1.0)


async def test_decode_calls_and_prefill_pushes(layerwise: tuple[Any, Any], start: Start, client: Client) -> None:
    p, d = layerwise
    expected = await client.text(await start())
    async with metaserver() as (url, calls):
        asking = asyncio.ensure_future(client.post(d, PATH, decode_leg(url), **{"x-request-id": ID}))
        call = await calls.get()
        assert call["request_id"] == f"cmpl-{ID}-0"
        assert not asking.done()
        told = await client.post(p, PATH, prefill_leg(call), **{"x-request-id": ID})
        assert told.json().get("kv_transfer_params") is None
        assert (await asking).json()["choices"][0]["text"] == expected
    assert d.engine.pulls == 1
    await p.wait_for(lambda: p.engine.used_blocks == 0)


async def test_a_prefill_leg_with_another_id_reaches_no_decode_leg(layerwise: tuple[Any, Any], client: Client) -> None:
    p, d = layerwise
    async with metaserver() as (url, calls):
        asking = asyncio.ensure_future(client.post(d, PATH, decode_leg(url), **{"x-request-id": ID}))
        call = await calls.get()
        await client.post(p, PATH, prefill_leg(call), **{"x-request-id": "another"})
        await until(lambda: d.engine.side.unclaimed_pushes == 1)
        assert (await asking).status_code == 500, "no engine has pushed within the lease"


async def test_a_prefill_leg_with_another_prompt_leads_to_another_text(
    layerwise: tuple[Any, Any], start: Start, client: Client
) -> None:
    p, d = layerwise
    expected = await client.text(await start())
    async with metaserver() as (url, calls):
        asking = asyncio.ensure_future(client.post(d, PATH, decode_leg(url), **{"x-request-id": ID}))
        leg = prefill_leg(await calls.get(), prompt="something else, but as long as the other " * 7)
        await client.post(p, PATH, leg, **{"x-request-id": ID})
        assert (await asking).json()["choices"][0]["text"] != expected


async def test_decode_waits_whatever_the_metaserver_answers(layerwise: tuple[Any, Any], client: Client) -> None:
    _, d = layerwise
    async with metaserver(404) as (url, calls):
        asking = asyncio.ensure_future(client.post(d, PATH, decode_leg(url)))
        await calls.get()
        await until(lambda: d.engine.side.calls == [404])
        assert d.engine.loading == 1
        assert (await asking).status_code == 500
        assert calls.empty(), "an answer is an answer: it does not ask again"


async def test_without_a_metaserver_decode_waits_until_its_lease_ends(
    layerwise: tuple[Any, Any], client: Client
) -> None:
    _, d = layerwise
    leg = greedy() | {"kv_transfer_params": {"do_remote_prefill": True}}
    assert (await client.post(d, PATH, leg)).status_code == 500
    assert d.engine.side.calls == []


async def test_a_leg_without_the_number_of_decodes_cached_tokens_kills_prefill(
    layerwise: tuple[Any, Any], client: Client
) -> None:
    p, _ = layerwise
    leg = prefill_leg({"do_remote_decode": True, "remote_block_ids": [[1]]})
    assert (await client.post(p, PATH, leg)).status_code == 500
    assert p.engine.dead


async def test_prefill_without_decodes_address_answers_and_pushes_nothing(
    layerwise: tuple[Any, Any], client: Client
) -> None:
    p, d = layerwise
    leg = prefill_leg({"do_remote_decode": True, "remote_cached_tokens": 0})
    assert (await client.post(p, PATH, leg)).status_code == 200
    await p.wait_for(lambda: p.engine.used_blocks == 0)
    assert not d.engine.side.unclaimed_pushes
