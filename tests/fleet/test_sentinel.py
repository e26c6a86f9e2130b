"""A connection to an engine that says at once when the engine has gone."""

from __future__ import annotations

import asyncio

import pytest
from pd_proxy.fleet.health.sentinel import Sentinel, SentinelClosed

from tests.fleet.raw import answer, raw_engine
from tests.support import pools, simulators, until
from tests.support import running_gateway as gateway


async def test_it_asks_again_and_again_over_one_connection() -> None:
    async with simulators("decode") as [d]:
        sentinel = await Sentinel.connect(d.url, b"", lambda: None, 1)
        for _ in range(3):
            status, body = await sentinel.ask("/version", 1)
            assert (status, body) == (200, b'{"version":"0.32.0"}')
        assert (await sentinel.ask("/nothing", 1))[0] == 404
        assert sentinel.holds and len(d.connections) == 1
        sentinel.close()
        await until(lambda: not d.connections)


async def test_who_holds_it_is_told_when_the_engine_dies() -> None:
    lost: list[bool] = []
    async with simulators("decode") as [d]:
        sentinel = await Sentinel.connect(d.url, b"", lambda: lost.append(True), 1)
        d.kill()
        await until(lambda: lost == [True])
        with pytest.raises(SentinelClosed):
            await sentinel.ask("/version", 1)


async def test_an_engine_that_does_not_answer_in_time_is_not_tied_to() -> None:
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


async def test_a_request_fails_when_its_sentinel_is_closed_and_nobody_is_told() -> None:
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
async def test_what_is_no_whole_plain_answer_ends_the_connection(said: bytes) -> None:
    lost: list[bool] = []
    async with raw_engine(said) as engine:
        sentinel = await Sentinel.connect(engine.url, b"", lambda: lost.append(True), 1)
        with pytest.raises(SentinelClosed):
            await sentinel.ask("/version", 60)
        await until(lambda: lost == [True])
        assert not sentinel.holds


async def test_bytes_that_nobody_asked_for_end_the_connection() -> None:
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


async def test_nobody_there_is_broken() -> None:
    async with simulators("decode") as [d]:
        url = d.url
    with pytest.raises(SentinelClosed):
        await Sentinel.connect(url, b"", lambda: None, 1)


async def test_facts_are_known_when_a_backend_comes_up_and_gone_when_it_goes() -> None:
    async with pools(1, 1) as (running, _, [d]):
        backends = list(running.gateway.fleet)
        assert all(backend.identity is not None and backend.identity.block_size == 16 for backend in backends)
        [decode] = [backend for backend in backends if backend.role == "decode"]
        d.kill()
        await until(lambda: decode.identity is None)


async def test_an_engine_that_comes_back_within_a_moment_is_another_one() -> None:
    """No health check has seen that it was away, and its block size is another."""
    async with simulators("decode") as [d], gateway(decode=[d.url], health={"interval": 60.0}) as running:
        [decode] = running.gateway.fleet.pool("decode")
        before = decode.identity
        assert before is not None
        await d.restart()
        await until(lambda: decode.identity is not before)
        await until(lambda: decode.identity is not None)


async def test_an_idle_connection_that_the_engine_closes_is_tied_again() -> None:
    async with (
        simulators("decode", keep_alive=0.1) as [d],
        gateway(decode=[d.url], health={"interval": 5.0}) as running,
    ):
        [decode] = running.gateway.fleet.pool("decode")
        before = decode.identity
        await until(lambda: decode.identity is not before)
        await until(lambda: decode.identity is not None)
        assert decode.up


async def test_doubt_lasts_until_the_engine_has_been_asked_again() -> None:
    async with simulators("decode") as [d], gateway(decode=[d.url]) as running:
        [decode] = running.gateway.fleet.pool("decode")
        decode.learn(None)
        assert decode.up and decode.identity is None
        await until(lambda: decode.identity is not None)


async def test_a_failed_leg_is_cause_to_look_again() -> None:
    async with pools(1, 1) as (running, _, [d]):
        [decode] = running.gateway.fleet.pool("decode")
        before = decode.identity
        d.faults.add("status", leg="decode", status=500, count=1)
        await running.http.post("/v1/completions", json={"model": "sim", "prompt": "hello", "max_tokens": 4})
        assert decode.identity is not before
        await asyncio.wait_for(_known(decode), 5)


async def _known(backend: object) -> None:
    await until(lambda: backend.identity is not None)  # type: ignore[attr-defined]
