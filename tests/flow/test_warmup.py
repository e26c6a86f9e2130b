"""New pairs are warmed up without a client's request."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from pd_proxy.fleet.backend import Backend
from pd_proxy.flow import trial, warmup
from pd_proxy.flow.warmup import model_of
from pd_proxy_simulator import Simulator

from tests.support import Running, chat, pools, running_gateway, simulators, text_of, until

pytestmark = pytest.mark.cross_product

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
LOG = "pd_proxy.flow"


def warmed(*engines: Simulator) -> int:
    """How many warm-up legs engines were given: the tests' own requests are chats."""
    return sum(request.path == COMPLETIONS for engine in engines for request in engine.requests)


def at_rest(running: Running, *engines: Simulator) -> bool:
    """Whether everything is over, on both sides of the gateway."""
    return running.idle() and not any(e.engine.running or e.engine.waiting or e.engine.stranded_blocks for e in engines)


async def test_each_pair_is_warmed_up_once_and_no_metric_of_clients_shows_it() -> None:
    async with pools(2, 3, warmup=True) as (running, prefill, decode):
        await until(lambda: warmed(*prefill) == 6 and warmed(*decode) == 6)
        await until(lambda: at_rest(running, *prefill, *decode))
        assert [warmed(engine) for engine in decode] == [2, 2, 2]
        metrics = await running.metrics()
        for name in ("requests_total", "tokens_total", "time_to_first_token_seconds_count", "prefill_duration_seconds"):
            assert not [key for key in metrics if key.startswith(f"pd_proxy_{name}")], name
        answer = await running.http.post(CHAT, json=chat())
        assert answer.status_code == 200
        assert warmed(*prefill, *decode) == 12


async def test_each_decode_engine_has_met_each_prefill_engine() -> None:
    async with pools(2, 2, warmup=True) as (running, prefill, decode):
        await until(lambda: warmed(*decode) == 4 and at_rest(running, *prefill, *decode))
        for engine in decode:
            sent = [request for request in engine.requests if request.path == COMPLETIONS]
            ports = {request.body["kv_transfer_params"]["remote_port"] for request in sent}
            assert len(ports) == 2
            assert all(request.body["max_tokens"] == 1 for request in sent)
        assert all(engine.engine.stats.local_cache_hit == 0 for engine in decode)


async def test_a_backend_that_joins_or_comes_back_is_warmed_up_with_the_others() -> None:
    async with pools(1, 1, warmup=True) as (running, [p], [d]), simulators("decode") as [late]:
        await until(lambda: warmed(d) == 1 and at_rest(running, p, d))
        await running.http.post("/instances/add", json={"type": "decode", "instances": [late.url]})
        await until(lambda: warmed(late) == 1)
        assert warmed(d) == 1
        await until(lambda: at_rest(running, p, d, late))
        before = warmed(p)
        late.kill()
        [backend] = [b for b in running.gateway.fleet if b.url == late.url]
        await until(lambda: not backend.up)
        await late.restart()
        await until(lambda: warmed(p) == before + 1)


async def test_no_request_waits_for_a_warm_up_and_one_that_hands_over_makes_the_gateway_ready() -> None:
    async with (
        simulators("prefill", "decode", "decode") as [p, first, second],
        running_gateway([p.url], [first.url, second.url], ready=False, warmup=True) as running,
    ):
        p.faults.add("hang", leg="prefill", count=2)
        await until(lambda: warmed(p) == 2)
        ready = await running.http.get("/ready")
        assert ready.status_code == 503
        assert "one is being tried" in ready.json()["error"]["message"]
        for _ in range(4):
            answer = await running.http.post(CHAT, json=chat())
            assert answer.status_code == 200
        assert warmed(first, second) == 0
        assert (await running.http.get("/ready")).status_code == 200


