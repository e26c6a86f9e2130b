"""KV events of simulated engines over real sockets: the index believes cached what the engines have cached."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from pd_proxy.fleet.fleet import Fleet
from pd_proxy.fleet.zmq.kv_events import KvEvents, _endpoint, load_tokenizer
from pd_proxy.fleet.zmq.listener import CannotListen
from pd_proxy.handoff.coordinates import Coordinates
from pd_proxy.prefix.chain import Chain, chain_of
from pd_proxy.prefix.index import PrefixIndex
from pd_proxy.requests.body import read_body
from pd_proxy.settings.tree import build_settings
from pd_proxy_simulator import Simulator, SimulatorConfig
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.support import until

KEY = b"k" * 32
PROMPT = [number % 90 + 5 for number in range(400)]


def chain(**body: Any) -> Chain:
    return chain_of(read_body(json.dumps({"model": "sim", **body}).encode(), "completions"), KEY)


class Bed:
    """Simulated engines, the index of their caches, and a client."""

    def __init__(self, engines: list[Simulator], fleet: Fleet, events: KvEvents, index: PrefixIndex) -> None:
        self.engines = engines
        self.fleet = fleet
        self.events = events
        self.index = index
        self.http = httpx.AsyncClient(timeout=30, trust_env=False)

    def believed(self, engine: Simulator, prompt: list[int], **more: Any) -> int:
        return self.index.cached(chain(prompt=prompt, **more)).get(engine.url, 0)

    async def ask(self, engine: Simulator, prompt: list[int] | str, **more: Any) -> int:
        """Let an engine compute a prompt; returns how many of its tokens were cached."""
        body = {"model": "sim", "prompt": prompt, "max_tokens": 1, **more}
        answer = (await self.http.post(f"{engine.url}/v1/completions", json=body)).raise_for_status().json()
        details = answer["usage"]["prompt_tokens_details"]
        return details["cached_tokens"] if details else 0

    async def heard(self, engine: Simulator) -> None:
        """Wait until all that an engine has published has been taken."""
        publisher = engine.publisher
        assert publisher is not None
        publisher.flush()
        followers = self.events._followers
        await until(
            lambda: any(
                follower._events.endswith(f":{publisher.port}")
                and (follower._last if follower._last is not None else -1) == publisher.sequence - 1
                for follower in followers.values()
            )
        )


@asynccontextmanager
async def bed(
    count: int = 1, *, warm: list[list[int]] | None = None, more: dict[str, Any] | None = None, **config: Any
) -> AsyncIterator[Bed]:
    engines = [Simulator(SimulatorConfig(kv_events=0, **config)) for _ in range(count)]
    for engine in engines:
        await engine.start()
    index = PrefixIndex()
    locations = [
        {"backend": engine.url, "kv_events_port": engine.kv_events_port, "kv_replay_port": engine.kv_replay_port}
        for engine in engines
    ]
    settings = build_settings(
        {
            "mixed": [engine.url for engine in engines],
            "kv_events": {"endpoint": "tcp://{host}:5557", "replay": "tcp://{host}:5558"},
            "locations": locations,
            **(more or {}),
        },
        {},
    )
    fleet = Fleet(settings)
    for backend in fleet:
        index.join(backend.url, 1 << 20)
        backend.models = {"sim": {"id": "sim"}, "tuned": {"id": "tuned", "parent": "sim"}}
    events = KvEvents(settings, fleet, index, KEY)
    it = Bed(engines, fleet, events, index)
    try:
        for prompt in warm or []:
            await it.ask(engines[0], prompt)
        events.start()
        await until(
            lambda: events.connected == count and all(e.publisher and e.publisher.subscriptions for e in engines)
        )
        if not warm:
            events.sent(chain(prompt=PROMPT), {})
        yield it
    finally:
        await events.close()
        await it.http.aclose()
        for engine in engines:
            await engine.stop(0)


@pytest.mark.cross_product
@pytest.mark.parametrize("encoding", ["map", "array"])
@pytest.mark.parametrize("hashes", ["int", "bytes"])
async def test_the_index_believes_cached_what_the_engine_reports_as_cached(encoding: Any, hashes: Any) -> None:
    """The prompts have common beginnings and salts, and the engine evicts blocks, since it has room for few."""
    async with bed(kv_events_encoding=encoding, kv_events_hashes=hashes, blocks=64) as it:
        (engine,) = it.engines
        asked = 0
        for number in range(24):
            prompt = PROMPT[: 64 + 32 * (number % 5)] + [number % 7 + 1] * (16 + 16 * (number % 6))
            more = {"cache_salt": "pepper"} if number % 8 == 7 else {}
            believed = it.believed(engine, prompt, **more)
            cached = await it.ask(engine, prompt, **more)
            # Of a prompt that is cached to its end, the engine computes the last block again.
            assert cached == min(believed, (len(prompt) - 1) // 16 * 16)
            asked += bool(cached)
            await it.heard(engine)
        assert asked > 8
        assert it.events.events["removed"] > 0
        assert not it.events.events["unplaced"] + it.events.events["malformed"] + it.events.events["unknown"]


async def test_the_cache_of_an_engine_that_was_warm_before_is_known() -> None:
    async with bed(warm=[PROMPT]) as it:
        (engine,) = it.engines
        await it.heard(engine)
        assert it.believed(engine, PROMPT) == 0  # until a request with token ids is sent
        it.events.sent(chain(prompt=PROMPT), {})
        await until(lambda: it.believed(engine, PROMPT) == 400)


async def test_the_events_of_each_engine_count_for_that_engine_only() -> None:
    async with bed(2) as it:
        one, other = it.engines
        await it.ask(one, PROMPT)
        await it.ask(other, PROMPT[:100])
        await it.heard(one)
        await it.heard(other)
        assert (it.believed(one, PROMPT), it.believed(other, PROMPT)) == (400, 96)


async def test_a_reset_cache_and_a_restarted_engine_have_nothing() -> None:
    async with bed() as it:
        (engine,) = it.engines
        for _ in range(2):
            await it.ask(engine, PROMPT)
            await it.heard(engine)
            assert it.believed(engine, PROMPT) == 400
            (await it.http.post(f"{engine.url}/reset_prefix_cache")).raise_for_status()
            await it.heard(engine)
            assert it.believed(engine, PROMPT) == 0
        await it.ask(engine, PROMPT)
        await it.heard(engine)
        await engine.restart()
        await it.ask(engine, PROMPT[:50])
        await until(lambda: it.believed(engine, PROMPT) == 48)
        assert it.events.batches["restart"] == 1
        assert await it.ask(engine, PROMPT) == 48


async def test_events_that_are_lost_on_the_way_are_requested() -> None:
    async with bed() as it:
        (engine,) = it.engines
        await it.ask(engine, PROMPT[:32])
        assert engine.publisher is not None
        engine.publisher.flush()
        engine.publisher.lose = 1
        await it.ask(engine, PROMPT[:64])
        engine.publisher.flush()
        await it.ask(engine, PROMPT)
        await it.heard(engine)
        assert it.believed(engine, PROMPT) == 400
        assert it.events.batches["replayed"] >= 1
        assert it.events.batches["lost"] == 0


async def test_a_publisher_that_has_not_answered_is_asked_again_once_it_has_restarted() -> None:
    async with bed() as it:
        (engine,) = it.engines
        await it.ask(engine, PROMPT)
        await it.heard(engine)
        (follower,) = it.events._followers.values()
        follower._unanswered("this is a test")
        await engine.restart()  # and publishes nothing
        await until(lambda: it.believed(engine, PROMPT) == 0)


async def test_an_entry_made_at_dispatch_does_not_wait_for_events() -> None:
    async with bed() as it:
        (engine,) = it.engines
        sent = chain(prompt=PROMPT)
        it.index.enter(engine.url, sent)
        assert it.believed(engine, PROMPT) == 400
        await it.ask(engine, [1] * 64)
        await it.heard(engine)
        assert it.believed(engine, PROMPT) == 400


async def test_publishers_are_followed_while_their_backend_is_in_the_fleet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pd_proxy.fleet.zmq.kv_events._LOOK", 0.01)
    async with bed(2) as it:
        one, _ = it.engines
        it.fleet.remove(one.url, "mixed")
        it.fleet.forget_idle()
        await until(lambda: it.events.connected == 1)
        backend = it.fleet.add(one.url, "mixed")
        await asyncio.sleep(0.03)
        assert it.events.connected == 1  # not before its models are known
        backend.models = {"sim": {"id": "sim"}}
        await until(lambda: it.events.connected == 2)
        await it.ask(one, PROMPT)
        await until(lambda: it.believed(one, PROMPT) == 400)


async def test_an_index_that_knows_an_engine_late_gets_what_the_engine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pd_proxy.fleet.zmq.kv_events._LOOK", 0.01)
    async with bed() as it:
        (engine,) = it.engines
        (backend,) = it.fleet
        await it.ask(engine, PROMPT)
        await it.heard(engine)
        it.index.clear(engine.url)  # it missed a health check
        it.events.lost(backend)
        await until(lambda: it.believed(engine, PROMPT) == 400)
        it.index.leave(engine.url)
        it.events._unfollow(next(iter(it.events._followed)))
        await until(lambda: it.events.events["stored"] == 50)
        assert it.believed(engine, PROMPT) == 0
        it.index.join(engine.url, 1 << 20)
        await until(lambda: it.believed(engine, PROMPT) == 400)


async def test_nothing_is_restored_of_an_engine_that_restarts_while_it_is_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pd_proxy.fleet.zmq.kv_events._LOOK", 0.01)
    async with bed() as it:
        (engine,) = it.engines
        (backend,) = it.fleet
        await it.ask(engine, PROMPT)
        await it.heard(engine)
        engine.kill()
        await until(lambda: it.events.connected == 0)
        it.index.clear(engine.url)
        it.events.lost(backend)
        await engine.restart()
        await until(lambda: not it.events._to_restore)
        assert it.believed(engine, PROMPT) == 0
        assert it.events.batches["restart"] == 1


async def test_an_error_of_the_gateway_is_logged_and_the_publisher_followed_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pd_proxy.fleet.zmq.kv_events._AGAIN", 0.01)
    async with bed() as it:
        (engine,) = it.engines
        held = it.events.corrections.held[engine.url]
        broken = True

        def stored(hashes: Any, sizes: Any, real: Any = held.stored) -> None:
            nonlocal broken
            if broken:
                broken = False
                raise RuntimeError("a bug")
            real(hashes, sizes)

        monkeypatch.setattr(held, "stored", stored)
        await it.ask(engine, PROMPT[:200])
        await until(lambda: it.events.batches["failed"] == 1 and it.events.connected == 1)
        await until(lambda: bool(engine.publisher and engine.publisher.subscriptions))
        await it.ask(engine, [7] * 100)
        await until(lambda: it.believed(engine, [7] * 100) == 96)
        assert [r for r in caplog.records if r.levelno == logging.ERROR and "is followed again" in r.message]


# Prompts of text

TEXT = "the river runs past the old harbour and the engine waits for a signal " * 40


def text_prompt() -> tuple[Chain, dict[str, Any]]:
    body = read_body(json.dumps({"model": "sim", "prompt": TEXT}).encode(), "completions")
    return chain_of(body, KEY), body.members


async def reported_ids(it: Bed, engine: Simulator) -> bytes:
    body = {"model": "sim", "prompt": TEXT, "max_tokens": 1, "return_token_ids": True}
    answer = (await it.http.post(f"{engine.url}/v1/completions", json=body)).raise_for_status().json()
    return ",".join(map(str, answer["choices"][0]["prompt_token_ids"])).encode()


async def test_events_count_for_prompts_of_text_whose_ids_an_engine_has_reported() -> None:
    async with bed(2) as it:
        one, other = it.engines
        sent, members = text_prompt()
        it.events.reported(sent, members, await reported_ids(it, one))
        await it.heard(one)
        await until(lambda: it.index.cached(sent).keys() == {one.url})
        await it.ask(other, TEXT)  # as another gateway would
        await it.heard(other)
        assert it.index.cached(sent).keys() == {one.url, other.url}
        (await it.http.post(f"{one.url}/reset_prefix_cache")).raise_for_status()
        await it.heard(one)
        assert it.index.cached(sent).keys() == {other.url}


@pytest.mark.parametrize("ids", [b"1,", b"-1", b"1,x", b"4294967296", b"1.5", b"[1]", b'"'])
async def test_ids_that_are_not_valid_are_not_learnt(ids: bytes) -> None:
    async with bed() as it:
        sent, members = text_prompt()
        it.events.reported(sent, members, ids)
        await until(lambda: it.events.events["unlearnt"] + it.events.events["learnt"] == 1)
        assert it.events.corrections.texts == 0


async def test_the_number_of_prompts_that_wait_to_be_learnt_from_is_bounded() -> None:
    async with bed() as it:
        _, members = text_prompt()
        for number in range(300):
            it.events.reported(chain(prompt=f"{number} {TEXT}"), members, b"1,2,3")
        assert it.events.events["untold"] == 300 - 256
        await until(lambda: it.events.events["learnt"] == 256)
        it.events.reported(chain(prompt=f"0 {TEXT}"), members, b"1,2,3")
        assert not it.events._lessons  # the prompt is known


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that makes each word a token."""
    words = sorted({f"{space}{word}" for word in TEXT.split() for space in ("", "\u0120")} | {"\u0120"})
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="the"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return path


