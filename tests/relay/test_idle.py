"""Time limits of a stream: no first token, silence, a client that does not read, an engine that is suspected."""

from __future__ import annotations

import asyncio
from time import sleep

import pytest
from pd_proxy.errors import (
    BackendLost,
    BackendTimedOut,
)
from pd_proxy.relay import idle as relay_idle
from pd_proxy.telemetry.records import ITL_BOUNDS

from tests.http.helpers import TIMEOUT

from .streams import (
    DONE,
    END,
    FIRST,
    PING,
    ROLE,
    SECOND,
    THIRD,
    USAGE,
    Clock,
    Stream,
    opened,
)


async def test_no_first_token_in_time_is_a_time_out() -> None:
    stream = await opened(first_token=0.02)
    stream.read(ROLE)
    error = await stream.outcome()
    assert type(error) is BackendTimedOut
    assert "no token within 0.02 s" in str(error)
    assert not stream.client.started
    assert stream.transport.aborted


async def test_the_first_token_ends_the_wait_for_it() -> None:
    stream = await opened(first_token=0.01)
    stream.read(FIRST)
    await asyncio.wait([stream.running], timeout=0.03)
    assert not stream.running.done()
    stream.read(DONE)
    stream.end()
    assert await stream.outcome() is None


async def test_silence_is_a_time_out() -> None:
    stream = await opened(idle=0.02)
    stream.read(FIRST)
    error = await stream.outcome()
    assert type(error) is BackendTimedOut
    assert "sent nothing for 0.02 s" in str(error)
    assert stream.client.body == FIRST


async def test_a_stream_that_speaks_now_and_then_is_not_silent(clock: Clock) -> None:
    stream = await opened(idle=10.0)
    stream.read(FIRST)
    for said in (SECOND, PING, THIRD, USAGE, PING):
        clock.now += 9.0
        stream.relay._idle_watch.check()  # as its timer would
        stream.read(said)
    assert stream.connection._receiver is stream.relay
    clock.now += 11.0
    stream.relay._idle_watch.check()
    assert type(await stream.outcome()) is BackendTimedOut


async def test_half_an_event_now_and_then_is_silence(clock: Clock) -> None:
    stream = await opened(idle=10.0)
    stream.read(FIRST)
    for byte in SECOND[:3]:
        clock.now += 4.0
        stream.read(bytes([byte]))
    stream.relay._idle_watch.check()
    assert type(await stream.outcome()) is BackendTimedOut


async def test_gaps_are_the_time_between_tokens(clock: Clock) -> None:
    stream = await opened()
    stream.read(ROLE + FIRST)
    assert stream.relay.first_token == 1000.0
    clock.now += 0.02
    stream.read(SECOND)
    clock.now += 0.5
    stream.read(PING)
    clock.now += 0.5
    stream.read(THIRD)
    assert stream.relay.given()[1] == pytest.approx(1001.02)
    stream.read(DONE)
    stream.end()
    assert await stream.outcome() is None
    assert stream.gaps.counts[ITL_BOUNDS.index(1.0)] == 1
    assert sum(stream.gaps.counts) == 2
    assert stream.gaps.sum == pytest.approx(1.02)
    assert stream.relay.given()[1] == pytest.approx(1001.02)


async def test_time_spent_paused_is_not_the_engines_silence(clock: Clock) -> None:
    stream = await opened(idle=10.0)
    stream.read(FIRST)
    clock.now += 4.0
    stream.relay.pause()
    clock.now += 9.0
    stream.relay._idle_watch.check()
    stream.relay.resume()
    clock.now += 9.0
    stream.relay._idle_watch.check()
    assert stream.connection._receiver is stream.relay
    assert not stream.client.was_cut
    stream.running.cancel()


async def test_a_client_that_stops_reading_is_cut() -> None:
    stream = await opened(idle=0.02)
    stream.read(FIRST)
    assert stream.client.flow is stream.relay
    stream.relay.pause()
    assert not stream.transport.reading
    await asyncio.wait([stream.running], timeout=0.06)
    assert stream.client.was_cut


@pytest.mark.parametrize("slow", [False, True])
async def test_a_slow_clients_stream_reports_no_pace(slow: bool) -> None:
    paces: list[float] = []
    stream = await opened(pace=paces.append)
    stream.read(FIRST)
    if slow:
        stream.relay.pause()
        stream.relay.resume()
    stream.read(*[FIRST] * 20, DONE)
    stream.end()
    assert await stream.outcome() is None
    assert len(paces) == (0 if slow else 1)


async def test_a_paused_stream_goes_on_where_it_stopped() -> None:
    stream = await opened(idle=TIMEOUT)
    stream.read(FIRST)
    stream.relay.pause()
    assert not stream.transport.reading
    stream.relay.resume()
    assert stream.transport.reading
    stream.read(SECOND, DONE)
    stream.end()
    assert await stream.outcome() is None
    assert stream.client.body == FIRST + SECOND + DONE


