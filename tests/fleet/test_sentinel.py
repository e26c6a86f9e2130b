"""The sentinel connection to an engine, which ends as soon as the engine has gone."""

from __future__ import annotations

import asyncio

import pytest
from pd_proxy.fleet.health.sentinel import Sentinel, SentinelClosed

from tests.fleet.raw import answer, raw_engine
from tests.support import pools, simulators, until
from tests.support import running_gateway as gateway


async def test_all_requests_of_a_sentinel_use_one_connection() -> None:
    async with simulators("decode") as [d]:
        sentinel = await Sentinel.connect(d.url, b"", lambda: None, 1)
        for _ in range(3):
            status, body = await sentinel.ask("/version", 1)
            assert (status, body) == (200, b'{"version":"0.32.0"}')
        assert (await sentinel.ask("/nothing", 1))[0] == 404
        assert sentinel.holds and len(d.connections) == 1
        sentinel.close()
        await until(lambda: not d.connections)


async def test_the_owner_is_called_when_the_engine_dies() -> None:
    lost: list[bool] = []
    async with simulators("decode") as [d]:
        sentinel = await Sentinel.connect(d.url, b"", lambda: lost.append(True), 1)
        d.kill()
        await until(lambda: lost == [True])
        with pytest.raises(SentinelClosed):
            await sentinel.ask("/version", 1)


async def test_an_engine_that_does_not_answer_in_time_ends_the_connection() -> None:
    lost: list[bool] = []
    async with simulators("decode") as [d]:
        d.faults.add("hang", leg="health")
        sentinel = await Sentinel.connect(d.url, b"", lambda: lost.append(True), 1)
        with pytest.raises(SentinelClosed):
            await sentinel.ask("/health", 0.05)
        await until(lambda: lost == [True])
        assert not sentinel.holds


async def silent(head: bytes, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(60)


async def test_closing_a_sentinel_fails_its_request_and_does_not_call_the_owner() -> None:
    lost: list[bool] = []
    async with raw_engine(silent) as engine:
        sentinel = await Sentinel.connect(engine.url, b"", lambda: lost.append(True), 1)
        asking = asyncio.create_task(sentinel.ask("/version", 60))
        await until(lambda: bool(engine.heads))
        sentinel.close()
        with pytest.raises(SentinelClosed):
            await asking
        assert not sentinel.holds and lost == []


@pytest.mark.parametrize(
    "said",
    [
        answer(b"x", b"content-encoding: gzip"),
        answer(b" " * 5_000_000),
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n" + b"x: %b\r\n" % (b"y" * 1000) * 1000,
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        b"",
    ],
    ids=["encoded", "too long", "endless trailers", "no HTTP", "nothing"],
)
async def test_an_answer_that_is_not_whole_and_plain_ends_the_connection(said: bytes) -> None:
    lost: list[bool] = []
    async with raw_engine(said) as engine:
        sentinel = await Sentinel.connect(engine.url, b"", lambda: lost.append(True), 1)
        with pytest.raises(SentinelClosed):
            await sentinel.ask("/version", 60)
        await until(lambda: lost == [True])
        assert not sentinel.holds


async def test_an_answer_without_a_request_ends_the_connection() -> None:
    lost: list[bool] = []

    async def serve(head: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(b"{}"))
        await writer.drain()
        await answered.wait()
        writer.write(answer(b"{}"))
        await asyncio.sleep(60)

    answered = asyncio.Event()
    async with raw_engine(serve) as engine:
        sentinel = await Sentinel.connect(engine.url, b"x-key: 1\r\n", lambda: lost.append(True), 1)
        assert await sentinel.ask("/version", 60) == (200, b"{}")
        assert b"\r\naccept-encoding: identity\r\nx-key: 1\r\n\r\n" in engine.heads[0]
        answered.set()
        await until(lambda: lost == [True])
        assert not sentinel.holds


async def test_an_engine_that_is_not_there_raises() -> None:
    async with simulators("decode") as [d]:
        url = d.url
    with pytest.raises(SentinelClosed):
        await Sentinel.connect(url, b"", lambda: None, 1)


async def test_an_identity_is_known_from_when_a_backend_comes_up_until_its_engine_dies() -> None:
    async with pools(1, 1) as (running, _, [d]):
        backends = list(running.gateway.fleet)
        assert all(backend.identity is not None and backend.identity.block_size == 16 for backend in backends)
        [decode] = [backend for backend in backends if backend.role == "decode"]
        d.kill()
        await until(lambda: decode.identity is None)


async def test_an_engine_that_restarts_within_a_moment_has_another_identity() -> None:
    """No health check has seen that it was away, and its block size may be another."""
    async with simulators("decode") as [d], gateway(decode=[d.url], health={"interval": 60.0}) as running:
        [decode] = running.gateway.fleet.pool("decode")
        before = decode.identity
        assert before is not None
        await d.restart()
        await until(lambda: decode.identity is not before)
        await until(lambda: decode.identity is not None)


async def test_a_sentinel_connects_again_when_the_engine_has_closed_an_idle_connection() -> None:
    async with (
        simulators("decode", keep_alive=0.1) as [d],
        gateway(decode=[d.url], health={"interval": 5.0}) as running,
    ):
        [decode] = running.gateway.fleet.pool("decode")
        before = decode.identity
        await until(lambda: decode.identity is not before)
        await until(lambda: decode.identity is not None)
        assert decode.up


async def test_an_identity_that_was_dropped_is_read_again() -> None:
    async with simulators("decode") as [d], gateway(decode=[d.url]) as running:
        [decode] = running.gateway.fleet.pool("decode")
        decode.learn(None)
        assert decode.up and decode.identity is None
        await until(lambda: decode.identity is not None)


async def test_a_failed_leg_makes_the_identity_be_read_again() -> None:
    async with pools(1, 1) as (running, _, [d]):
        [decode] = running.gateway.fleet.pool("decode")
        before = decode.identity
        d.faults.add("status", leg="decode", status=500, count=1)
        await running.http.post("/v1/completions", json={"model": "sim", "prompt": "hello", "max_tokens": 4})
        assert decode.identity is not before
        await asyncio.wait_for(_known(decode), 5)


async def _known(backend: object) -> None:
    await until(lambda: backend.identity is not None)  # type: ignore[attr-defined]
