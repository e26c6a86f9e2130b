"""A client gets its first token as soon as prefill has sampled it, and the answer does not show it."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import httpx
import pytest
from pd_proxy.flow.attempt import Attempt
from pd_proxy.flow.first_token import FirstTokens
from pd_proxy_simulator import Simulator

from tests.flow.helpers import at_rest
from tests.support import PROMPT, Running, chat, completion, pools, simulators, until
from tests.support import running_gateway as gateway

pytestmark = pytest.mark.cross_product

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
PATHS = [CHAT, COMPLETIONS]
USAGE = {"include_usage": True}
SHAPES: list[dict[str, Any]] = [{}, {"stream": True}, {"stream": True, "stream_options": USAGE}]
TOOLS = [{"type": "function", "function": {"name": "measure", "parameters": {"type": "object", "properties": {}}}}]
IDS = ["whole", "streamed", "with usage"]


def body_of(path: str, prompt: str = PROMPT, **more: Any) -> dict[str, Any]:
    return (chat if path == CHAT else completion)(prompt, **more)


def plain(answer: str) -> Any:
    """An answer, event by event, without what differs from request to request."""
    answer = re.sub(r'"(id|created)":("[^"]*"|\d+)', r'"\1":0', answer)
    answer = re.sub(r'"cached_tokens":\d+', '"cached_tokens":0', answer)  # the second to ask finds it in the cache
    events = [event.removeprefix("data: ") for event in answer.split("\n\n") if event]
    shown = [json.loads(event) if event != "[DONE]" else event for event in events]
    for event in shown:
        if isinstance(event, dict):
            usage = event.pop("usage", None) or {}
            event["usage"] = {name: value for name, value in usage.items() if value is not None}
    return shown


async def says(running: Running, path: str, body: dict[str, Any]) -> Any:
    answer = await running.http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    if body.get("stream"):
        ids = {json.loads(e)["id"] for e in re.findall(r"^data: (\{.*)$", answer.text, re.MULTILINE)}
        created = {json.loads(e)["created"] for e in re.findall(r"^data: (\{.*)$", answer.text, re.MULTILINE)}
        assert (len(ids), len(created)) == (1, 1)
    return plain(answer.text)


async def counted(running: Running) -> dict[tuple[str, str], float]:
    """(source, reason) -> requests."""
    found = {}
    for name, value in (await running.metrics()).items():
        if match := re.fullmatch(r'pd_proxy_first_tokens_total\{reason="(\w*)",source="(\w+)"\}', name):
            found[match[2], match[1]] = value
    return found


def legs(*engines: Simulator) -> list[str]:
    return [request.leg for engine in engines for request in engine.requests]


# Exact


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"return_token_ids": True},
        {"logprobs": True, "top_logprobs": 2},
        {"min_tokens": 6},
        {"max_tokens": 2},
        {"stop_token_ids": [3]},
        {"repetition_penalty": 1.1},
        {"seed": 4},  # at temperature 0
        {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
        {"tools": TOOLS, "tool_choice": "none"},
        {"response_format": {"type": "text"}},
        {"stop": [], "presence_penalty": 0, "n": 1},
    ],
    ids=lambda more: ",".join(more) or "plain",
)
async def test_it_is_the_answer_that_decode_would_have_given(
    path: str, shape: dict[str, Any], more: dict[str, Any]
) -> None:
    if path == COMPLETIONS and "logprobs" in more:
        more = {"logprobs": 2}
    if "stream_options" in more and not shape:
        return
    body = body_of(path, **{**shape, **more})
    async with simulators("prefill", "decode") as [p, d]:
        async with gateway([p.url], [d.url], first_token="decode") as running:
            expected = await says(running, path, body)
        d.engine.pool.forget()
        async with gateway([p.url], [d.url]) as running:
            assert await says(running, path, body) == expected
            kept = path == COMPLETIONS and "logprobs" in more and shape
            assert await counted(running) == {("decode", "logprobs") if kept else ("prefill", "exact"): 1}
            await at_rest(running, p, d)
        *_, prefill = [r for r in p.requests if r.leg == "prefill"]
        *_, decode = [r for r in d.requests if r.leg == "decode"]
        assert prefill.output_tokens == 1
        limit = body["max_tokens"]
        assert decode.body["max_tokens"] == (limit if kept else limit - 1)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.slow
async def test_every_offset_in_a_block_is_the_same_or_left_to_decode(path: str, stream: bool) -> None:
    """The one at which decode would need a block more than there is kills a simulator as it kills vLLM."""
    async with simulators("prefill", "decode") as [p, d]:
        async with gateway([p.url], [d.url], first_token="decode") as before, gateway([p.url], [d.url]) as running:
            for words in range(34):
                body = body_of(path, "word " * words + "end", stream=stream, max_tokens=20, ignore_eos=True)
                expected = await says(before, path, body)
                d.engine.pool.forget()
                assert await says(running, path, body) == expected, words
                await at_rest(running, p, d)
            seen = await counted(running)
        assert seen["decode", "full_blocks"] == 2 or seen["decode", "full_blocks"] == 3
        assert seen["prefill", "exact"] + sum(v for (source, _), v in seen.items() if source == "decode") == 34
        assert seen["prefill", "exact"] >= 28


async def test_a_decode_that_goes_on_behind_full_blocks_dies() -> None:
    """By hand: the simulator does what vLLM does."""
    async with simulators("prefill", "decode") as [p, d]:
        ask = {"do_remote_decode": True, "do_remote_prefill": False}
        leg = completion(list(range(40, 72)), max_tokens=1, return_token_ids=True)
        async with httpx.AsyncClient(trust_env=False, verify=False) as http:
            answer = (await http.post(p.url + COMPLETIONS, json={**leg, "kv_transfer_params": ask})).json()
            prompt = leg["prompt"] + answer["choices"][0]["token_ids"]
            body = completion(prompt, max_tokens=3, kv_transfer_params=answer["kv_transfer_params"])
            assert (await http.post(d.url + COMPLETIONS, json=body)).status_code == 500
        assert d.engine.dead is not None and "num_decode_blocks" in d.engine.dead


async def test_a_sampled_answer_is_drawn_from_the_same_distribution() -> None:
    """Without a seed nobody could tell the draws apart."""
    async with pools() as (running, [p], [d]):
        await says(running, CHAT, chat(temperature=0.8, stream=True))
        assert await counted(running) == {("prefill", "exact"): 1}
        await at_rest(running, p, d)


async def test_the_client_has_its_first_token_while_decode_waits() -> None:
    async with pools() as (running, [p], [d]):
        d.faults.add("delay_first_byte", leg="decode", delay_s=0.4)
        loop = asyncio.get_running_loop()
        began = loop.time()
        times: list[float] = []
        async with running.http.stream("POST", CHAT, json=chat(stream=True)) as answer:
            async for part in answer.aiter_text():
                times += [loop.time() - began] * part.count('"content":" ')
        assert times[0] < 0.4 <= times[1]
        await at_rest(running, p, d)
        metrics = await running.metrics()
        where = f'{{backend="{d.url}",pool="decode"}}'
        assert metrics[f"pd_proxy_handoff_gap_seconds_sum{where}"] >= 0.39
        assert metrics[f"pd_proxy_time_to_first_token_seconds_sum{where}"] < 0.4
        # What decode's own tokens took: the gap is not one of theirs.
        assert metrics[f"pd_proxy_inter_token_latency_seconds_count{where}"] == 18
        assert metrics[f"pd_proxy_time_per_output_token_seconds_sum{where}"] < 0.02


# The whole answer


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
@pytest.mark.parametrize("path", PATHS)
async def test_where_prefills_token_ends_the_answer_there_is_no_decode_leg(path: str, shape: dict[str, Any]) -> None:
    async with simulators("prefill", "decode") as [p, d]:
        async with gateway([p.url], [d.url], first_token="decode") as running:
            body = body_of(path, **{**shape, "return_token_ids": True})
            answer = await says(running, path, body)
            choice = next(c for e in answer if e != "[DONE]" for c in e["choices"] if c.get("token_ids"))
            body = body_of(path, **shape, stop_token_ids=choice["token_ids"][:1])
            expected = await says(running, path, body)
        d.requests.clear()
        async with gateway([p.url], [d.url]) as running:
            assert await says(running, path, body) == expected
            assert await counted(running) == {("prefill", "whole"): 1}
            await at_rest(running, p, d)  # its blocks were freed, by a leg that is refused
            assert [r.status for r in d.requests] == [400]
            tokens = await running.metrics()
            assert tokens['pd_proxy_tokens_total{kind="completion",model="sim"}'] == 1


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
@pytest.mark.parametrize(
    ("path", "more"),
    [
        (CHAT, {}),
        (CHAT, {"max_completion_tokens": 1, "max_tokens": 9}),
        (CHAT, {"logprobs": True, "top_logprobs": 3}),
        (COMPLETIONS, {}),
        (COMPLETIONS, {"logprobs": 1, "echo": True}),
        (COMPLETIONS, {"prompt": ["one", "two"]}),
    ],
    ids=["chat", "max_completion_tokens", "chat logprobs", "completions", "scoring", "several prompts"],
)
async def test_a_request_for_one_token_asks_for_no_hand_off(
    path: str, more: dict[str, Any], shape: dict[str, Any]
) -> None:
    body = {**body_of(path, max_tokens=1), **shape, **more}
    async with pools(first_token="decode") as (running, _, _):
        expected = await says(running, path, body)
    async with pools() as (running, [p], [d]):
        assert await says(running, path, body) == expected
        await at_rest(running, p, d)
        assert (legs(p), legs(d), p.engine.handoffs.pinned_total) == (["local"], [], 0)
        assert (await running.http.post(path, json=body)).headers.get("x-pd-proxy-fallback") is None


async def test_one_token_is_asked_for_elsewhere_when_prefill_fails() -> None:
    async with pools(2, 1) as (running, p, [d]):
        p[0].faults.add("status", status=500)
        for _ in range(4):
            await says(running, CHAT, chat(max_tokens=1))
        p[1].faults.add("status", status=500)
        await says(running, CHAT, chat(max_tokens=1))
        assert "local" in legs(d)
        await until(running.idle)


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("first_token", ["auto", "prefill"])
async def test_one_token_stays_one_when_it_is_split_after_all(
    path: str, shape: dict[str, Any], first_token: str
) -> None:
    body = {**body_of(path, max_tokens=1), **shape}
    async with pools(first_token="decode") as (running, _, _):
        expected = await says(running, path, body)
    async with pools(first_token=first_token) as (running, [p], [d]):
        p.faults.add("reset", count=1)
        assert await says(running, path, body) == expected
        assert (legs(p), legs(d)) == (["local", "prefill"], ["decode"])
        await at_rest(running, p, d)


# Left to decode


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("path", "more", "why"),
    [
        (CHAT, {"presence_penalty": 0.5}, "penalties"),
        (COMPLETIONS, {"frequency_penalty": 0.5}, "penalties"),
        (CHAT, {"stop": ["zebra"]}, "stop"),
        (CHAT, {"seed": 3, "temperature": 1}, "seed"),
        (CHAT, {"response_format": {"type": "json_object"}}, "structured_output"),
        (COMPLETIONS, {"structured_outputs": {"choice": ["yes", "no"]}}, "structured_output"),
        (CHAT, {"tools": TOOLS}, "tool_calls"),
        (CHAT, {"tools": TOOLS, "tool_choice": "required"}, "structured_output"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]},
            "media",
        ),
        (CHAT, {"bad_words": ["zebra"]}, "bad_words"),
        (CHAT, {"repetition_detection": {"max_pattern_size": 3}}, "repetition_detection"),
        (COMPLETIONS, {"logits_processors": ["x"]}, "logits_processors"),
        (CHAT, {"min_tokens": 20, "max_tokens": 20, "stream_options": {"include_usage": True, "x": 1}}, "options"),
        (CHAT, {"max_tokens": 32750}, "context"),
    ],
    ids=lambda value: value if isinstance(value, str) and not value.startswith("/") else "",
)
async def test_a_first_token_that_is_not_surely_exact_is_decodes(
    path: str, more: dict[str, Any], why: str, stream: bool
) -> None:
    if "stream_options" in more and not stream:
        return
    body = {**body_of(path, stream=stream), **more}
    async with pools(first_token="decode") as (running, _, _):
        expected = await running.http.post(path, json=body)
    async with pools() as (running, [p], [d]):
        answer = await running.http.post(path, json=body)
        assert answer.status_code == expected.status_code
        if answer.status_code == 200 and why != "tool_calls" and "tools" not in more:
            assert plain(answer.text) == plain(expected.text)
            assert await counted(running) == {("decode", why): 1}
        await until(running.idle)
        assert d.engine.dead is None and p.engine.dead is None
        if why not in ("context",):
            assert all(r.body.get("ignore_eos") is True for r in p.requests if r.leg == "prefill")


@pytest.mark.parametrize("more", [{"n": 2, "temperature": 1}, {"echo": True}], ids=str)
async def test_a_request_that_one_backend_serves_asks_for_no_first_token(more: dict[str, Any]) -> None:
    async with pools() as (running, _, _):
        assert (await running.http.post(COMPLETIONS, json=completion(**more))).status_code == 200
        assert await counted(running) == {}


@pytest.mark.parametrize("stream", [pytest.param(False, marks=pytest.mark.slow), True], ids=["whole", "streamed"])
@pytest.mark.slow
async def test_half_a_character_is_left_to_decode(stream: bool) -> None:
    async with simulators("prefill", "decode") as [p, d]:
        async with gateway([p.url], [d.url], first_token="decode") as before, gateway([p.url], [d.url]) as running:
            for number in range(60):
                body = completion(f"Repeat: 🦀 héllo ☃ 日本語 {number}", stream=stream, max_tokens=8)
                expected = await says(before, COMPLETIONS, body)
                d.engine.pool.forget()
                assert await says(running, COMPLETIONS, body) == expected
            seen = await counted(running)
        assert seen.get(("decode", "no_text"), 0) > 0
        assert seen["prefill", "exact"] >= 10


async def test_a_setting_allows_another_sample_but_no_wrong_text() -> None:
    async with pools(first_token="prefill") as (running, [p], [d]):
        await says(running, CHAT, chat(seed=3, temperature=1, stream=True))
        await says(running, CHAT, chat(presence_penalty=1))
        await says(running, CHAT, chat(response_format={"type": "json_object"}))
        await says(running, CHAT, chat(stop=["zebra"]))
        assert await counted(running) == {
            ("prefill", "inexact"): 2,
            ("decode", "structured_output"): 1,
            ("decode", "stop"): 1,
        }
        await at_rest(running, p, d)


async def test_a_setting_leaves_it_to_decode_always() -> None:
    async with pools(first_token="decode") as (running, [p], [d]):
        await says(running, CHAT, chat(stream=True))
        await says(running, CHAT, chat(max_tokens=1))
        assert (legs(p), legs(d)) == (["prefill"] * 2, ["decode"] * 2)
        assert await counted(running) == {}
        assert all(backend.identity is None for backend in running.gateway.fleet)


async def test_streams_that_could_not_be_resumed_are_left_to_decode() -> None:
    async with pools(resume="off") as (running, _, _):
        await says(running, CHAT, chat(stream=True))
        await says(running, CHAT, chat())
        assert await counted(running) == {("decode", "resume_off"): 1, ("prefill", "exact"): 1}


async def test_a_connector_of_which_nothing_is_known_is_left_alone() -> None:
    async with pools(engine={"connector": "mooncake_ascend"}, connector="mooncake_ascend") as (running, [p], [d]):
        await says(running, CHAT, chat(stream=True))
        await says(running, CHAT, chat(max_tokens=1))
        assert await counted(running) == {("decode", "connector"): 2}
        assert legs(p) == ["prefill"] * 2
        await at_rest(running, p, d)


async def test_engines_with_unlike_blocks_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons: list[str] = []
    consider = FirstTokens.consider

    def listening(self: FirstTokens, *arguments: Any) -> str:
        reasons.append(consider(self, *arguments))
        return reasons[-1]

    monkeypatch.setattr(FirstTokens, "consider", listening)
    async with (
        simulators("prefill") as [p],
        simulators("decode", block_size=32) as [d],
        gateway([p.url], [d.url]) as running,
    ):
        await running.http.post(CHAT, json=chat(stream=True))
        # Such a pair cannot hand over either. The tries after that may find the engines' facts in doubt.
        assert reasons[0] == "unlike_engines"
        assert set(reasons) <= {"unlike_engines", "unknown_engine"}
        assert {source for source, _ in await counted(running)} == {"decode"}


async def test_chats_of_engines_that_have_reasoned_are_left_alone() -> None:
    async with pools() as (running, _, _):
        running.gateway.fleet.pool("decode")[0].has_reasoning = True
        await says(running, CHAT, chat(stream=True))
        await says(running, COMPLETIONS, completion(stream=True))
        assert await counted(running) == {("decode", "reasoning"): 1, ("prefill", "exact"): 1}


# Failures after it


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("reset", {}),
        ("status", {"status": 500}),
        ("status", {"status": 503}),
        ("status", {"status": 429, "retry_after": 1}),
        ("garbage", {"form": "bytes"}),
        ("garbage", {"form": "json"}),
        ("error_event_first", {}),
        ("die_mid_stream", {"after_tokens": 0}),
        ("recomputed", {"after_tokens": 0}),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
async def test_a_decode_that_fails_at_once_is_made_good_behind_the_token(
    kind: str, options: dict[str, Any], stream: bool, path: str
) -> None:
    body = body_of(path, stream=stream, **({"stream_options": USAGE} if stream else {}))
    async with pools(2, 2, engine={"lease": 1.0}) as (running, p, d):
        expected = await says(running, path, body)
        for engine in (
            d if stream or kind != "status" else d[:1]
        ):  # two that are busy are the answer to one in one piece
            engine.faults.add(kind, leg="decode", count=1, **options)  # type: ignore[arg-type]
        assert await says(running, path, body) == expected
        await until(running.idle)
        assert ("prefill", "exact") in await counted(running)
        await until(lambda: all(not e.engine.stranded_blocks for e in p))


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_an_unread_hand_off_goes_to_another_decode_behind_the_same_token(stream: bool) -> None:
    async with pools(1, 2) as (running, [p], d):
        expected = await says(running, CHAT, chat(stream=stream))
        first = next(e for e in d if any(r.leg == "decode" for r in e.requests))
        p.requests.clear()
        for engine in d:
            engine.faults.add("status", leg="decode", count=1, status=429)
            break
        assert await says(running, CHAT, chat(stream=stream)) == expected
        assert legs(p) == ["prefill"]
        assert first.engine.dead is None
        await at_rest(running, p, *d)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_decode_that_is_another_engine_by_then_is_sent_nothing_that_counts_on_the_first(
    stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The moment between prefill's answer and the decode leg, with a connection at hand."""
    give = FirstTokens.give

    def giving(self: FirstTokens, attempt: Attempt) -> bool:
        given = give(self, attempt)
        attempt.lease.backend.learn(None)
        return given

    async with pools(1, 2, engine={"lease": 1.0}) as (running, [p], d):
        expected = await says(running, CHAT, chat(stream=stream))
        for engine in d:
            engine.requests.clear()
        monkeypatch.setattr(FirstTokens, "give", giving)
        assert await says(running, CHAT, chat(stream=stream)) == expected
        [sent] = [r for engine in d for r in engine.requests]
        # The other decode backend is as well known as ever, and the hand-off fits it.
        assert len(sent.body["kv_transfer_params"]["prompt_token_ids"]) % 16 == 35 % 16
        for backend in running.gateway.fleet.pool("decode"):
            await until(lambda backend=backend: backend.identity is not None)  # type: ignore[misc]
        await at_rest(running, p, *d)


async def test_a_client_that_leaves_behind_its_first_token_leaves_nothing_behind() -> None:
    async with pools(engine={"lease": 1.0}) as (running, [p], [d]):
        d.faults.add("hang", leg="decode", count=1)
        async with running.http.stream("POST", CHAT, json=chat(stream=True)) as answer:
            async for part in answer.aiter_text():
                if '"content":" ' in part:
                    break
        await until(running.idle)
        await until(lambda: p.engine.stranded_blocks == 0)
        assert d.engine.dead is None