# Suspicion
async def test_a_suspected_stream_that_is_silent_fails_with_the_reason_for_the_suspicion(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(relay_idle, "_SUSPECTED", 0.02)
    stream = await opened()
    stream.read(FIRST)
    stream.relay.suspect(BackendLost("failed its checks"))
    assert not stream.running.done()  # it has a moment
    error = await stream.outcome()
    assert type(error) is BackendLost
    assert stream.transport.aborted
    assert stream.client.body == FIRST


def fire(stream: Stream) -> None:
    """The relay's timer, now."""
    watch = stream.relay._idle_watch
    timer = watch._timer
    if timer is None:  # its first wait, which it shares with other streams
        assert watch in watch._limit._open
        watch._limit.forget(watch)
        watch.overdue(watch._limit.seconds)
        return
    assert not timer.cancelled()
    callback, arguments = timer._callback, timer._args  # type: ignore[attr-defined]
    timer.cancel()
    callback(*arguments)


async def test_silence_before_the_suspicion_counts_for_nothing(clock: Clock) -> None:
    """The gateway may have stood still itself: what came meanwhile is still to be read."""
    stream = await opened(idle=10.0)
    stream.read(FIRST)
    clock.now += 5.0
    stream.relay.suspect(BackendLost("failed its checks"))
    for _ in range(3):
        await asyncio.sleep(0)
    assert not stream.running.done()
    stream.read(SECOND)
    fire(stream)
    assert not stream.running.done()
    stream.running.cancel()


async def test_a_suspected_stream_is_listened_to_once_more_where_the_event_loop_was_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(relay_idle, "_SUSPECTED", 0.02)
    stream = await opened(idle=10.0)
    stream.read(FIRST)
    stream.relay.suspect(BackendLost("failed its checks"))
    sleep(0.05)  # the event loop stands still past the time
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not stream.running.done()
    assert type(await stream.outcome()) is BackendLost  # and it is silent after that


async def test_a_gateway_that_is_always_late_ends_a_silent_stream_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_idle, "_SUSPECTED", 0.002)
    stream = await opened(idle=10.0)
    stream.read(FIRST)
    stream.relay.suspect(BackendLost("failed its checks"))
    turns = 0
    while not stream.running.done():
        turns += 1
        assert turns < 50
        sleep(0.005)
        await asyncio.sleep(0)
    assert type(await stream.outcome()) is BackendLost


async def test_a_slow_stream_is_suspected_for_as_long_as_it_is_slow(clock: Clock) -> None:
    """One with a token each two seconds moves, though it is silent for more than one."""
    stream = await opened(idle=60.0)
    for token in (FIRST, SECOND, THIRD):
        stream.read(token)
        clock.now += 2.0
    before = asyncio.get_running_loop().time()
    stream.relay.suspect(BackendLost("failed its checks"))
    timer = stream.relay._idle_watch._timer
    assert timer is not None
    assert timer.when() - before == pytest.approx(8.0, abs=0.5)
    stream.running.cancel()


@pytest.mark.parametrize("said", [SECOND, PING, END, SECOND + THIRD], ids=["fast path", "ping", "end", "two"])
async def test_a_suspected_stream_that_speaks_goes_on(said: bytes, clock: Clock) -> None:
    stream = await opened(idle=10.0)
    stream.read(FIRST)
    stream.relay.suspect(BackendLost("failed its checks"))
    clock.now += 0.9
    stream.read(said)
    clock.now += 0.2
    fire(stream)
    assert stream.connection._receiver is stream.relay
    # Silence is watched for again.
    clock.now += 9.0
    fire(stream)
    assert stream.connection._receiver is stream.relay
    clock.now += 1.0
    fire(stream)
    assert type(await stream.outcome()) is BackendTimedOut


@pytest.mark.parametrize("idle", [None, 10.0])
async def test_a_stream_suspected_twice_fails_in_its_second_silence(idle: float | None, clock: Clock) -> None:
    stream = await opened(idle=idle)
    stream.read(FIRST)
    for _ in range(2):
        stream.relay.suspect(BackendLost("failed its checks"))
        assert stream.connection._receiver is stream.relay
        clock.now += 0.5
        stream.read(SECOND)
    fire(stream)
    assert stream.connection._receiver is stream.relay
    stream.relay.suspect(BackendLost("failed them again"))
    clock.now += 1.0
    fire(stream)
    error = await stream.outcome()
    assert type(error) is BackendLost
    assert "again" in str(error)


async def test_a_suspicion_that_is_repeated_gives_no_new_time(clock: Clock) -> None:
    """A backend that is down is probed again and again."""
    stream = await opened(idle=10.0)
    stream.read(FIRST)
    stream.relay.suspect(BackendLost("failed its checks"))
    timer = stream.relay._idle_watch._timer
    clock.now += 0.5
    stream.relay.suspect(BackendLost("failed them again"))
    assert stream.relay._idle_watch._timer is timer
    stream.running.cancel()


@pytest.mark.parametrize("before", [True, False])
async def test_a_stream_whose_client_keeps_it_waiting_is_not_suspected(before: bool, clock: Clock) -> None:
    stream = await opened(idle=10.0)
    stream.read(FIRST)
    if before:
        stream.relay.pause()
    stream.relay.suspect(BackendLost("failed its checks"))
    if not before:
        stream.relay.pause()
    clock.now += 2.0
    fire(stream)
    assert stream.connection._receiver is stream.relay
    assert not stream.client.was_cut
    stream.running.cancel()


async def test_a_suspected_stream_that_ends_well_ended_well(clock: Clock) -> None:
    stream = await opened()
    stream.read(FIRST)
    stream.relay.suspect(BackendLost("failed its checks"))
    timer = stream.relay._idle_watch._timer
    stream.read(DONE)
    stream.end()
    assert await stream.outcome() is None
    assert timer is not None
    assert timer.cancelled()