async def test_a_tokenizer_encodes_the_text_of_a_completion(tokenizer: Path) -> None:
    async with bed(more={"tokenizer": str(tokenizer)}) as it:
        (engine,) = it.engines
        sent, members = text_prompt()
        ids = load_tokenizer(str(tokenizer)).encode(TEXT).ids
        assert len(ids) > 500
        await it.ask(engine, ids)
        await it.heard(engine)
        it.events.sent(sent, members)
        await until(lambda: it.index.cached(sent).keys() == {engine.url})
        it.events.sent(*text_of_another_kind())
        assert not it.events._lessons


def text_of_another_kind() -> tuple[Chain, dict[str, Any]]:
    body = read_body(json.dumps({"model": "sim", "messages": [{"role": "user", "content": TEXT}]}).encode(), "chat")
    return chain_of(body, KEY), body.members


def test_a_tokenizer_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(CannotListen, match="nowhere"):
        load_tokenizer(str(tmp_path / "nowhere.json"))
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(CannotListen, match="broken"):
        load_tokenizer(str(tmp_path / "broken.json"))


def test_extras_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(CannotListen, match=r"pip install pd-proxy\[tokenizers\]"):
        load_tokenizer("any")
    monkeypatch.setitem(__import__("sys").modules, "zmq", None)
    settings = build_settings({"mixed": ["a:1"], "kv_events": {"endpoint": "tcp://{host}:5557"}}, {})
    with pytest.raises(CannotListen, match=r"kv_events.endpoint is set.*pip install pd-proxy\[zmq\]"):
        KvEvents(settings, Fleet(settings), PrefixIndex(), KEY).start()


