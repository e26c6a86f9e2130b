"""Backends that die, refuse, hang or send garbage: what the client gets, and that nothing is left behind."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.support import Running, chat, completion, pools, running_gateway, simulators, stuck_backend, text_of, until

pytestmark = pytest.mark.cross_product

CHAT = "/v1/chat/completions"

# Each is switched on for one backend of two; the other one is good.
BEFORE_THE_FIRST_TOKEN: list[tuple[str, dict[str, Any]]] = [
    ("reset", {}),
    ("status", {"status": 500}),
    ("status", {"status": 503}),
    ("status", {"status": 429}),
    ("garbage", {"form": "bytes"}),
    ("garbage", {"form": "json"}),
    ("garbage", {"form": "truncated"}),
    ("engine_death", {}),
    ("hang", {}),
    ("error_event_first", {}),
    ("die_mid_stream", {"after_tokens": 0}),
]


async def text_streamed(running: Running, request: dict[str, Any]) -> str:
    """The text of a streamed chat; fails unless it is whole and without an error event."""
    answer = await running.http.post(CHAT, json={**request, "stream": True})
    assert answer.status_code == 200, answer.text
    payloads = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    assert payloads[-1] == "[DONE]", payloads[-1]
    assert not any('"error"' in payload for payload in payloads), answer.text
    return "".join(json.loads(p)["choices"][0]["delta"].get("content") or "" for p in payloads[:-1])


async def what_one_engine_says(request: dict[str, Any]) -> str:
    async with simulators("mixed") as [single], running_gateway(mixed=[single.url]) as alone:
        return text_of((await alone.http.post(CHAT, json=request)).json())


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("leg", ["prefill", "decode"])
@pytest.mark.parametrize(("kind", "options"), BEFORE_THE_FIRST_TOKEN, ids=lambda v: v if isinstance(v, str) else None)
async def test_a_failure_before_the_first_token_is_tried_elsewhere(
    kind: str, options: dict[str, Any], leg: str, stream: bool
) -> None:
    expected = await what_one_engine_says(chat())
    timeouts = {"prefill": 0.6, "first_token": 0.6, "total": None}
    policy = {"prefill": "round_robin", "decode": "round_robin"}
    health = {"timeout": 1.0} if kind == "hang" else {}
    async with pools(2, 2, timeouts=timeouts, policy=policy, first_token="decode", health=health) as (
        running,
        prefill,
        decode,
    ):
        bad = (prefill if leg == "prefill" else decode)[0]
        bad.faults.add(kind, leg=leg, **options)  # type: ignore[arg-type]
        if kind == "hang" and leg == "decode" and not stream:
            # An answer that is not streamed sends nothing before its end, so only health checks detect a hung engine.
            bad.faults.add("hang", leg="health")
        for _ in range(4):
            if stream:
                assert await text_streamed(running, chat()) == expected
            else:
                answer = await running.http.post(CHAT, json=chat())
                assert answer.status_code == 200, answer.text
                assert text_of(answer.json()) == expected
        await until(running.idle)
        if kind != "die_mid_stream" or stream:
            retries = {k: v for k, v in (await running.metrics()).items() if k.startswith("pd_proxy_retries_total")}
            hit = bad.faults.find(kind)  # type: ignore[arg-type]
            assert hit is not None and hit.hits > 0
            assert any(f'leg="{leg}"' in k for k in retries), retries


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.slow
async def test_no_request_fails_with_one_of_two_dead_in_each_pool(stream: bool) -> None:
    async with pools(2, 2) as (running, prefill, decode):
        expected = text_of((await running.http.post(CHAT, json=chat())).json())
        prefill[0].kill()
        decode[0].kill()
        gate = asyncio.Semaphore(16)

        async def one() -> str:
            async with gate:
                if stream:
                    return await text_streamed(running, chat())
                answer = await running.http.post(CHAT, json=chat())
                assert answer.status_code == 200, answer.text
                return text_of(answer.json())

        texts = await asyncio.gather(*(one() for _ in range(64)))
        assert texts == [expected] * 64
        assert running.idle()


async def test_a_backend_that_comes_back_gets_requests_again() -> None:
    async with pools(1, 2) as (running, _, decode):
        decode[0].kill()
        for _ in range(6):
            assert (await running.http.post(CHAT, json=chat())).status_code == 200
        [dead] = [b for b in running.gateway.fleet.pool("decode") if b.url == decode[0].url]
        await until(lambda: not dead.up)
        await decode[0].restart()
        await until(lambda: dead.up)
        before = decode[0].served
        await asyncio.gather(*(running.http.post(CHAT, json=chat()) for _ in range(8)))
        assert decode[0].served > before


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_prefill_engine_killed_between_the_legs_costs_the_client_nothing(stream: bool) -> None:
    expected = await what_one_engine_says(chat())
    async with pools(1, 1) as (running, [p], [d]):
        d.faults.add("delay_first_byte", leg="decode", delay_s=0.2, count=1)

        async def kill_when_answered() -> None:
            await p.wait_for(lambda: p.engine.stranded_blocks > 0)
            p.kill()

        killing = asyncio.create_task(kill_when_answered())
        if stream:
            assert await text_streamed(running, chat()) == expected
        else:
            answer = await running.http.post(CHAT, json=chat())
            assert (answer.status_code, text_of(answer.json())) == (200, expected)
        await killing
        await until(running.idle)


async def test_without_prefill_decode_prefills_for_itself_and_the_answer_says_so() -> None:
    async with pools(1, 1) as (running, [p], _):
        expected = text_of((await running.http.post(CHAT, json=chat())).json())
        p.kill()
        answer = await running.http.post(CHAT, json=chat())
        assert text_of(answer.json()) == expected
        assert answer.headers["x-pd-proxy-fallback"] == "no_prefill_backend"
        assert (await running.metrics())['pd_proxy_fallbacks_total{reason="no_prefill_backend"}'] == 1


async def test_without_prefill_and_with_fallback_reject_the_client_gets_an_error() -> None:
    async with pools(1, 1, fallback="reject") as (running, [p], _):
        p.kill()
        answer = await running.http.post(CHAT, json=chat())
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "no_backend"
        assert answer.headers["retry-after"] == "1"
        listed = await running.http.post("/v1/completions", json=completion(["a", "b"]))
        assert (listed.status_code, listed.json()["error"]["param"]) == (400, "prompt_list")


async def test_prefill_without_hand_off_parameters_is_a_fallback_or_an_error() -> None:
    async with pools(1, 1) as (running, [p], _):
        expected = text_of((await running.http.post(CHAT, json=chat())).json())
        p.faults.add("drop_handoff_params")
        answer = await running.http.post(CHAT, json=chat())
        assert text_of(answer.json()) == expected
        assert answer.headers["x-pd-proxy-fallback"] == "no_handoff_params"
    async with pools(1, 1, fallback="reject") as (running, [p], _):
        p.faults.add("drop_handoff_params")
        answer = await running.http.post(CHAT, json=chat())
        assert answer.status_code == 502 and answer.json()["error"]["code"] == "handoff_invalid"
        assert running.idle()


async def test_an_engines_own_400_is_given_on_and_not_retried() -> None:
    async with pools(2, 2) as (running, prefill, decode):
        answer = await running.http.post(CHAT, json={"model": "sim", "messages": "not a list"})
        assert answer.status_code == 400
        assert answer.json()["error"]["type"] in ("BadRequestError", "Bad Request")
        asked = [r for e in (*prefill, *decode) for r in e.requests if r.path == CHAT]
        assert len(asked) == 1
        assert all(b.up for b in running.gateway.fleet)


async def test_a_stream_that_dies_ends_with_an_error_event_and_no_half_event() -> None:
    async with pools(1, 1, engine={"step_time": 0.005}, resume="off") as (running, _, [d]):
        d.faults.add("die_mid_stream", after_tokens=5, leg="decode")
        answer = await running.http.post(CHAT, json=chat(stream=True))
        assert answer.status_code == 200
        blocks = answer.text.split("\n\n")
        assert blocks[-1] == ""
        payloads = [json.loads(b.removeprefix("data: ")) for b in blocks[:-1]]
        assert payloads[-1]["error"]["code"] == "stream_interrupted"
        assert d.url not in answer.text
        assert sum(1 for p in payloads[:-1] if p["choices"][0]["delta"].get("content") is not None) >= 5
        await until(running.idle)
        metrics = await running.metrics()
        assert metrics['pd_proxy_requests_total{endpoint="chat",model="sim",outcome="stream_interrupted"}'] == 1


async def test_a_stream_that_falls_silent_is_ended_at_the_idle_timeout() -> None:
    async with pools(1, 1, timeouts={"idle": 0.2}, resume="off") as (running, _, [d]):
        d.faults.add("stall_mid_stream", after_tokens=3, leg="decode")
        answer = await running.http.post(CHAT, json=chat(stream=True))
        assert json.loads(answer.text.strip().split("\n\n")[-1][6:])["error"]["code"] == "stream_interrupted"
        await until(running.idle)
        await until(lambda: d.engine.running == 0)


async def test_timeouts_are_504_with_their_cause() -> None:
    once = {"attempts": 1}
    async with pools(1, 1, timeouts={"first_token": 0.1}, retries=once, first_token="decode") as (running, _, [d]):
        d.faults.add("hang", leg="decode")
        answer = await running.http.post(CHAT, json=chat(stream=True))
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "backend_timeout")
    async with pools(1, 1, timeouts={"prefill": 0.1}, retries={"attempts": 1}) as (running, [p], _):
        p.faults.add("hang", leg="prefill")
        answer = await running.http.post(CHAT, json=chat())
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "backend_timeout")
    async with pools(1, 1, timeouts={"total": 0.1}) as (running, [p], _):
        p.faults.add("hang", leg="prefill")
        answer = await running.http.post(CHAT, json=chat())
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "total_timeout")
        await until(running.idle)


async def test_a_busy_fleet_answers_with_the_engines_status_and_a_time_to_come_back() -> None:
    async with pools(1, 1) as (running, _, [d]):
        d.faults.add("status", status=429, leg="decode", retry_after=7)
        answer = await running.http.post(CHAT, json=chat())
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "7")
        assert d.faults.find("status").hits == 1, "asking the one busy engine again helps nobody"  # type: ignore[union-attr]


async def test_a_hand_off_is_never_sent_late() -> None:
    timeouts = {"handoff": 0.2, "connect": 20}
    with stuck_backend() as url:
        async with (
            simulators("prefill") as [p],
            running_gateway([p.url], [url], ready=False, timeouts=timeouts, retries={"attempts": 1}) as running,
        ):
            fleet = running.gateway.fleet
            await until(lambda: fleet.pool("prefill")[0].up)
            fleet.bring_in(fleet.pool("decode")[0])
            async with asyncio.timeout(5):  # far below the connect timeout: it is the hand-off's age that ends it
                answer = await running.http.post(CHAT, json=chat())
            assert answer.status_code in (502, 504)
            await until(running.idle)


async def test_a_decode_backend_that_cannot_be_reached_passes_its_hand_off_on() -> None:
    async with pools(1, 2, health={"interval": 30}) as (running, [p], decode):
        expected = text_of((await running.http.post(CHAT, json=chat())).json())
        decode[0].kill()
        before = len([r for r in p.requests if r.path == CHAT])
        for _ in range(4):
            assert text_of((await running.http.post(CHAT, json=chat())).json()) == expected
        assert len([r for r in p.requests if r.path == CHAT]) == before + 4, "prefill is not done twice"