async def test_a_pair_that_waits_is_skipped_after_a_real_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(warmup, "_AT_ONCE", 1)
    monkeypatch.setattr(trial, "TIMEOUT", 0.5)
    async with simulators("prefill", "decode", "decode") as [p, *decode]:
        p.faults.add("hang", leg="prefill", count=1)
        urls = [engine.url for engine in decode]
        settings: dict[str, Any] = {"warmup": True, "policy": {"decode": "round_robin"}}
        async with running_gateway([p.url], urls, **settings) as running:
            await until(lambda: warmed(p) == 1)
            for _ in range(4):
                assert (await running.http.post(CHAT, json=chat())).status_code == 200
            await until(lambda: at_rest(running, p, *decode))
            assert warmed(p) == 1, "both pairs had served a user before the second one's turn came"


async def test_a_warm_up_that_fails_does_not_change_the_health_of_a_backend() -> None:
    breaker = {"consecutive_failures": 1}
    async with simulators("prefill", "decode", "decode") as [p, *decode]:
        for engine in decode:
            engine.faults.add("status", status=500, leg="decode", count=1)
        urls = [engine.url for engine in decode]
        async with running_gateway([p.url], urls, warmup=True, breaker=breaker) as running:
            await until(lambda: warmed(*decode) >= 2)
            await until(running.idle)
            fleet = running.gateway.fleet
            assert [fleet.state(backend) for backend in fleet] == ["up", "up", "up"]
            assert not fleet.outlier_detector.ejections
            assert text_of((await running.http.post(CHAT, json=chat())).json())


async def test_many_newcomers_are_bounded_in_number_and_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warmup, "_PEERS", 2)
    monkeypatch.setattr(warmup, "_AT_ONCE", 3)
    most = 0
    async with simulators(*["prefill"] * 5, *["decode"] * 5, prefill_rate=10_000.0) as engines:
        prefill, decode = engines[:5], engines[5:]
        async with running_gateway([e.url for e in prefill], [e.url for e in decode], warmup=True) as running:
            fleet = running.gateway.fleet

            def over() -> bool:
                nonlocal most
                most = max(most, sum(backend.inflight_requests for backend in fleet.pool("decode")))
                return warmed(*decode) >= 10 and at_rest(running, *engines)

            await until(over)
            assert 1 <= most <= 3
            assert 10 <= warmed(*decode) <= 20, "each brings two pairs at most, and many are brought by both"


@asynccontextmanager
async def unlike(
    prefill: dict[str, Any], decode: dict[str, Any], **settings: Any
) -> AsyncIterator[tuple[Running, Simulator, Simulator]]:
    """A gateway that warms up a pair of engines with settings of their own."""
    async with (
        simulators("prefill", **prefill) as [p],
        simulators("decode", **decode) as [d],
        running_gateway([p.url], [d.url], **{"warmup": True, **settings}) as running,
    ):
        yield running, p, d


def handoffs(running: Running) -> list[tuple[str, bool]]:
    """The state of every backend's hand-offs, and whether one has ever worked."""
    return [(backend.handoff.state, backend.handed_over) for backend in running.gateway.fleet]


async def ready(running: Running) -> str:
    """Empty when /ready is 200, else what it says."""
    answer = await running.http.get("/ready")
    return "" if answer.status_code == 200 else str(answer.json()["error"]["message"])