async def test_nothing_is_followed_without_an_endpoint_in_the_settings() -> None:
    settings = build_settings({"mixed": ["a:1"]}, {})
    events = KvEvents(settings, Fleet(settings), PrefixIndex(), KEY)
    events.start()
    assert not events.wanted and not events._tasks
    await events.close()


async def test_the_events_of_a_rank_count_for_that_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two engines act as the ranks of one."""
    async with AsyncExitStack() as stack:
        engines = [await stack.enter_async_context(Simulator(SimulatorConfig(kv_events=0))) for _ in range(2)]
        url = engines[0].url
        settings = build_settings(
            {
                "mixed": [url],
                "kv_events": {"endpoint": "tcp://{host}:5557"},
                "locations": [{"backend": url, "dp": 2}],
            },
            {},
        )
        ports = [engine.kv_events_port for engine in engines]
        monkeypatch.setattr("pd_proxy.fleet.zmq.kv_events._LOOK", 0.01)
        monkeypatch.setattr(
            "pd_proxy.fleet.zmq.kv_events._endpoint",
            lambda template, host, port, rank: f"tcp://127.0.0.1:{ports[rank]}" if template else "",
        )
        index, fleet = PrefixIndex(), Fleet(settings)
        [backend] = fleet
        backend.models = {"sim": {"id": "sim"}}
        events = KvEvents(settings, fleet, index, KEY)
        stack.push_async_callback(events.close)
        it = Bed(engines, fleet, events, index)
        stack.push_async_callback(it.http.aclose)
        sent = chain(prompt=PROMPT)
        events.start()
        events.sent(sent, {})
        await until(lambda: events.connected == 2 and all(e.publisher and e.publisher.subscriptions for e in engines))
        await it.ask(engines[1], PROMPT)
        await it.heard(engines[1])
        assert not index.cached(sent), "the index knows nothing of the engine yet"
        for name in (url, *backend.rank_names):
            index.join(name, 1 << 20)
        await until(lambda: index.cached(sent).keys() == {f"{url}#1"})
        await it.ask(engines[0], PROMPT)
        await until(lambda: index.cached(sent).keys() == {f"{url}#0", f"{url}#1"})
        for name in (url, *backend.rank_names):
            index.clear(name)
        events.lost(backend)  # it missed a health check
        await until(lambda: index.cached(sent).keys() == {f"{url}#0", f"{url}#1"})
        engines[0].engine.pool.forget()
        await until(lambda: index.cached(sent).keys() == {f"{url}#1"})
        backend.locate(Coordinates())
        await until(lambda: url in events.corrections.held and len(events.corrections.held) == 1)


@pytest.mark.parametrize(
    ("template", "host", "port", "rank", "endpoint"),
    [
        ("tcp://{host}:5557", "10.0.0.9", 0, 0, "tcp://10.0.0.9:5557"),
        ("tcp://{host}:5557", "engine", 0, 3, "tcp://engine:5560"),
        ("tcp://{host}:5557", "fd00::9", 7000, 1, "tcp://[fd00::9]:7001"),
        ("tcp://broker:5557", "engine", 0, 0, "tcp://broker:5557"),
        ("", "engine", 7000, 0, ""),
    ],
)
def test_each_rank_of_an_engine_publishes_at_a_port_of_its_own(
    template: str, host: str, port: int, rank: int, endpoint: str
) -> None:
    assert _endpoint(template, host, port, rank) == endpoint


@pytest.mark.parametrize(
    "wrong",
    [
        {"endpoint": "5557"},
        {"endpoint": "tcp://*:5557"},
        {"endpoint": "tcp://{host}"},
        {"endpoint": "http://{host}:5557"},
        {"endpoint": "tcp://{host}:5557/x"},
        {"replay": "tcp://{host}:5558"},
        {"endpoint": "tcp://{host}:5557", "replay": "tcp://{host}:5557"},
    ],
)
def test_endpoints_that_are_not_valid_are_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="kv_events"):
        build_settings({"mixed": ["a:1"], "kv_events": wrong}, {})
