"""SGLang's own `/generate` through both legs: the answer is that of one engine."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from pd_proxy_simulator import Simulator
from pd_proxy_simulator.tokens import tokenize

from tests.contract.cases import CASES, fleet, one_engine
from tests.support import PROMPT, Running, events_of, running_gateway, simulators, until

pytestmark = pytest.mark.cross_product

CASE = next(case for case in CASES if case.name == "sglang")
PATH = "/generate"
PROMPTS = ["the first of them " * 5, "the second of them " * 5, "the third of them " * 5]
SCORED = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2}
BOTH_WAYS = pytest.mark.parametrize("stream", [False, True])
OF_THE_ENGINE = ("id", "e2e_latency", "cached_tokens")


def body(tokens: int = 20, **more: Any) -> dict[str, Any]:
    prompt = {} if {"text", "input_ids"} & more.keys() else {"text": PROMPT}
    return {**prompt, "sampling_params": {"max_new_tokens": tokens, "temperature": 0}, **more}


def last_of_each(text: str) -> Any:
    """The last event of each answer in a stream, in the form of a whole answer."""
    found = events_of(text)
    assert all("error" not in event for event in found), found[-1]
    if "index" not in found[0]:
        return found[-1]
    said = {event.pop("index"): event for event in found}
    return [said[index] for index in sorted(said)]


async def ask(running: Running, request: dict[str, Any]) -> Any:
    answer = await running.http.post(PATH, json=request)
    assert answer.status_code == 200, answer.text
    assert "x-pd-proxy-fallback" not in answer.headers
    assert not any(hidden in answer.text for hidden in ("bootstrap", "127.0.0.1", "_dp_rank"))
    return last_of_each(answer.text) if request.get("stream") else answer.json()


def plain(answer: Any) -> Any:
    """An answer without the members that differ between any two engines."""
    if isinstance(answer, list):
        return [plain(item) for item in answer]
    meta = {name: value for name, value in answer["meta_info"].items() if name not in OF_THE_ENGINE}
    return {**answer, "meta_info": meta}


async def answer_of_one(request: dict[str, Any]) -> Any:
    """The answer of one engine alone."""
    async with one_engine(connector="sglang") as alone:
        return await ask(alone, {**request, "stream": False})


async def at_rest(running: Running, *engines: Simulator) -> None:
    await until(running.idle)
    for engine in engines:
        await engine.wait_for(
            lambda engine=engine: (
                not engine.engine.running  # type: ignore[misc]
                and not engine.engine.waiting
                and engine.engine.used_blocks == 0
            )
        )


@BOTH_WAYS
@pytest.mark.parametrize("prompt", [{"text": PROMPT}, {"input_ids": tokenize(PROMPT)}], ids=["text", "ids"])
async def test_a_pair_answers_as_one_engine_does(prompt: dict[str, Any], stream: bool) -> None:
    request = body(**prompt, stream=stream)
    expected = await answer_of_one(request)
    async with fleet(CASE) as (running, [p], [d]):
        answer = await ask(running, request)
        assert plain(answer) == plain(expected)
        assert d.engine.pulls == 1, "decode has computed the prompt itself"
        rooms = [engine.requests[0].body["bootstrap_room"] for engine in (p, d)]
        assert rooms[0] == rooms[1]
        # The name is the gateway's own, not one by which engines pair or end legs.
        assert answer["meta_info"]["id"] == d.requests[0].body["rid"] != d.requests[0].headers["x-request-id"]
        await at_rest(running, p, d)


@BOTH_WAYS
@pytest.mark.parametrize("of", [{"text": PROMPTS}, {"input_ids": [tokenize(one) for one in PROMPTS]}, {"text": ["a"]}])
async def test_each_prompt_of_a_batch_has_a_room_of_its_own(of: dict[str, Any], stream: bool) -> None:
    request = body(**of, stream=stream)
    expected = await answer_of_one(request)
    async with fleet(CASE) as (running, [p], [d]):
        assert plain(await ask(running, request)) == plain(expected)
        count = len(expected)
        for engine in (p, d):
            told = engine.requests[0].body
            first = told["bootstrap_room"][0]
            assert told["bootstrap_room"] == [first + prompt for prompt in range(count)]
            assert len(told["bootstrap_host"]) == len(told["bootstrap_port"]) == len(set(told["rid"])) == count
        assert d.engine.pulls == count
        await at_rest(running, p, d)


@BOTH_WAYS
@pytest.mark.parametrize(
    "asked",
    [
        SCORED,
        {**SCORED, "logprob_start_len": 7},
        {"return_logprob": True},
        {**SCORED, "text": PROMPTS},
        {**SCORED, "text": PROMPTS, "return_logprob": [True, False, True]},
    ],
    ids=["all", "from", "none", "batch", "some"],
)
async def test_the_prompts_log_probabilities_come_from_prefill(asked: dict[str, Any], stream: bool) -> None:
    request = body(8, **asked, stream=stream)
    expected = await answer_of_one(request)
    async with fleet(CASE) as (running, [p], [d]):
        assert plain(await ask(running, request)) == plain(expected)
        assert d.engine.pulls == len(expected if isinstance(expected, list) else [0])
        await at_rest(running, p, d)


async def test_every_event_of_a_stream_has_the_prompts_log_probabilities() -> None:
    async with fleet(CASE) as (running, _, _):
        answer = await running.http.post(PATH, json=body(8, **SCORED, stream=True))
        found = events_of(answer.text)
        assert len(found) == 8
        ids = tokenize(PROMPT)
        for event in found:
            assert [token for _, token, _ in event["meta_info"]["input_token_logprobs"]] == ids
            assert len(event["meta_info"]["output_token_logprobs"]) == event["meta_info"]["completion_tokens"]


@BOTH_WAYS
async def test_decodes_answer_waits_for_prefills_log_probabilities_and_for_nothing_else(stream: bool) -> None:
    async with fleet(CASE) as (running, [p], [d]):
        prefill = next(backend for backend in running.gateway.fleet if backend.url == p.url)
        # Prefill's answer is slow, its KV cache is not.
        p.faults.add("slow_body", leg="prefill", piece_bytes=8, delay_s=0.05)
        await ask(running, body(4, stream=stream))
        await until(lambda: prefill.inflight_requests > 0)  # it goes on without the request
        p.faults.clear()
        await at_rest(running, p, d)
        p.faults.add("slow_body", leg="prefill", piece_bytes=64, delay_s=0.005)
        answer = await ask(running, body(4, **SCORED, stream=stream))
        assert len(answer["meta_info"]["input_token_logprobs"]) == len(tokenize(PROMPT))
        assert not prefill.inflight_requests
        await at_rest(running, p, d)


@BOTH_WAYS
async def test_more_log_probabilities_than_events_can_repeat_are_refused(
    stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pd_proxy.flow.steps.STREAM_LIMIT", 100)
    async with fleet(CASE) as (running, [p], [d]):
        answer = await running.http.post(PATH, json=body(4, **SCORED, stream=stream))
        assert answer.status_code == (400 if stream else 200)
        if stream:
            assert answer.json()["error"]["param"] == "stream"
        await at_rest(running, p, d)


@BOTH_WAYS
async def test_several_choices_and_sessions_are_refused_where_no_engine_serves_whole_requests(stream: bool) -> None:
    several = {"sampling_params": {"n": 2, "max_new_tokens": 4}}
    session = {"session_params": {"id": "s"}}
    async with fleet(CASE) as (running, [p], [d]):
        for more, why in ((several, "n"), (session, "session_params")):
            answer = await running.http.post(PATH, json=body(**more, stream=stream))
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, why)
        assert not p.requests and not d.requests
        async with simulators("mixed", connector="sglang") as [mixed]:
            settings = CASE.gateway([p, d])
            async with running_gateway([p.url], [d.url], [mixed.url], **settings) as beside:
                answer = await beside.http.post(PATH, json=body(**several, stream=stream))
                assert answer.headers["x-pd-proxy-fallback"] == "n"
                assert len(last_of_each(answer.text) if stream else answer.json()) == 2


TOKENS = ("prompt", "cached", "completion")
BEFORE_THE_FIRST_TOKEN: list[tuple[str, dict[str, Any]]] = [
    ("reset", {}),
    ("status", {"status": 500}),
    ("status", {"status": 503}),
    ("garbage", {"form": "json"}),
    ("garbage", {"form": "error"}),
    ("error_event_first", {}),
    ("die_mid_stream", {"after_tokens": 0}),
]


@BOTH_WAYS
@pytest.mark.parametrize("scored", [False, True], ids=["plain", "scored"])
@pytest.mark.parametrize("leg", ["prefill", "decode"])
@pytest.mark.parametrize(("kind", "options"), BEFORE_THE_FIRST_TOKEN, ids=lambda v: v if isinstance(v, str) else None)
async def test_a_failure_before_the_first_token_is_tried_elsewhere(
    kind: str, options: dict[str, Any], leg: str, scored: bool, stream: bool
) -> None:
    request = body(8, stream=stream, **(SCORED if scored else {}))
    expected = await answer_of_one(request)
    policy = {"prefill": "round_robin", "decode": "round_robin"}
    # A leg that waits for its peer is ended by the gateway, and does not time out by itself on a busy machine.
    async with fleet(CASE, 2, 2, policy=policy, engine={"handshake_timeout": 10.0}) as (running, prefill, decode):
        bad = (prefill if leg == "prefill" else decode)[0]
        bad.faults.add(kind, leg=leg, **options)  # type: ignore[arg-type]
        for _ in range(2):
            assert plain(await ask(running, request)) == plain(expected)
        fault = bad.faults.find(kind)  # type: ignore[arg-type]
        assert fault is not None and fault.hits > 0
        rooms = [request.body["bootstrap_room"] for engine in prefill for request in engine.requests]
        assert len(rooms) == len(set(rooms)), "a room was used twice"
        await at_rest(running, *prefill, *decode)


@BOTH_WAYS
@pytest.mark.parametrize("dead", ["prefill", "decode"])
async def test_a_dead_engine_fails_no_request(dead: str, stream: bool) -> None:
    expected = await answer_of_one(body())
    async with fleet(CASE, 2, 2) as (running, prefill, decode):
        (prefill if dead == "prefill" else decode)[0].kill()
        for _ in range(4):
            assert plain(await ask(running, body(stream=stream))) == plain(expected)


async def test_a_leg_that_fails_ends_the_other_at_once() -> None:
    async with fleet(CASE) as (running, [p], [d]):
        for leg, engine in (("prefill", p), ("decode", d)):
            engine.faults.add("status", leg=leg, status=404, count=1)  # type: ignore[arg-type]
            async with asyncio.timeout(2):
                answer = await running.http.post(PATH, json=body(**SCORED))
            assert answer.status_code == 404 and set(answer.json()) == {"error"}
            await at_rest(running, p, d)


@pytest.mark.parametrize("scored", [False, True], ids=["plain", "scored"])
@pytest.mark.parametrize("ending", ["reset", "kill", "truncated", "garbage", "json", "error", "done"])
async def test_a_stream_that_breaks_ends_with_an_error(ending: str, scored: bool) -> None:
    more = SCORED if scored else {}
    async with fleet(CASE, 1, 2, engine={"death_delay": 0.0}) as (running, _, decode):
        for engine in decode:
            engine.faults.add("die_mid_stream", leg="decode", after_tokens=5, ending=ending)
        answer = await running.http.post(PATH, json=body(stream=True, **more))
        assert answer.status_code == 200
        *said, error = events_of(answer.text)
        assert set(error) == {"error"} and "could not be continued" in error["error"]["message"]
        assert 1 <= len(said) <= 5 and all(event["meta_info"]["finish_reason"] is None for event in said)
        metrics = await running.metrics()
        assert metrics['pd_proxy_resumes_refused_total{reason="endpoint"}'] == 1
        await until(running.idle)


@BOTH_WAYS
@pytest.mark.parametrize("scored", [False, True], ids=["plain", "scored"])
@pytest.mark.parametrize("stage", ["prefill", "decode"])
async def test_a_client_that_leaves_ends_both_legs(stage: str, scored: bool, stream: bool) -> None:
    async with fleet(CASE, engine={"step_time": 0.01}) as (running, [p], [d]):
        if stage == "prefill":
            p.faults.add("delay_first_byte", leg="prefill", delay_s=30)
        request = body(2000, stream=stream, background=True, **(SCORED if scored else {}))
        asked = asyncio.create_task(running.http.post(PATH, json=request))
        if stage == "prefill":
            await until(lambda: bool(p.requests) and bool(d.requests))
        else:
            await until(lambda: d.engine.stats.generation_tokens > 5)
        asked.cancel()
        await until(running.idle)
        engines = [p, d] if stage == "prefill" else [d]  # prefill has done its part
        for engine in engines:
            await engine.wait_for(lambda engine=engine: engine.requests[0].aborted)  # type: ignore[misc]
        await d.wait_for(lambda: not d.engine.running and not d.engine.waiting and d.engine.used_blocks == 0)


FORBIDDEN: dict[str, Any] = {
    "rid": "mine",
    "bootstrap_host": "10.6.6.6",
    "bootstrap_port": 6,
    "bootstrap_room": 7,
    "bootstrap_pair_key": "mine",
    "data_parallel_rank": 666,
    "routed_dp_rank": 666,
    "disagg_prefill_dp_rank": 666,
    "decode_tp_size": 666,
    "http_worker_ipc": "mine",
    "encoder_urls": ["http://10.6.6.6"],
    "kv_router_hint": {"source_control_endpoint": "10.6.6.6"},
    "background": True,
    "kv_transfer_params": {"remote_host": "10.6.6.6"},
}


@BOTH_WAYS
@pytest.mark.parametrize("batch", [False, True], ids=["single", "batch"])
async def test_members_that_no_client_may_set_reach_no_engine(batch: bool, stream: bool) -> None:
    sampling = {"max_new_tokens": 4, "custom_params": {"rid": "mine", "bootstrap_host": "10.6.6.6", "kept": 1}}
    of = {"text": ["a", "b"], "sampling_params": [sampling, sampling]} if batch else {"sampling_params": sampling}
    async with fleet(CASE) as (running, [p], [d]):
        answer = await ask(running, {"text": "a", **of, **FORBIDDEN, "model": "sim", "stream": stream})
        assert "mine" not in json.dumps(answer)
        for engine in (p, d):
            [request] = engine.requests
            told = json.dumps(request.body)
            assert not any(evil in told for evil in ("mine", "10.6.6.6", "background")), told
            assert 666 not in request.body.values(), told
            assert '"kept": 1' in told and "model" not in request.body


@pytest.mark.parametrize(
    "request_body",
    [
        {},
        {"text": None},
        {"input_ids": []},
        {"text": ["a", 5]},
        {"text": "a", "sampling_params": {"max_tokens": 5}},
        {"text": "a", "sampling_params": {"max_new_tokens": "5"}},
        {"text": "a", "sampling_params": 5},
        {"text": "a", "return_logprob": "yes"},
        {"text": "a", "stream": 5},
        {"text": ["a", "b"], "return_logprob": [True]},
        {"text": "a " * 10**5},
        {"text": "a " * 10**5, "stream": True},
    ],
)
async def test_requests_that_an_engine_would_refuse_are_refused_in_its_error_shape(
    request_body: dict[str, Any],
) -> None:
    async with fleet(CASE) as (running, [p], [d]):
        answer = await running.http.post(PATH, json=request_body)
        assert answer.status_code == 400, answer.text
        assert set(answer.json()) == {"error"} and answer.json()["error"]["message"]
        await at_rest(running, p, d)


async def test_metrics_are_those_of_every_route() -> None:
    async with fleet(CASE, engine={"step_time": 0.01}) as (running, _, _):
        for _ in range(2):
            await ask(running, body(12, stream=True))
        await ask(running, body(12, text=PROMPTS))
        metrics = await running.metrics()

        def total(name: str) -> float:
            return sum(value for key, value in metrics.items() if key.startswith(name))

        assert total('pd_proxy_requests_total{endpoint="sglang_generate"') == 3
        prompt, several = len(tokenize(PROMPT)), sum(len(tokenize(one)) for one in PROMPTS)
        tokens = {key: value for key, value in metrics.items() if key.startswith("pd_proxy_tokens_total")}
        counted = {kind: sum(value for key, value in tokens.items() if f'"{kind}"' in key) for kind in TOKENS}
        assert counted["completion"] == 12 * 5
        assert counted["prompt"] == 2 * prompt + several
        assert 0 < counted["cached"] < prompt, "prefill had most of the second prompt in its cache"
        gaps = total("pd_proxy_inter_token_latency_seconds_count")
        assert (total("pd_proxy_time_to_first_token_seconds_count"), gaps) == (4, 22)


async def test_the_route_exists_where_the_pools_have_sglang_engines() -> None:
    async with fleet(CASE) as (running, _, _):
        assert PATH in (await running.http.get("/openapi.json")).json()["paths"]
        assert PATH in (await running.http.post("/generat")).json()["error"]["message"]
        assert (await running.http.get(PATH)).status_code == 405
    async with simulators("prefill", "decode") as [p, d], running_gateway([p.url], [d.url]) as running:
        answer = await running.http.post(PATH, json=body())
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "unknown_route"
        assert PATH not in (await running.http.get("/openapi.json")).json()["paths"]


async def test_engines_of_another_family_get_no_such_request() -> None:
    async with fleet(CASE) as (_, [p], [d]), simulators("prefill", "decode", "mixed") as [vllm_p, vllm_d, vllm_m]:
        group = {"name": "vllm", "connector": "nixl", "prefill": [vllm_p.url], "decode": [vllm_d.url]}
        settings = {**CASE.gateway([p, d]), "groups": [{**group, "mixed": [vllm_m.url]}]}
        async with running_gateway([p.url], [d.url], **settings) as running:
            for stream in (False, True) * 2:
                await ask(running, body(4, stream=stream))
            alone = await running.http.post(PATH, json=body(4, session_params={"id": "s"}))
            assert alone.status_code == 400 and alone.json()["error"]["param"] == "session_params"
            p.kill()
            await until(lambda: not all(backend.up for backend in running.gateway.fleet))
            answer = await running.http.post(PATH, json=body(4))
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_backend")
            assert not vllm_p.requests and not vllm_d.requests and not vllm_m.requests


async def test_an_sglang_engine_beside_others_serves_the_request_whole() -> None:
    request = body(4, session_params={"id": "s"})
    async with (
        simulators("mixed") as [vllm],
        simulators("mixed", connector="sglang") as [sglang],
    ):
        groups = [{"name": "sglang", "kind": "sglang", "mixed": [sglang.url]}]
        async with running_gateway(mixed=[vllm.url], groups=groups) as running:
            for stream in (False, True):
                await ask(running, {**request, "stream": stream})
            assert len(sglang.requests) == 2 and not vllm.requests


@BOTH_WAYS
async def test_the_route_exists_where_the_connector_is_detected(stream: bool) -> None:
    async with (
        simulators("prefill", "decode", connector="sglang") as [p, d],
        running_gateway([p.url], [d.url], connector="auto", kind="sglang") as running,
    ):
        await ask(running, body(4, stream=stream, **SCORED))
        assert d.engine.pulls == 1