async def test_a_pair_that_cannot_hand_over_is_not_ready_and_the_reason_is_shown(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Prefill calls itself by an address at which nobody listens: VLLM_NIXL_SIDE_CHANNEL_HOST is wrong."""
    async with simulators("prefill", side_host="127.0.0.9") as [p], simulators("decode") as [d]:
        with caplog.at_level(logging.INFO, "pd_proxy.flow"):
            async with running_gateway([p.url], [d.url], warmup=True) as running:
                assert await ready(running), "before the first trial has ended, too"
                await until(lambda: handoffs(running) == [("failed", False)] * 2)
                said = await ready(running)
                assert "decode cannot reach prefill's KV cache" in said
                assert "127.0.0" not in said, "whoever reaches the port may read it"
                metrics = await running.metrics()
                assert metrics["pd_proxy_ready"] == 0
                assert metrics['pd_proxy_pair_warmups_total{result="side_channel"}'] >= 1
                assert metrics[f'pd_proxy_backend_handoff_verified{{backend="{d.url}",pool="decode"}}'] == 0
                listed = (await running.http.get("/admin/backends")).json()["backends"]
                for one, other in ((listed[0], listed[1]), (listed[1], listed[0])):
                    shown = one["handoff"]
                    assert (shown["state"], shown["ever"], shown["code"]) == ("failed", False, "side_channel")
                    assert shown["with"] == other["url"]
                    assert f"127.0.0.9:{p.side_port}" in shown["reason"]
                    assert "VLLM_NIXL_SIDE_CHANNEL_HOST" in shown["advice"]
                    assert shown["at"].endswith("+00:00")
                answer = await running.http.post(CHAT, json=chat())
                assert answer.status_code == 200, "requests are served all the same"
                assert answer.headers["x-pd-proxy-fallback"]
                assert await ready(running), "and a fallback is no hand-off"
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING and record.name == LOG]
    [warning] = [record.getMessage() for record in warnings if "hand-off does not work" in record.getMessage()]
    assert p.url in warning and d.url in warning and "VLLM_NIXL_SIDE_CHANNEL_HOST" in warning


@pytest.mark.parametrize(
    ("prefill", "decode", "code"),
    [
        ({"connector": "none"}, {}, "no_params"),
        ({}, {"connector": "none"}, "not_read"),
        ({"connector": "none"}, {"connector": "none"}, "no_params"),
        ({"connector": "mooncake"}, {"connector": "mooncake"}, "wrong_connector"),
        ({}, {"connector": "mooncake"}, "wrong_connector"),
        ({}, {"block_size": 32}, "decode_failed"),
        ({"weights": 1}, {}, "decode_failed"),
    ],
)
async def test_engines_that_speak_something_else_never_become_ready(
    prefill: dict[str, Any], decode: dict[str, Any], code: str
) -> None:
    async with unlike(prefill, decode) as (running, p, d):
        await until(lambda: all(state == ("failed", False) for state in handoffs(running)))
        [backend] = running.gateway.fleet.pool("decode")
        finding = backend.handoff.finding
        assert finding is not None
        assert (finding.code, finding.backends) == (code, (p.url, d.url))
        assert await ready(running)
        if code != "wrong_connector":  # where each engine waits for something else, so would the request
            answer = await running.http.post(CHAT, json=chat())
            assert answer.status_code == 200
        assert await ready(running), "an answer that decode made alone is no hand-off"


async def test_a_decode_engine_that_computes_the_prompt_itself_fails_the_trial() -> None:
    """`kv_load_failure_policy: recompute`: every answer is a 200."""
    async with unlike({"side_host": "127.0.0.9"}, {"load_failure_policy": "recompute"}) as (running, _, _):
        await until(lambda: handoffs(running) == [("failed", False)] * 2)
        [backend] = running.gateway.fleet.pool("decode")
        assert backend.handoff.finding is not None
        assert backend.handoff.finding.code == "side_channel"
        assert await ready(running)


async def test_roles_that_are_swapped_are_a_warning_where_hand_offs_work(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, LOG):
        async with (
            simulators("prefill", "decode", "decode") as [p, d, e],
            running_gateway([d.url, e.url], [p.url], warmup=True) as running,
        ):
            await until(lambda: handoffs(running) == [("ok", True)] * 3)
            await until(lambda: warmed(p) == 2 and at_rest(running, p, d, e))
            assert not await ready(running)
            listed = (await running.http.get("/admin/backends")).json()["backends"]
            assert [one["handoff"]["code"] for one in listed] == ["roles_swapped"] * 3
    lines = [record.getMessage() for record in caplog.records if "was started as a" in record.getMessage()]
    assert len(lines) == 3, "one for each engine"


async def test_engines_that_share_no_cache_are_ready_and_a_warning(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    shared = {"connector": "shared_cache"}
    prefill, decode = ({**shared, "shared_path": str(tmp_path / name)} for name in ("one", "other"))
    with caplog.at_level(logging.WARNING, LOG):
        async with unlike(prefill, decode, **shared) as (running, _, _):
            await until(lambda: handoffs(running) == [("ok", True)] * 2)
            assert not await ready(running)
            listed = (await running.http.get("/admin/backends")).json()["backends"]
            assert [one["handoff"]["code"] for one in listed] == ["not_read"] * 2
    assert len([record for record in caplog.records if "shared cache" in record.getMessage()]) == 1


async def test_a_cold_engine_becomes_ready_without_anybody_s_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warmup, "_FIRST_WAIT", 0.05)
    async with simulators("prefill", "decode") as [p, d]:
        d.faults.add("status", status=500, leg="decode", count=4)  # two trials, and what each has to let go
        async with running_gateway([p.url], [d.url], warmup=True) as running:
            await until(lambda: handoffs(running) == [("ok", True)] * 2)
            assert not await ready(running)
            metrics = await running.metrics()
            assert metrics['pd_proxy_pair_warmups_total{result="decode_failed"}'] == 2
            assert metrics['pd_proxy_pair_warmups_total{result="ok"}'] == 1
            listed = (await running.http.get("/admin/backends")).json()["backends"]
            assert [one["handoff"]["code"] for one in listed] == [None, None]


async def test_engines_that_are_mended_become_ready_by_their_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    """What failed for a minute is tried every minute; who comes back is tried at once."""
    monkeypatch.setattr(warmup, "_FIRST_WAIT", 60.0)
    async with unlike({"side_host": "127.0.0.9"}, {}) as (running, p, _):
        await until(lambda: handoffs(running) == [("failed", False)] * 2)
        p.config = dataclasses.replace(p.config, side_host="")
        p.kill()
        await until(lambda: not running.gateway.fleet.pool("prefill")[0].up)
        await p.restart()
        await until(lambda: handoffs(running) == [("ok", True)] * 2)
        assert not await ready(running)


async def test_a_pair_that_has_handed_over_once_is_ready_again_by_its_health_alone() -> None:
    async with pools(1, 1, warmup=True) as (running, _, [d]):
        await until(lambda: handoffs(running) == [("ok", True)] * 2)
        d.kill()
        await until(lambda: not running.gateway.fleet.pool("decode")[0].up)
        assert "no decode backend is up" in await ready(running)
        await d.restart()
        d.faults.add("hang", leg="decode")
        await until(lambda: running.gateway.fleet.pool("decode")[0].up)
        assert not await ready(running)


async def test_one_pair_that_works_is_enough_and_the_others_are_logged() -> None:
    async with (
        simulators("prefill", "decode") as [p, d],
        simulators("prefill", side_host="127.0.0.9") as [bad],
        running_gateway([p.url, bad.url], [d.url], warmup=True) as running,
    ):
        good, wrong = running.gateway.fleet.pool("prefill")
        await until(lambda: good.handoff.state == "ok" and wrong.handoff.state == "failed")
        assert not await ready(running)
        assert not wrong.handed_over


async def test_backends_from_different_pairs_that_work_count_only_where_they_may_pair() -> None:
    async with simulators("prefill", "decode") as [p, d]:
        other = {"name": "other", "prefill": [p.url], "decode": [d.url]}
        async with running_gateway(groups=[other], warmup=True) as running:
            await until(lambda: handoffs(running) == [("ok", True)] * 2)
            assert not await ready(running)


@pytest.mark.parametrize(("fallback", "is_ready"), [("local_prefill", True), ("reject", False)])
async def test_an_operator_may_have_the_fallback_count_as_ready(fallback: str, is_ready: bool) -> None:
    settings: dict[str, Any] = {"fallback": fallback, "ready_by_fallback": True}
    async with unlike({"side_host": "127.0.0.9"}, {}, **settings) as (running, _, _):
        await until(lambda: handoffs(running) == [("failed", False)] * 2)
        assert (not await ready(running)) is is_ready


async def test_a_warm_up_that_failed_leaves_nothing_on_prefill() -> None:
    """Decode refuses the hand-off, and is the one to tell prefill that nobody wants it."""
    async with simulators("prefill", "decode", lease=600.0) as [p, d]:
        d.faults.add("status", status=503, leg="decode", count=1)
        async with running_gateway([p.url], [d.url], warmup=True) as running:
            await until(lambda: running.gateway.fleet.warmups["decode_failed"] == 1)
            await until(lambda: at_rest(running, p, d) and len(p.engine.handoffs) == 0)


async def test_a_pair_that_may_be_one_only_later_is_tried_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models come and go at run time."""
    async with simulators("prefill", "decode") as [p, d]:
        with monkeypatch.context() as patched:
            patched.setattr(d.adapters, "cards", lambda: [{"id": "other"}])
            async with running_gateway([p.url], [d.url], warmup=True) as running:
                assert "no model in common" in await ready(running)
                patched.undo()
                running.gateway.fleet.pool("decode")[0].attention.set()
                await until(lambda: handoffs(running) == [("ok", True)] * 2)
                assert not await ready(running)


async def test_a_backend_that_came_up_draining_is_tried_when_it_stops_draining() -> None:
    async with (
        simulators("prefill", "decode") as [p, d],
        running_gateway([p.url], [d.url], ready=False, warmup=True) as running,
    ):
        fleet = running.gateway.fleet
        [decode] = fleet.pool("decode")
        fleet.drain(decode)
        await until(lambda: all(backend.up for backend in fleet))
        assert not p.requests
        fleet.undrain(decode)
        await until(lambda: handoffs(running) == [("ok", True)] * 2)


async def test_a_defect_of_the_gateway_does_not_end_warm_ups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warmup, "_FIRST_WAIT", 0.05)
    hand_over, failed = trial.Trials._hand_over, []

    async def fail_once(trials: trial.Trials, *pair: Any) -> None:
        if not failed:
            failed.append(pair)
            raise RuntimeError("oops")
        await hand_over(trials, *pair)

    monkeypatch.setattr(trial.Trials, "_hand_over", fail_once)
    async with pools(1, 1, warmup=True) as (running, _, _):
        await until(lambda: handoffs(running) == [("ok", True)] * 2)
        assert not await ready(running)


