"""Which prompts engines are believed to have in their caches, and where requests go because of that."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from pd_proxy.fleet.backend import Backend
from pd_proxy.fleet.health.kv_cache import Cache
from pd_proxy.fleet.pool_speeds import PoolSpeeds
from pd_proxy.fleet.speeds import Speeds
from pd_proxy.flow.prompts import Prompts, Sent
from pd_proxy.flow.request import Request
from pd_proxy.handoff.coordinates import Coordinates
from pd_proxy.prefix.chain import chain_of_ids
from pd_proxy.prefix.index import Caching, PrefixIndex
from pd_proxy.telemetry.records import PrefixCounts
from pd_proxy_simulator import Simulator

from tests.support import Running, pools, running_gateway, simulators, until

WORDS = "The decode backend reads the cache of the prefill backend and goes on from there. "
KEY = bytes(32)


def conversation(turns: int, topic: str = "a", **more: object) -> dict[str, Any]:
    """A chat of so many questions, each of some hundred tokens."""
    said = [{"role": "user", "content": f"{topic}{number}: {WORDS * 16}"} for number in range(turns)]
    return {"model": "sim", "messages": said, "max_tokens": 4, **more}


async def ask(running: Running, body: dict[str, Any], **headers: str) -> httpx.Response:
    answer = await running.http.post("/v1/chat/completions", json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer


def served(engines: Iterable[Simulator]) -> list[int]:
    """How many requests each engine has got."""
    return [len(engine.requests) for engine in engines]


async def test_a_conversation_goes_on_where_its_beginning_is_cached() -> None:
    async with pools(prefill=4, decode=1, engine={"prefill_rate": 20_000.0}) as (running, engines, _):
        for turns in range(1, 6):
            await ask(running, conversation(turns))
        assert sorted(served(engines)) == [0, 0, 0, 5]


async def test_a_prefix_is_looked_for_at_engines_that_are_about_to_compute_it() -> None:
    async with pools(prefill=4, decode=1, engine={"prefill_rate": 20_000.0}) as (running, engines, _):
        await ask(running, conversation(1, "first"))
        first = asyncio.create_task(ask(running, conversation(8)))
        await until(lambda: sum(served(engines)) == 2)
        [holder] = [engine for engine in engines if engine.requests and len(str(engine.requests[-1].body)) > 8000]
        believed = running.gateway.prompts.index.tokens(holder.url)
        assert believed > 2000 and not first.done()
        await first


@pytest.mark.parametrize("way", ["reset", "restart"])
async def test_a_cache_that_is_empty_is_not_believed_in(way: str) -> None:
    async with pools(prefill=2, decode=1) as (running, engines, _):
        await ask(running, conversation(3))
        [holder] = [engine for engine in engines if engine.requests]
        index = running.gateway.prompts.index
        assert index.tokens(holder.url) > 200
        if way == "reset":
            await running.http.post("/admin/reset_prefix_cache")
        else:
            backend = running.gateway.fleet.find(holder.url, "prefill")
            assert backend is not None
            running.gateway.fleet.take_out(backend, "it is said to be gone")
            running.gateway.fleet.bring_in(backend)
        assert index.tokens(holder.url) == 0


async def test_an_engine_that_has_lost_a_prefix_has_lost_what_it_used_before_that_too() -> None:
    async with pools(prefill=1, decode=1) as (running, [engine], _):
        index = running.gateway.prompts.index
        await ask(running, conversation(3, "older"))
        await ask(running, conversation(3, "newer"))
        both = index.tokens(engine.url)
        engine.engine.pool.forget()  # without a report to the gateway
        await ask(running, conversation(3, "newer"))
        assert index.tokens(engine.url) == pytest.approx(both / 2, rel=0.1)
        assert index.figures(0.0).forgotten > 0


async def test_an_engine_without_a_prefix_cache_is_not_looked_for_prefixes() -> None:
    async with pools(prefill=2, decode=1, engine={"prefix_caching": False}) as (running, engines, _):
        for _ in range(3):
            await ask(running, conversation(3))
        assert [running.gateway.prompts.index.tokens(engine.url) for engine in engines] == [0, 0]


@pytest.mark.parametrize(
    ("headers", "more"),
    [({"x-session-id": "s1"}, {}), ({}, {"user": "u1"}), ({}, {"prompt_cache_key": "k1"})],
    ids=["header", "user", "prompt_cache_key"],
)
async def test_the_policy_session_keeps_a_session_on_one_engine(headers: dict[str, str], more: dict[str, str]) -> None:
    async with pools(prefill=4, decode=4, policy={"prefill": "session", "decode": "session"}) as (running, p, d):
        for number in range(4):
            await ask(running, conversation(1, topic=f"turn {number}", **more), **headers)
        assert sorted(served(p)) == [0, 0, 0, 4]
        assert sorted(served(d)) == [0, 0, 0, 4]


async def test_a_request_that_would_be_late_is_refused_and_one_that_is_not_is_served() -> None:
    slow = {"prefill_rate": 2000.0}
    late = {"targets": {"ttft": 1.0}, "admission": {"slo": "refuse"}}
    async with pools(engine=slow, **late) as (running, _, _):
        speeds = running.gateway.fleet.pool("prefill")[0].speeds
        for topic in "abc":
            await ask(running, conversation(1, topic))
        assert speeds.rate == pytest.approx(2000, rel=0.9), "what the engine's speed has been learnt to be"
        answer = await running.http.post("/v1/chat/completions", json=conversation(400))
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "target_missed"
        assert int(answer.headers["retry-after"]) > 1
        await ask(running, conversation(1, "d"))
        assert (await running.metrics())['pd_proxy_refused_total{client="anonymous",code="target_missed"}'] == 1


async def test_nothing_is_kept_of_a_request_whose_client_leaves() -> None:
    async with pools(engine={"prefill_rate": 100.0}) as (running, [engine], _):
        with pytest.raises(httpx.TimeoutException):
            await running.http.post("/v1/chat/completions", json=conversation(10), timeout=0.2)
        await until(running.idle)
        assert running.gateway.prompts.index.tokens(engine.url) == 0
        assert running.gateway.fleet.pool("prefill")[0].speeds.outstanding == 0


# Data-parallel ranks


@asynccontextmanager
async def ranks(prefill: int = 1, mixed: bool = False, **config: Any) -> AsyncIterator[tuple[Running, list[Simulator]]]:
    """A gateway before engines of two ranks."""
    async with simulators(*["prefill"] * prefill, "decode", **config) as engines:
        urls = [engine.url for engine in engines]
        places = [{"backend": url, "dp": 2} for url in urls]
        pools = ([], [], urls) if mixed else (urls[:-1], urls[-1:], [])
        async with running_gateway(*pools, locations=places) as running:
            yield running, engines


def went_to(engine: Simulator) -> list[str]:
    """The rank that each request to an engine was for."""
    return [request.headers["x-data-parallel-rank"] for request in engine.requests]


@pytest.mark.parametrize("mixed", [False, True], ids=["pair", "mixed"])
async def test_a_conversation_goes_on_on_the_rank_where_its_beginning_is_cached(mixed: bool) -> None:
    async with ranks(mixed=mixed) as (running, engines):
        backends = list(running.gateway.fleet)
        for backend in backends:
            backend.ranks[0] += 1000
        await ask(running, conversation(1))
        for backend in backends:
            backend.ranks[0] -= 1000
        [first, *_] = [engine for engine in engines if engine.requests]
        for turns in range(2, 5):
            await ask(running, conversation(turns))
            await ask(running, conversation(1, f"another {turns}"))
        await until(running.idle)
        asked = went_to(first)
        assert asked[0] == "1"
        begun = [str(request.body["messages"][0]["content"])[:2] == "a0" for request in first.requests]
        assert {rank for rank, own in zip(asked, begun, strict=True) if own} == {"1"}
        assert all(not any(backend.ranks) and not any(backend.rank_work) for backend in backends)


async def test_a_prefix_is_computed_on_one_rank_and_what_is_new_beside_it_on_the_other() -> None:
    async with ranks(prefill_rate=20_000.0) as (running, [prefill, _]):
        backend = running.gateway.fleet.pool("prefill")[0]
        await ask(running, conversation(1))
        long = asyncio.create_task(ask(running, conversation(8)))
        await until(lambda: served([prefill]) == [2])
        assert backend.rank_work[0] > 1000
        assert backend.rank_work[1] == 0
        await ask(running, conversation(1, "new"))
        await long
        assert went_to(prefill) == ["0", "0", "1"]
        index = running.gateway.prompts.index
        assert index.tokens(f"{prefill.url}#0") > 1000 > index.tokens(f"{prefill.url}#1") > 0


async def test_an_engine_that_restarts_has_nothing_on_any_rank() -> None:
    async with ranks() as (running, [prefill, decode]):
        index, fleet = running.gateway.prompts.index, running.gateway.fleet
        names = [f"{engine.url}#{rank}" for engine in (prefill, decode) for rank in (0, 1)]
        for rank in (0, 1):
            for backend in fleet:
                backend.ranks[1 - rank] += 100_000 * (rank + 1)
            await ask(running, conversation(2, f"to {rank}"))
        assert all(index.tokens(name) > 100 for name in names)
        for backend in fleet:
            fleet.take_out(backend, "it is said to be gone")
            fleet.bring_in(backend)
        assert not any(index.tokens(name) for name in names)


async def test_of_a_request_whose_rank_the_engine_chooses_none_is_believed_to_have_the_prompt() -> None:
    async with ranks(mixed=True) as (running, engines):
        body = {"model": "sim", "input": WORDS * 40, "max_output_tokens": 4}
        assert (await running.http.post("/v1/responses", json=body)).status_code == 200
        [engine] = [one for one in engines if one.requests]
        index = running.gateway.prompts.index
        assert index.tokens(engine.url) > 100
        assert not any(index.tokens(f"{engine.url}#{rank}") for rank in (0, 1))
        assert (await running.http.post("/v1/responses", json=body)).status_code == 200
        assert len(engine.requests) == 2


def test_ranks_share_an_engines_cache_and_leave_with_it() -> None:
    index, backend = PrefixIndex(), Backend("http://p", "prefill")
    prompts = Prompts(index, KEY)
    backend.locate(Coordinates(dp=4))
    prompts.learnt(backend, Cache(4000, True, 4))
    assert set(index.engines) == {"http://p", *backend.rank_names} == set(prompts.ranked) and len(index.engines) == 5
    chain = chain_of_ids(range(16 * 100), 1, KEY)
    index.enter("http://p#3", chain)
    assert index.tokens("http://p#3") <= 1000
    backend.locate(Coordinates(dp=2))
    prompts.learnt(backend, Cache(4000, True, 2))
    assert set(index.engines) == {"http://p", "http://p#0", "http://p#1"} == set(prompts.ranked)
    prompts.learnt(backend, Cache(4000, False, 2))
    assert index.caching("http://p#1") is Caching.ABSENT
    prompts.forget(backend)
    assert not index.engines
    assert not prompts.ranked


# One try's prompt


class Bed:
    """Two backends, and an index of them."""

    def __init__(self) -> None:
        self.index = PrefixIndex()
        self.prefill, self.decode = Backend("http://p", "prefill"), Backend("http://d", "decode")
        for backend in (self.prefill, self.decode):
            self.index.join(backend.url)
        self.chain = chain_of_ids(range(160), 1, KEY)

    def send(self, *, alone: bool = False, most: int = 1000, **ranks: Any) -> Sent:
        decode = None if alone else self.decode
        return Sent(self.index, self.chain, 160, self.prefill, decode, 160, PrefixCounts(), most, **ranks)

    @property
    def believed(self) -> dict[str, int]:
        return dict(self.index.cached(self.chain))

    @property
    def outstanding(self) -> int:
        return self.prefill.speeds.outstanding


class RecordedSpeeds(Speeds):
    """The speeds of an engine, which record the reports of legs: tokens that were computed, and tokens of the
    prompt."""

    def __init__(self) -> None:
        super().__init__(PoolSpeeds())
        self.recorded: list[tuple[int, int]] = []

    def answered(self, believed: int, computed: int, prompt: int, now: float) -> None:
        self.recorded.append((computed, prompt))
        super().answered(believed, computed, prompt, now)


BOTH = {"http://p": 160, "http://d": 160}


def test_a_prompt_is_entered_when_it_is_sent() -> None:
    bed = Bed()
    with bed.send():
        assert bed.believed == BOTH
        assert bed.outstanding == 160


def test_a_prompt_that_was_not_answered_is_withdrawn() -> None:
    bed = Bed()
    with bed.send():
        pass
    assert bed.believed == {}
    assert bed.outstanding == 0


def test_a_prompt_that_was_answered_stays_and_decode_has_it_too() -> None:
    bed = Bed()
    with bed.send() as sent:
        sent.prefilled(0, 160)
        assert bed.outstanding == 0
        sent.first_token()
    assert bed.believed == BOTH


def test_a_prompt_that_prefill_computed_and_decode_never_read_is_prefills_alone() -> None:
    bed = Bed()
    with bed.send() as sent:
        sent.prefilled(None, 0)
    assert bed.believed == {"http://p": 160}


def test_a_hand_off_that_goes_to_another_takes_its_prompt_along() -> None:
    bed, other = Bed(), Backend("http://other", "decode")
    bed.index.join(other.url)
    with bed.send() as sent:
        sent.prefilled(None, 0)
        sent.goes_to(other)
        sent.first_token()
    assert bed.believed == {"http://p": 160, "http://other": 160}


def test_an_engine_that_does_both_is_timed_by_its_first_token() -> None:
    bed = Bed()
    with bed.send(alone=True) as sent:
        sent.first_token()
        assert bed.outstanding == 0
        assert bed.prefill.speeds.prefills
        sent.counted(0, 160)
    assert bed.believed == {"http://p": 160}


def test_a_whole_answer_does_not_show_how_fast_its_engine_prefills() -> None:
    bed = Bed()
    with bed.send(alone=True) as sent:
        sent.ended()
    assert bed.outstanding == 0
    assert not bed.prefill.speeds.prefills
    assert bed.believed == {"http://p": 160}


def test_the_load_table_has_the_tokens_that_are_left_to_prefill() -> None:
    bed, recorded = Bed(), list[int]()
    bed.prefill.on_uncached_changed = lambda tokens, since: recorded.append(tokens)
    with bed.send() as sent:
        sent.prefilled(None, 0)
    with bed.send():
        pass
    assert recorded == [160, 0, 160, 0]


def test_a_prefill_that_runs_on_without_its_request_stays_work_until_it_has_ended() -> None:
    bed = Bed()
    with bed.send() as sent:
        sent.runs_on()
    assert bed.outstanding == 160
    assert bed.believed == {"http://p": 160}
    sent.prefilled(0, 160)
    sent.over()
    assert bed.outstanding == 0
    assert bed.believed == {"http://p": 160}


def test_a_prefill_that_runs_on_and_fails_is_withdrawn() -> None:
    bed = Bed()
    with bed.send() as sent:
        sent.runs_on()
    sent.over()
    assert bed.outstanding == 0 and bed.believed == {}


def test_reports_after_the_end_of_a_request_do_not_change_the_work_of_others() -> None:
    bed = Bed()
    with bed.send() as sent:
        pass
    with bed.send():
        sent.prefilled(0, 160)
        sent.first_token()
        sent.counted(0, 160)
        assert bed.outstanding == 160
        assert bed.believed == BOTH


def test_an_engine_that_reports_prompts_longer_than_their_bytes_is_not_believed_to_be_fast() -> None:
    bed, recorded = Bed(), RecordedSpeeds()
    bed.prefill.speeds = recorded
    with bed.send(most=640) as sent:
        sent.prefilled(0, 1_000_000)
    with bed.send(most=640) as other:
        other.prefilled(1_000_000, 1_000_000)
    with bed.send(alone=True, most=640) as alone:
        alone.first_token()
        alone.counted(0, 641)
    assert bed.index.figures(0.0).refused == 3
    assert recorded.recorded == [(160, 160)] * 3


def test_cached_tokens_count_though_the_length_of_the_prompt_is_not_reported() -> None:
    bed, recorded = Bed(), RecordedSpeeds()
    bed.prefill.speeds = recorded
    with bed.send() as sent:
        sent.prefilled(100, 0)
    assert recorded.recorded == [(60, 160)]


def of_ranks() -> Bed:
    bed = Bed()
    for backend in (bed.prefill, bed.decode):
        backend.locate(Coordinates(dp=2))
        for name in backend.rank_names:
            bed.index.join(name)
    return bed


@pytest.mark.parametrize("way", ["answered", "first_token", "ended", "withdrawn", "over"])
def test_the_prefill_work_of_a_rank_is_counted_until_it_is_done(way: str) -> None:
    bed = of_ranks()
    work = bed.prefill.rank_work
    with bed.send(rank=1, decode_rank=0) as sent:
        assert work == [0, 160]
        assert bed.believed == {"http://p#1": 160, "http://d#0": 160}
        bed.prefill.locate(Coordinates(dp=3))  # it counts where it was counted
        ways = {"answered": lambda: sent.prefilled(0, 160), "first_token": sent.first_token}
        {**ways, "ended": sent.ended, "over": sent.over}.get(way, lambda: None)()
        assert work == [0, 160 if way == "withdrawn" else 0]
    assert work == [0, 0]
    assert bed.prefill.rank_work == [0, 0, 0]
    assert bed.believed.keys() <= {"http://p#1", "http://d#0"}


def test_a_hand_off_that_goes_to_another_goes_to_a_rank_of_it() -> None:
    bed, other = of_ranks(), Backend("http://other", "decode")
    other.locate(Coordinates(dp=2))
    for name in (other.url, *other.rank_names):
        bed.index.join(name)
    for ranked, name in ((True, "http://other#1"), (False, "http://other")):
        with bed.send(rank=1, decode_rank=0, ranked=ranked) as sent:
            sent.prefilled(None, 0)
            sent.goes_to(other, 1)
            sent.first_token()
        assert name in bed.believed
    assert "http://d#0" not in bed.believed


async def test_of_prompts_that_take_next_to_no_time_one_of_eight_is_followed() -> None:
    async with pools(prefill=2, decode=1) as (running, _, _):
        placing = running.gateway.placing
        followed = list[str]()
        sent = placing._prompts.sent

        def noted(request: Request, *more: Any) -> Sent:
            followed.append(request.record.request_id)
            return sent(request, *more)

        placing._prompts.sent = noted  # type: ignore[method-assign]
        placing._pace, placing._paced_until = 1e-9, float("inf")
        for _ in range(16):
            await ask(running, conversation(1))
        assert len(followed) == 2
        placing._pace = 1.0
        await ask(running, conversation(1))
        assert len(followed) == 3
