"""A stream whose backend dies is continued elsewhere, and the client gets the same answer."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pd_proxy_simulator import Simulator

from tests.support import PROMPT, Running, chat, completion, pools, simulators, until
from tests.support import running_gateway as gateway

pytestmark = pytest.mark.cross_product

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
USAGE = {"include_usage": True}
EMOJI = "Repeat: 🦀 héllo ☃ 日本語 🦀🦀 naïve"


class Answer:
    """A streamed answer, taken apart."""

    def __init__(self, text: str) -> None:
        assert text.endswith("\n\n"), "an event was cut"
        payloads = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
        self.done = payloads.count("[DONE]")
        self.events: list[dict[str, Any]] = [json.loads(p) for p in payloads if p != "[DONE]"]
        self.raw = text
        choices = [choice for event in self.events for choice in event.get("choices", ())]
        self.text = "".join(c.get("text") or c.get("delta", {}).get("content") or "" for c in choices)
        self.finish = [c["finish_reason"] for c in choices if c.get("finish_reason")]
        self.roles = sum("role" in c.get("delta", {}) for c in choices)
        self.ids = {event["id"] for event in self.events if "id" in event}
        self.created = {event["created"] for event in self.events if "created" in event}
        self.usage = next((event["usage"] for event in self.events if event.get("usage")), None)
        self.error = next((event["error"] for event in self.events if "error" in event), None)


def body_of(path: str, prompt: str = PROMPT, **more: Any) -> dict[str, Any]:
    make = chat if path == CHAT else completion
    return make(prompt, **{"stream": True, "stream_options": USAGE, "max_tokens": 30, **more})


async def ask(running: Running, path: str, body: dict[str, Any]) -> Answer:
    answer = await running.http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return Answer(answer.text)


def same(broken: Answer, whole: Answer) -> None:
    """The client cannot tell a resumed answer from an undisturbed one."""
    assert broken.error is None
    assert broken.text == whole.text
    assert broken.finish == whole.finish
    assert broken.roles == whole.roles
    assert (len(broken.ids), len(broken.created), broken.done) == (1, 1, 1)
    assert "token_ids" not in broken.raw
    assert broken.usage is not None and whole.usage is not None
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert broken.usage[name] == whole.usage[name]


async def settled(running: Running, engines: list[Simulator]) -> None:
    await until(running.idle)
    for engine in engines:
        await until(lambda engine=engine: not engine.engine.running and not engine.engine.stranded_blocks)  # type: ignore[misc]


@pytest.mark.parametrize("first_token", ["auto", "decode"])
@pytest.mark.parametrize("after", [1, 2, 7, 28])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("prompt", [PROMPT, EMOJI], ids=["words", "characters"])
async def test_a_stream_that_dies_is_continued_exactly(path: str, after: int, prompt: str, first_token: str) -> None:
    async with pools(2, 2, first_token=first_token) as (running, p, d):
        body = body_of(path, prompt)
        whole = await ask(running, path, body)
        for engine in d:
            engine.faults.add("die_mid_stream", leg="decode", count=1, after_tokens=after)
        same(await ask(running, path, body), whole)
        await settled(running, [*p, *d])
        metrics = await running.metrics()
        if 'pd_proxy_resumes_total{reason="cut"}' in metrics:
            assert metrics["pd_proxy_resume_gap_seconds_count"] >= 1
        else:  # its first token was half a character: the client had nothing yet, and all was begun anew
            assert (prompt, after) == (EMOJI, 1)
            assert sum(value for name, value in metrics.items() if name.startswith("pd_proxy_retries_total")) >= 1
        assert metrics[f'pd_proxy_requests_total{{endpoint="{path.split("/")[2]}",model="sim",outcome="ok"}}'] == 2


@pytest.mark.parametrize("fault", ["stall_mid_stream", "recomputed"])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_so_is_one_that_hangs_or_is_preempted(path: str, fault: str) -> None:
    async with pools(1, 2, timeouts={"idle": 0.3}) as (running, p, d):
        body = body_of(path)
        whole = await ask(running, path, body)
        for engine in d:
            engine.faults.add(fault, leg="decode", count=1, after_tokens=5)
        same(await ask(running, path, body), whole)
        await settled(running, [*p, *d])


async def test_a_killed_engine_takes_no_stream_with_it() -> None:
    async with pools(2, 2, engine={"step_time": 0.01}) as (running, p, d):
        body = body_of(CHAT, max_tokens=60)
        whole = await ask(running, CHAT, body)
        async with running.http.stream("POST", CHAT, json=body) as answer:
            text, killed = "", False
            async for part in answer.aiter_text():
                text += part
                if not killed and text.count("\n\n") > 10:
                    next(e for e in d if e.engine.running).kill()
                    killed = True
        same(Answer(text), whole)
        await settled(running, p)


async def test_prefill_is_done_where_its_prefix_is_cached() -> None:
    async with pools(3, 2) as (running, p, d):
        for engine in d:
            engine.faults.add("die_mid_stream", leg="decode", count=1, after_tokens=5)
        await ask(running, CHAT, body_of(CHAT))
        assert sorted(len([r for r in engine.requests if r.path == CHAT]) for engine in p)[:2] == [0, 0]


async def test_the_client_that_asked_for_token_ids_gets_each_once() -> None:
    async with pools(1, 2) as (running, _, d):
        for path in (CHAT, COMPLETIONS):
            body = body_of(path, return_token_ids=True)
            whole = await ask(running, path, body)
            for engine in d:
                engine.faults.add("die_mid_stream", leg="decode", count=1, after_tokens=6)
            broken = await ask(running, path, body)

            def ids(answer: Answer) -> list[int]:
                choices = [c for event in answer.events for c in event.get("choices", ())]
                return [i for c in choices for i in c.get("token_ids") or ()]

            assert ids(broken) == ids(whole)
            assert broken.text == whole.text
            assert broken.raw.count('"prompt_token_ids":[') == 1


@pytest.mark.parametrize(
    "more",
    [
        {"max_tokens": None, "max_completion_tokens": 25},
        {"min_tokens": 20, "max_tokens": 25},
        {"logprobs": True, "top_logprobs": 2},
        {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
        {"repetition_penalty": 1.1},
    ],
    ids=["max_completion_tokens", "min_tokens", "logprobs", "running usage", "repetition_penalty"],
)
async def test_other_members_of_the_request_hold_for_the_whole_answer(more: dict[str, Any]) -> None:
    async with pools(1, 2) as (running, _, d):
        body = {key: value for key, value in body_of(CHAT, **more).items() if value is not None}
        whole = await ask(running, CHAT, body)
        for engine in d:
            engine.faults.add("die_mid_stream", leg="decode", count=1, after_tokens=6)
        broken = await ask(running, CHAT, body)
        assert (broken.text, broken.finish, broken.error) == (whole.text, whole.finish, None)
        usages = [[e["usage"]["completion_tokens"] for e in a.events if e.get("usage")] for a in (broken, whole)]
        assert usages[0] == usages[1]


@pytest.mark.parametrize(
    ("path", "more", "why"),
    [
        (CHAT, {"presence_penalty": 0.5}, "penalties"),
        (CHAT, {"stop": ["zebra"]}, "stop"),
        (CHAT, {"seed": 3, "temperature": 1}, "seed"),
        (CHAT, {"response_format": {"type": "json_object"}}, "structured_output"),
        (CHAT, {"n": 2, "temperature": 1}, "n"),
        (COMPLETIONS, {"logprobs": 1}, "logprobs"),
    ],
)
async def test_a_stream_that_cannot_be_continued_exactly_ends_with_an_error_that_says_why(
    path: str, more: dict[str, Any], why: str
) -> None:
    async with pools(1, 2) as (running, p, d):
        for engine in d:
            engine.faults.add("die_mid_stream", count=1, after_tokens=4)
        answer = await ask(running, path, body_of(path, **more))
        assert answer.error is not None
        assert answer.error["code"] == "stream_interrupted"
        assert f"({why})" in answer.error["message"]
        assert "127.0.0.1" not in answer.raw
        assert answer.done == 0
        metrics = await running.metrics()
        assert metrics[f'pd_proxy_resumes_refused_total{{reason="{why}"}}'] == 1
        await settled(running, [*p, *d])


async def test_best_effort_continues_inexact_streams() -> None:
    async with pools(1, 2, resume="best_effort") as (running, _, d):
        body = body_of(CHAT, stop=["zebra"])
        whole = await ask(running, CHAT, body)
        for engine in d:
            engine.faults.add("die_mid_stream", leg="decode", count=1, after_tokens=4)
        broken = await ask(running, CHAT, body)
        assert broken.error is None and broken.done == 1
        assert broken.finish == whole.finish


async def test_resuming_can_be_turned_off_and_then_no_engine_is_asked_for_ids() -> None:
    async with pools(1, 2, resume="off") as (running, _, d):
        for engine in d:
            engine.faults.add("die_mid_stream", leg="decode", count=1, after_tokens=4)
        answer = await ask(running, CHAT, body_of(CHAT))
        assert answer.error is not None and "(off)" in answer.error["message"]
        assert not any(b"return_token_ids" in r.body for e in d for r in e.requests if r.path == CHAT)


async def test_a_stream_is_resumed_a_bounded_number_of_times() -> None:
    async with pools(1, 2, retries={"resumes": 2}) as (running, _, d):
        for engine in d:
            engine.faults.add("die_mid_stream", leg="decode", after_tokens=3)
        answer = await ask(running, CHAT, body_of(CHAT))
        assert answer.error is not None and "(too_often)" in answer.error["message"]
        assert (await running.metrics())['pd_proxy_resumes_total{reason="cut"}'] == 2


async def test_a_longer_transcript_than_is_kept_is_not_resumed() -> None:
    async with pools(1, 2, limits={"transcript": 1024}) as (running, _, d):
        for engine in d:
            engine.faults.add("die_mid_stream", leg="decode", count=1, after_tokens=3)
        answer = await ask(running, CHAT, body_of(CHAT, PROMPT * 40))
        assert answer.error is not None and "(too_long)" in answer.error["message"]


async def test_a_stream_waits_a_little_for_a_backend_to_come_back() -> None:
    async with simulators("mixed", step_time=0.01) as [engine], gateway(mixed=[engine.url]) as running:
        body = body_of(CHAT, max_tokens=60)
        whole = await ask(running, CHAT, body)
        async with running.http.stream("POST", CHAT, json=body) as answer:
            text, killed = "", False
            async for part in answer.aiter_text():
                text += part
                if not killed and text.count("\n\n") > 10:
                    engine.kill()
                    await engine.restart()
                    killed = True
        same(Answer(text), whole)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_a_hand_off_that_is_not_used_is_released(path: str) -> None:
    async with pools(1, 1, first_token="decode") as (running, [p], [d]):
        d.faults.add("status", leg="decode", status=400, count=1)
        answer = await running.http.post(path, json=body_of(path))
        assert answer.status_code == 400
        await until(lambda: p.engine.stranded_blocks == 0)
        await until(running.idle)
        assert (await running.metrics())['pd_proxy_handoffs_abandoned_total{outcome="released"}'] == 1
        assert p.engine.expired == 0


async def test_a_release_that_no_engine_has_read_is_sent_again() -> None:
    """Decode is busy for a moment longer than the request waits: the blocks do not wait for their lease to end."""
    async with pools(1, 1, retries={"attempts": 1}, first_token="decode") as (running, [p], [d]):
        d.faults.add("status", leg="decode", status=429, count=3)
        answer = await running.http.post(CHAT, json=body_of(CHAT))
        assert answer.status_code == 429
        await until(lambda: not running.gateway.fleet.handoffs_pending)
        assert (await running.metrics())['pd_proxy_handoffs_abandoned_total{outcome="released"}'] == 1
        await until(lambda: p.engine.stranded_blocks == 0)
        assert p.engine.expired == 0


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_a_usage_that_the_engine_left_out_is_counted_here(path: str) -> None:
    async with pools(1, 1) as (running, _, [d]):
        body = body_of(path, max_tokens=9, stream_options={"include_usage": True})
        whole = await ask(running, path, body)
        d.faults.add("die_mid_stream", leg="decode", count=1, after_tokens=9, ending="done")
        answer = await ask(running, path, body)
        assert (await running.metrics()).get("pd_proxy_resumes_total", 0) == 0
        assert answer.usage is not None and whole.usage is not None
        counts = ("prompt_tokens", "completion_tokens", "total_tokens")
        assert [answer.usage[name] for name in counts] == [whole.usage[name] for name in counts]