async def test_without_warm_ups_backends_that_are_up_are_ready() -> None:
    async with unlike({"connector": "none"}, {}, warmup=False) as (running, _, _):
        assert not await ready(running)
        listed = (await running.http.get("/admin/backends")).json()["backends"]
        assert [one["handoff"]["state"] for one in listed] == ["never", "never"]


async def test_a_fleet_whose_every_pair_fails_makes_a_line_for_each_backend_at_most(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warmup, "_FIRST_WAIT", 0.02)
    monkeypatch.setattr(warmup, "_LONGEST_WAIT", 0.02)
    async with simulators(*["prefill"] * 3, *["decode"] * 3, connector="none") as engines:
        urls = [engine.url for engine in engines]
        with caplog.at_level(logging.WARNING, "pd_proxy.flow"):
            async with running_gateway(urls[:3], urls[3:], warmup=True) as running:
                await until(lambda: running.gateway.fleet.warmups["no_params"] >= 20)
    lines = [record for record in caplog.records if "hand-off does not work" in record.getMessage()]
    assert 1 <= len(lines) <= 6


async def test_stopping_ends_what_is_running() -> None:
    async with simulators("prefill", "decode") as [p, d]:
        p.faults.add("hang", leg="prefill")
        async with running_gateway([p.url], [d.url], warmup=True) as running:
            await until(lambda: warmed(p) == 1)
        assert running.idle()
        assert not [task for task in asyncio.all_tasks() if task.get_name() == "warm-up"]


@pytest.mark.parametrize(
    ("prefill", "decode", "model"),
    [
        (None, None, ""),
        ({"m": {}}, None, "m"),
        (None, {"m": {}}, "m"),
        ({"a": {}, "b": {}}, {"lora": {}, "b": {}}, "b"),
        ({"a": {}}, {"b": {}}, None),
        ({}, {"b": {}}, None),
    ],
)
def test_a_warm_up_asks_for_a_model_that_both_serve(
    prefill: dict[str, Any] | None, decode: dict[str, Any] | None, model: str | None
) -> None:
    p, d = Backend("http://p", "prefill"), Backend("http://d", "decode")
    p.models, d.models = prefill, decode
    assert model_of(p, d) == model
