"""The record and the log line of a request, for every kind of outcome, as one table."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from pd_proxy_simulator import Simulator

from tests.support import Running, chat, completion, pools, until

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
Fault = Callable[[list[Simulator], list[Simulator]], object]

P, D = "prefill", "decode"


@dataclass
class Outcome:
    """One kind of outcome.

    Attributes:
        name: the name of the test.
        expected: members of the log line; those in `places` name the pool whose URL they have.
        faults: the faults of the engines.
        leave: where the client leaves: a leg whose engine hangs, or `stream`.
    """

    name: str
    expected: dict[str, Any]
    body: dict[str, Any] = field(default_factory=dict)
    prefill: str = P
    decode: str = D
    faults: Fault = lambda p, d: None
    settings: dict[str, Any] = field(default_factory=dict)
    leave: str = ""
    size: tuple[int, int] = (1, 2)


def die(after: int, count: int = 1) -> Fault:
    def fault(p: list[Simulator], d: list[Simulator]) -> None:
        for engine in d:
            engine.faults.add("die_mid_stream", leg="decode", count=count, after_tokens=after)

    return fault


def first_refuses(p: list[Simulator], d: list[Simulator]) -> None:
    d[0].faults.add("reset", leg="decode")


def all_fail(p: list[Simulator], d: list[Simulator]) -> None:
    for engine in d:
        engine.faults.add("status", status=500, leg="decode")


def prefill_hangs(p: list[Simulator], d: list[Simulator]) -> None:
    p[0].faults.add("hang", leg="prefill")


def decode_hangs(p: list[Simulator], d: list[Simulator]) -> None:
    for engine in d:
        engine.faults.add("hang", leg="decode")


def stalls(p: list[Simulator], d: list[Simulator]) -> None:
    for engine in d:
        engine.faults.add("stall_mid_stream", leg="decode", after_tokens=3)


def no_handoff(p: list[Simulator], d: list[Simulator]) -> None:
    p[0].faults.add("drop_handoff_params")


OK = {"outcome": "ok", "status": 200, "error": None, "tokens": 20}
GONE = {"outcome": "client_gone", "error": None}
SLOW = {"first_token": "decode"}  # other tests are about the source of the first token
OUTCOMES = [
    Outcome("whole", {**OK, "stage": "decode", "stream": False, "tries": 1, "retries": 0, "resumes": 0}),
    Outcome("streamed", {**OK, "stage": "stream", "stream": True, "tries": 1}, {"stream": True}),
    Outcome("one token, whole", {**OK, "stage": "prefill", "tokens": 1, "tries": 1}, {"max_tokens": 1}, decode=""),
    Outcome(
        "one token, streamed",
        {**OK, "stage": "stream", "tokens": 1, "tries": 1, "stream": True},
        {"max_tokens": 1, "stream": True},
        decode="",
    ),
    Outcome(
        "resumed",
        {**OK, "stage": "stream", "tries": 2, "retries": 0, "resumes": 1},
        {"stream": True},
        faults=lambda p, d: d[0].faults.add("die_mid_stream", leg="decode", count=1, after_tokens=5),
        size=(1, 1),
    ),
    Outcome(
        "retried", {**OK, "stage": "decode", "retries": 1, "resumes": 0}, faults=lambda p, d: d[0].faults.add(
            "status", status=500, leg="decode", count=1
        ), size=(1, 1),
    ),
    Outcome("without a hand-off", {**OK, "stage": "decode", "fallback": "no_handoff_params"}, faults=no_handoff),
    Outcome(
        "without prefill",
        {**OK, "stage": "decode", "fallback": "no_prefill_backend", "prefill_seconds": None, "handoff_seconds": None},
        prefill="",
        size=(0, 1),
    ),
    Outcome(
        "failed",
        {"outcome": "backend_failed", "status": 500, "stage": "decode", "tokens": 0, "retries": 3, "tries": 4},
        faults=all_fail,
        size=(1, 1),
        settings={"fallback": "reject"},
    ),
    Outcome(
        "refused by the engine",
        {"outcome": "rejected", "status": 400, "stage": "prefill", "tokens": 0, "tries": 1},
        {"temperature": -1},
    ),
    Outcome(
        "refused in admission",
        {"outcome": "invalid_api_key", "status": 401, "stage": "admission", "tries": 0, "leg": None, "tokens": 0},
        prefill="",
        decode="",
        settings={"api_keys": ["a-key"]},
    ),
    Outcome("left in prefill", {**GONE, "stage": "prefill", "status": 0}, faults=prefill_hangs, leave="prefill"),
    Outcome("left in decode", {**GONE, "stage": "decode", "status": 0}, faults=decode_hangs, leave="decode"),
    Outcome(
        "left in the stream",
        {**GONE, "stage": "stream", "status": 200, "stream": True},
        {"stream": True},
        faults=stalls,
        leave="stream",
    ),
    Outcome(
        "broken for good",
        {"outcome": "stream_interrupted", "status": 200, "stage": "stream", "not_resumed": "off", "resumes": 0},
        {"stream": True},
        faults=die(5),
        settings={"resume": "off"},
    ),
]  # fmt: skip


async def ask_and_leave(running: Running, body: dict[str, Any], engines: list[Simulator], stage: str) -> None:
    async with httpx.AsyncClient(base_url=running.url, timeout=20, trust_env=False, verify=False) as http:
        if stage == "stream":
            async with http.stream("POST", COMPLETIONS, json=body) as answer:
                await anext(answer.aiter_bytes())
            return
        asking = asyncio.create_task(http.post(COMPLETIONS, json=body))
        await until(lambda: any(request.leg == stage for engine in engines for request in engine.requests))
        asking.cancel()
        await asyncio.wait((asking,))


@pytest.mark.parametrize("outcome", OUTCOMES, ids=lambda outcome: outcome.name)
async def test_every_member_of_the_log_line_is_correct(outcome: Outcome, caplog: pytest.LogCaptureFixture) -> None:
    settings = {**SLOW, **({"first_token": "auto"} if "one token" in outcome.name else {}), **outcome.settings}
    async with pools(*outcome.size, access_log=True, engine={"eos_rate": 0.0}, **settings) as (running, p, d):
        caplog.set_level(logging.INFO, "pd_proxy.request")
        outcome.faults(p, d)
        body = completion(**outcome.body)
        if outcome.leave:
            await ask_and_leave(running, body, [*p, *d], outcome.leave)
        else:
            await running.http.post(COMPLETIONS, json=body)
        await until(running.idle)
        [line] = [record.members for record in caplog.records if record.name == "pd_proxy.request"]  # type: ignore[attr-defined]
        assert {name: line.get(name) for name in outcome.expected} == outcome.expected
        for name, pool in (("prefill", p), ("decode", d)):
            wanted = getattr(outcome, name)
            assert (line.get(name) in [engine.url for engine in pool]) if wanted else name not in line, line
        assert line["route"] == "completions"
        assert line["address"].startswith("127.0.0.1:")
        if line["outcome"] == "ok":
            assert line["prompt_tokens"] > line["cached_tokens"] >= 0
            assert ("ttft" in line) == bool(outcome.body.get("stream"))
        elif line["outcome"] != "client_gone":
            assert line["error"]
        assert 0 <= line["seconds"] < 60
        if line.get("prefill_seconds") is not None:
            assert line["prefill"]


@pytest.mark.parametrize("first_token", ["auto", "decode"])
async def test_the_documented_ttft_counts_each_stream_once(first_token: str) -> None:
    async with pools(1, 1, first_token=first_token, engine={"eos_rate": 0.0}) as (running, _, _):
        for tokens in (1, 2, 20):
            for path, body in (
                (CHAT, chat(max_tokens=tokens, stream=True)),
                (COMPLETIONS, completion(max_tokens=tokens, stream=True)),
            ):
                assert (await running.http.post(path, json=body)).status_code == 200
        metrics = await running.metrics()
        counted = {
            name: value
            for name, value in metrics.items()
            if name.startswith("pd_proxy_time_to_first_token_seconds_count")
        }
        assert sum(value for name, value in counted.items() if 'pool="prefill"' not in name) == 6
