"""The watcher of each backend. Its requests are mocked below httpx, and tests wait for its log lines."""

from __future__ import annotations

import asyncio
import gzip
import logging
from collections.abc import AsyncIterator, Iterator
from time import sleep
from typing import Any

import httpx
import pytest
import respx
from pd_proxy.errors import BackendError, BackendUnreachable
from pd_proxy.fleet.backend import Backend, Lease
from pd_proxy.fleet.fleet import Fleet
from pd_proxy.fleet.health import down_log
from pd_proxy.fleet.health import prober as prober_module
from pd_proxy.fleet.health.kv_cache import Cache
from pd_proxy.fleet.health.prober import Prober
from pd_proxy.http.control import Control
from pd_proxy.settings.tree import Settings

from tests.fleet.raw import answer, raw_engine

URL = "http://decode0:8000"
TIMEOUT = 5.0
QUICK: dict[str, Any] = {"interval": 0.01, "timeout": 0.05, "failures": 2, "longest_wait": 0.01}


class News(logging.Handler):
    """The log lines of the fleet, as they come."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._lines: asyncio.Queue[str] = asyncio.Queue()

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.put_nowait(record.getMessage())

    async def of(self, words: str) -> str:
        """Wait for the next line with these words."""
        async with asyncio.timeout(TIMEOUT):
            while words not in (line := await self._lines.get()):
                pass
            return line


@pytest.fixture
def news(monkeypatch: pytest.MonkeyPatch) -> Iterator[News]:
    monkeypatch.setattr(prober_module, "_FIRST_WAIT", 0.001)
    news = News()
    logger = logging.getLogger("pd_proxy.fleet")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(news)
    yield news
    logger.removeHandler(news)
    logger.setLevel(level)


@pytest.fixture
def engine() -> Iterator[respx.MockRouter]:
    """A healthy engine at URL with one model, which tests may change."""
    with respx.mock(base_url=URL, assert_all_called=False) as router:
        router.get("/health", name="health").respond(200)
        router.get("/v1/models", name="models").respond(200, json={"data": [{"id": "m", "max_model_len": 100}]})
        router.get("/version", name="version").respond(200, json={"version": "0.32.0"})
        router.get("/is_paused", name="is_paused").respond(200, json={"is_paused": False})
        router.get("/is_sleeping", name="is_sleeping").respond(404)  # as of an engine that is not in development mode
        yield router


@pytest.fixture
def fleet() -> Fleet:
    return Fleet(Settings(decode=[URL], health=QUICK))


@pytest.fixture
def backend(fleet: Fleet) -> Backend:
    return fleet.pool("decode")[0]


@pytest.fixture
async def prober(fleet: Fleet, news: News, engine: respx.MockRouter) -> AsyncIterator[Prober]:
    """A prober; the test starts it."""
    prober = Prober(fleet, Settings(health=QUICK).health, Control(0.05))
    yield prober
    await prober.stop()


async def test_a_healthy_backend_comes_up_with_its_models_and_version(
    prober: Prober, news: News, backend: Backend
) -> None:
    prober.start()
    await news.of("is up")
    assert backend.up
    assert backend.models == {"m": {"id": "m", "max_model_len": 100}}
    assert backend.version == "0.32.0"


FAULTS: list[tuple[Any, str]] = [
    (httpx.Response(503), "/health answered 503"),
    (httpx.Response(404), "/health answered 404"),
    (httpx.Response(302, headers={"location": "/"}), "/health answered 302"),
    (httpx.ConnectError("refused"), "/health could not be asked: refused"),
    (httpx.ReadTimeout("slow"), "/health did not answer within 0.05 s"),
    (httpx.ConnectTimeout("slow"), "/health could not be asked: no connection in time"),
]


@pytest.mark.parametrize(("fault", "reason"), FAULTS, ids=[reason for _, reason in FAULTS])
async def test_a_backend_that_does_not_answer_stays_down_and_says_why(
    prober: Prober, news: News, backend: Backend, engine: respx.MockRouter, fault: Any, reason: str
) -> None:
    engine["health"].mock(side_effect=[fault, *[httpx.Response(200)] * 100])
    prober.start()
    said = await news.of("is not up")
    assert said.endswith(reason)
    assert backend.reason == reason
    await news.of("is up")  # so it was probed again
    assert backend.reason == ""


async def test_an_error_without_a_message_is_logged_by_its_type(
    prober: Prober, news: News, engine: respx.MockRouter
) -> None:
    engine["health"].mock(side_effect=httpx.ReadError(""))
    prober.start()
    assert (await news.of("is not up")).endswith("/health could not be asked: the connection ended")


async def test_an_engine_that_accepts_a_connection_and_does_not_answer_is_down(news: News) -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    fleet = Fleet(Settings(decode=[url]))
    prober = Prober(fleet, Settings(health=QUICK).health, Control(0.05))
    prober.start()
    assert "did not answer within 0.05 s" in await news.of("is not up")
    await prober.stop()
    server.close()


async def test_the_same_reason_is_logged_once(
    prober: Prober, news: News, engine: respx.MockRouter, caplog: pytest.LogCaptureFixture
) -> None:
    engine["health"].mock(
        side_effect=[httpx.Response(503)] * 5 + [httpx.Response(500)] * 5 + [httpx.Response(200)] * 99
    )
    prober.start()
    await news.of("is up")
    assert [record.getMessage().partition("/health ")[2] for record in caplog.records if record.levelno > 20] == [
        "answered 503",
        "answered 500",
    ]


async def test_a_backend_goes_down_after_as_many_failed_probes_as_are_set_and_comes_back(
    prober: Prober, news: News, backend: Backend, engine: respx.MockRouter
) -> None:
    prober.start()
    await news.of("is up")
    was_up: list[bool] = []

    def answer(request: httpx.Request) -> httpx.Response:
        was_up.append(backend.up)
        return httpx.Response(503 if len(was_up) <= 2 else 200)

    engine["health"].mock(side_effect=answer)
    assert (await news.of("is out")).endswith("is out: /health answered 503")
    await news.of("is up")
    assert backend.up
    assert was_up[:3] == [True, True, False]


async def test_a_single_failed_probe_does_not_take_a_backend_out(
    prober: Prober, news: News, backend: Backend, engine: respx.MockRouter
) -> None:
    prober.start()
    await news.of("is up")
    done = asyncio.Event()
    answers = iter([503, 200, 503, 200, 503, 200])

    def answer(request: httpx.Request) -> httpx.Response:
        assert backend.up
        status = next(answers, None)
        if status is None:
            done.set()
        return httpx.Response(status or 200)

    engine["health"].mock(side_effect=answer)
    async with asyncio.timeout(TIMEOUT):
        await done.wait()
    assert backend.up


async def test_the_legs_that_wait_for_a_backend_fail_when_it_goes_down(
    prober: Prober, news: News, backend: Backend, engine: respx.MockRouter
) -> None:
    prober.start()
    await news.of("is up")
    lost: asyncio.Future[BackendError] = asyncio.get_running_loop().create_future()
    with Lease(backend, 1) as lease:
        lease.on_lost = lost.set_result
        engine["health"].mock(side_effect=httpx.ConnectError("refused"))
        async with asyncio.timeout(TIMEOUT):
            assert "refused" in str(await lost)


async def test_a_failed_request_makes_its_backend_be_probed_at_once(news: News, engine: respx.MockRouter) -> None:
    patient = Settings(decode=[URL], health={**QUICK, "interval": 60.0})
    fleet = Fleet(patient)
    (backend,) = fleet.pool("decode")
    prober = Prober(fleet, patient.health, Control(0.05))
    prober.start()
    await news.of("is up")
    fleet.failed(backend, BackendUnreachable("refused"), "decode")
    assert "failed a request: refused" in await news.of("is out")
    await news.of("is up")
    await prober.stop()


async def test_waits_between_probes_grow_to_their_limit(
    prober: Prober, news: News, engine: respx.MockRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    sleep = asyncio.sleep

    async def noted(seconds: float) -> None:
        slept.append(seconds)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", noted)
    engine["health"].mock(side_effect=[httpx.Response(503)] * 12 + [httpx.Response(200)] * 100)
    prober.start()
    await news.of("is up")
    waits = slept[:12]
    assert len(waits) == 12
    assert waits[0] <= 0.001 < waits[2]
    assert max(waits) <= QUICK["longest_wait"]
    assert min(waits[6:]) >= 0.75 * QUICK["longest_wait"]  # the rest of the wait is random


# What is read when a backend comes up


@pytest.mark.parametrize("status", [401, 403])
async def test_an_engine_that_refuses_the_key_is_down_with_the_name_of_the_setting(
    prober: Prober, news: News, backend: Backend, engine: respx.MockRouter, status: int
) -> None:
    engine["models"].respond(status)
    prober.start()
    assert await news.of("is not up") == (
        f"decode backend {URL} is not up: /v1/models answered {status}: set backend_api_key"
    )
    assert not backend.up


@pytest.mark.parametrize(
    "models",
    [
        httpx.Response(404),
        httpx.Response(500),
        httpx.Response(200, text="<html>"),
        httpx.Response(200, json=[]),
        httpx.Response(200, json={"data": None}),
        httpx.Response(200, json={"data": [{"name": "m"}]}),
        httpx.Response(200, json={"data": ["m"]}),
    ],
)
async def test_an_engine_whose_models_cannot_be_read_is_up(
    prober: Prober, news: News, backend: Backend, engine: respx.MockRouter, models: httpx.Response
) -> None:
    engine["models"].mock(return_value=models)
    engine["version"].respond(404)
    prober.start()
    await news.of("is up")
    assert backend.models is None
    assert backend.version == ""


async def test_models_are_read_again_from_time_to_time(
    prober: Prober, news: News, backend: Backend, engine: respx.MockRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prober_module, "_RELEARN", 0.0)
    prober.start()
    await news.of("is up")
    learnt = asyncio.Event()
    engine["models"].respond(200, json={"data": [{"id": "m"}, {"id": "lora"}]})

    def version(request: httpx.Request) -> httpx.Response:
        learnt.set()
        return httpx.Response(200, json={"version": "0.33.0"})

    engine["version"].mock(side_effect=version)
    async with asyncio.timeout(TIMEOUT):
        await learnt.wait()
        assert set(backend.models or {}) == {"m", "lora"}
        learnt.clear()
        await learnt.wait()  # the second round: the answers of the first have been handled
    assert backend.version == "0.33.0"


# Backends that join and leave


async def test_a_backend_that_joins_is_watched_and_one_that_leaves_is_not(news: News, engine: respx.MockRouter) -> None:
    left: list[Backend] = []
    fleet = Fleet(Settings(health=QUICK))
    prober = Prober(fleet, Settings(health=QUICK).health, Control(0.05), on_leave=left.append)
    prober.start()
    backend = fleet.add(URL, "decode")
    await news.of("is up")
    watcher = prober._watchers[backend]
    fleet.remove(URL, "decode")
    assert left == [backend]
    async with asyncio.timeout(TIMEOUT):
        await asyncio.wait([watcher])
    assert watcher.cancelled()
    await prober.stop()


async def test_what_other_workers_send_to_a_backend_counts_before_it_is_up(engine: respx.MockRouter) -> None:
    engine["health"].respond(503)
    fleet = Fleet(Settings(health=QUICK, prefill=[URL]))
    told: list[tuple[str, Cache]] = []
    fleet.subscribe(on_cache=lambda backend, cache: told.append((backend.url, cache)))
    prober = Prober(fleet, Settings(health=QUICK).health, Control(0.05), reads_caches=True)
    prober.start()
    assert told == [(URL, Cache())]
    await prober.stop()


@pytest.mark.parametrize("healthy", [True, False])
async def test_a_removed_backend_is_forgotten_by_its_watcher_when_its_last_leg_has_ended(
    prober: Prober, news: News, fleet: Fleet, backend: Backend, engine: respx.MockRouter, healthy: bool
) -> None:
    if not healthy:
        engine["health"].respond(503)
    prober.start()
    await news.of("is up" if healthy else "is not up")
    with Lease(backend, 1):
        fleet.remove(URL, "decode")
    await news.of("has left")
    assert fleet.pool("decode") == []


async def test_a_removed_backend_is_forgotten_as_soon_as_its_last_leg_ends(
    news: News, engine: respx.MockRouter
) -> None:
    patient = Settings(decode=[URL], health={**QUICK, "interval": 60.0})
    fleet = Fleet(patient)
    (backend,) = fleet.pool("decode")
    prober = Prober(fleet, patient.health, Control(0.05))
    prober.start()
    await news.of("is up")
    with Lease(backend, 1):
        fleet.remove(URL, "decode")
    await news.of("has left")  # long before the next probe
    await prober.stop()


async def test_stopping_ends_every_watcher(prober: Prober, news: News, fleet: Fleet) -> None:
    prober.start()
    await news.of("is up")
    watchers = list(prober._watchers.values())
    await prober.stop()
    assert all(watcher.done() for watcher in watchers)
    assert not fleet.listeners


async def test_a_watcher_survives_an_answer_of_any_shape(
    fleet: Fleet, backend: Backend, news: News, engine: respx.MockRouter
) -> None:
    engine["models"].respond(200, text="[" * 100_000)
    prober = Prober(fleet, Settings(health=QUICK).health, Control(0.05))
    prober.start()
    watcher, up = prober._watchers[backend], asyncio.create_task(news.of("is up"))
    await asyncio.wait([watcher, up], return_when=asyncio.FIRST_COMPLETED)
    dead = watcher.done()
    for task in (watcher, up):
        task.cancel()
    await asyncio.gather(watcher, up, return_exceptions=True)
    assert not dead


async def test_an_engine_that_sleeps_is_down_until_it_is_awake(
    prober: Prober, news: News, backend: Backend, engine: respx.MockRouter
) -> None:
    engine["is_sleeping"].respond(200, json={"is_sleeping": True})
    prober.start()
    assert "it is asleep" in await news.of("is not up")
    assert not backend.up and engine["health"].called
    engine["is_sleeping"].respond(200, json={"is_sleeping": False})
    await news.of("is up")


async def test_an_engine_that_was_put_to_sleep_by_others_is_taken_out(
    prober: Prober, news: News, backend: Backend, engine: respx.MockRouter
) -> None:
    engine["is_sleeping"].respond(200, json={"is_sleeping": False})
    prober.start()
    await news.of("is up")
    engine["is_sleeping"].respond(200, json={"is_sleeping": True})
    assert "it is asleep" in await news.of("is out")


async def test_an_engine_that_is_paused_though_it_says_that_it_does_not_sleep_is_taken_out(
    prober: Prober, news: News, backend: Backend, engine: respx.MockRouter
) -> None:
    engine["is_sleeping"].respond(200, json={"is_sleeping": False})
    prober.start()
    await news.of("is up")
    engine["is_paused"].respond(200, json={"is_paused": True})
    assert "it is paused" in await news.of("is out")
    engine["is_paused"].respond(200, json={"is_paused": False})
    await news.of("is up")


async def test_an_engine_that_is_too_busy_to_say_whether_it_sleeps_stays_up(
    prober: Prober, news: News, backend: Backend, engine: respx.MockRouter
) -> None:
    """vLLM answers this between two steps only; a long step is no reason to end the requests that run there."""
    engine["is_sleeping"].respond(200, json={"is_sleeping": False})
    prober.start()
    await news.of("is up")
    engine["is_sleeping"].mock(side_effect=httpx.ReadTimeout)
    asked = engine["is_sleeping"].call_count
    async with asyncio.timeout(TIMEOUT):
        while engine["is_sleeping"].call_count < asked + 5 * int(QUICK["failures"]):
            await asyncio.sleep(0.001)
    assert backend.up
    engine["is_sleeping"].mock(side_effect=None, return_value=httpx.Response(200, json={"is_sleeping": True}))
    assert "it is asleep" in await news.of("is out")


async def test_an_engine_that_stops_reporting_whether_it_sleeps_stays_down(
    prober: Prober, news: News, backend: Backend, engine: respx.MockRouter
) -> None:
    engine["is_sleeping"].mock(side_effect=httpx.ReadTimeout)
    prober.start()
    assert "/is_sleeping did not answer" in await news.of("is not up")
    assert not backend.up
    engine["is_sleeping"].mock(side_effect=None, return_value=httpx.Response(200, json={"is_sleeping": False}))
    await news.of("is up")


async def test_an_engine_that_cannot_sleep_is_asked_once_for_each_time_it_comes_up(
    prober: Prober, news: News, backend: Backend, engine: respx.MockRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prober_module, "_RELEARN", 0.0)
    prober.start()
    await news.of("is up")
    learnt = engine["models"].call_count
    async with asyncio.timeout(TIMEOUT):
        while engine["models"].call_count < learnt + 3:
            await asyncio.sleep(0.001)
    assert engine["is_sleeping"].call_count == 1


async def test_routes_that_a_backend_lacked_are_tried_again_when_its_models_are_read(
    prober: Prober, news: News, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    prober.start()
    await news.of("is up")
    monkeypatch.setattr(prober_module, "_RELEARN", 0.0)
    backend.lacks.add("/v1/embeddings")
    assert not backend.offers("/v1/embeddings")
    async with asyncio.timeout(TIMEOUT):
        while not backend.offers("/v1/embeddings"):
            await asyncio.sleep(0.001)


# Broken and hostile engines, and many of them


async def test_an_engine_whose_health_answer_never_ends_is_not_up(news: News) -> None:
    async def trickle(head: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n")
        while not writer.is_closing():
            writer.write(b" ")
            await writer.drain()
            await asyncio.sleep(0.01)

    async with raw_engine(trickle) as raw:
        fleet = Fleet(Settings(decode=[raw.url]))
        prober = Prober(fleet, Settings(health=QUICK).health, Control(0.1))
        prober.start()
        assert (await news.of("is not up")).endswith("/health did not answer within 0.1 s")
        await prober.stop()


async def test_an_engine_whose_answers_inflate_is_not_up(news: News) -> None:
    bomb = answer(gzip.compress(bytes(20 * 1024 * 1024)), b"content-encoding: gzip")
    async with raw_engine(bomb) as raw:
        fleet = Fleet(Settings(decode=[raw.url]))
        prober = Prober(fleet, Settings(health=QUICK).health, Control(5.0))
        prober.start()
        assert "its answer is encoded ('gzip')" in await news.of("is not up")
        await prober.stop()


async def test_of_many_backends_that_are_down_only_few_have_a_log_line_each(
    news: News, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(down_log, "LINES_FOR", 0.3)
    urls = [f"http://127.0.0.1:1/{number}" for number in range(40)]
    fleet = Fleet(Settings(decode=urls))
    prober = Prober(fleet, Settings().health, Control(5.0))
    prober.start()
    line = await news.of("more backends are not up")
    await prober.stop()
    single = [record for record in caplog.records if " backend http" in record.getMessage()]
    assert len(single) == down_log._LINES
    assert line.startswith(f"{40 - down_log._LINES} more backends are not up (GET /admin/backends), most of them: ")
    assert all(backend.reason.startswith("/health could not be asked: ") for backend in fleet)


@pytest.mark.slow
async def test_backends_that_are_down_are_probed_no_faster_together_than_a_bound(
    news: News, engine: respx.MockRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prober_module, "_MOST_DOWN", 100)
    slept: list[float] = []
    sleep = asyncio.sleep

    async def noted(seconds: float) -> None:
        slept.append(seconds)
        await sleep(0 if len(slept) < 400 else 60)

    monkeypatch.setattr(asyncio, "sleep", noted)
    engine["health"].respond(503)
    fleet = Fleet(Settings(decode=[URL, *(f"{URL}/{number}" for number in range(200))], health=QUICK))
    for number in range(200):
        engine.get(f"/{number}/health").respond(503)
    prober = Prober(fleet, Settings(health=QUICK).health, Control(0.05))
    prober.start()
    async with asyncio.timeout(TIMEOUT):
        while len(slept) < 400:
            await sleep(0.001)
    await prober.stop()
    assert min(slept[201:400]) >= 0.75 * 200 / 100  # 201 backends, each probed again after some two seconds


# Mass failure


@pytest.fixture
async def many(news: News, engine: respx.MockRouter) -> AsyncIterator[tuple[Fleet, Prober]]:
    """Eight engines that are up; `engine["N"]` is the health path of each."""
    urls = [f"{URL}/{number}" for number in range(8)]
    for number in range(8):
        engine.get(f"/{number}/health", name=str(number)).respond(200)
        engine.get(f"/{number}/v1/models").respond(404)
        engine.get(f"/{number}/version").respond(404)
        engine.get(f"/{number}/is_paused").respond(404)
        engine.get(f"/{number}/is_sleeping").respond(404)
    fleet = Fleet(Settings(decode=urls, health=QUICK))
    prober = Prober(fleet, Settings(health=QUICK).health, Control(0.05))
    prober.start()
    for _ in urls:
        await news.of("is up")
    yield fleet, prober
    await prober.stop()


async def test_engines_that_miss_their_checks_together_are_asked_again(
    many: tuple[Fleet, Prober], news: News, engine: respx.MockRouter
) -> None:
    fleet, _ = many
    failed = dict.fromkeys(range(8), 0)

    def health(number: int) -> Any:
        def say(request: httpx.Request) -> httpx.Response:
            failed[number] += 1
            if failed[number] <= QUICK["failures"]:
                raise httpx.ReadTimeout("slow")
            return httpx.Response(200)

        return say

    for number in range(8):
        engine[str(number)].mock(side_effect=health(number))
    line = await news.of("asked again before any is taken out")
    assert "of 8 backends failed at the same time" in line
    async with asyncio.timeout(TIMEOUT):
        while min(failed.values()) <= QUICK["failures"] + 1:
            await asyncio.sleep(0.001)
    assert all(backend.up for backend in fleet)
    assert fleet.excused_checks["mass"] >= 1


@pytest.mark.parametrize("fault", [httpx.ReadTimeout, httpx.ConnectError, None])
async def test_a_real_death_of_all_is_seen_one_check_later(
    many: tuple[Fleet, Prober], news: News, engine: respx.MockRouter, fault: type[Exception] | None
) -> None:
    fleet, _ = many
    asked = dict.fromkeys(range(8), 0)

    def health(number: int) -> Any:
        def say(request: httpx.Request) -> httpx.Response:
            if fleet.pool("decode")[number].up:
                asked[number] += 1
            if fault is not None:
                raise fault("gone")
            return httpx.Response(503)

        return say

    for number in range(8):
        engine[str(number)].mock(side_effect=health(number))
    for _ in range(8):
        await news.of("is out")
    assert not any(backend.up for backend in fleet)
    assert max(asked.values()) == QUICK["failures"] + 1
    assert min(asked.values()) >= QUICK["failures"]


async def test_one_of_many_engines_that_dies_is_taken_out_without_a_delay(
    many: tuple[Fleet, Prober], news: News, engine: respx.MockRouter
) -> None:
    fleet, _ = many
    asked = []

    def health(request: httpx.Request) -> httpx.Response:
        if fleet.pool("decode")[3].up:
            asked.append(request)
        return httpx.Response(503)

    engine["3"].mock(side_effect=health)
    await news.of("is out")
    assert len(asked) == QUICK["failures"]
    assert sum(backend.up for backend in fleet) == 7
    assert not fleet.excused_checks.total()


async def test_checks_that_fail_while_the_event_loop_stands_still_do_not_count(
    prober: Prober, news: News, engine: respx.MockRouter, fleet: Fleet, backend: Backend
) -> None:
    prober.start()
    await news.of("is up")
    asked = 0

    def health(request: httpx.Request) -> httpx.Response:
        nonlocal asked
        asked += 1
        if asked <= 4:
            sleep(0.03)
            fleet.delays.note(0.03, asyncio.get_running_loop().time())
            raise httpx.ReadTimeout("slow")
        return httpx.Response(200)

    engine["health"].mock(side_effect=health)
    assert "while this gateway's event loop stood still" in await news.of("asked again")
    async with asyncio.timeout(TIMEOUT):
        while asked < 6:
            await asyncio.sleep(0.001)
    assert backend.up
    assert fleet.excused_checks == {"late": 3, "mass": 0}
