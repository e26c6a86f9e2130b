"""Anthropic's messages, OpenAI's responses, and tokens in, tokens out: they pass through both legs, as chat does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from pd_proxy.handoff.connectors.registry import CONNECTORS
from pd_proxy_simulator.prompts import render_chat

from tests.contract.cases import CASES, Case, fleet
from tests.flow.helpers import at_rest
from tests.support import PROMPT, Running, pools, running_gateway, simulators, until

pytestmark = pytest.mark.cross_product

TOKENS = render_chat([{"role": "user", "content": PROMPT}], None)
ENGINE = {"scale_out": True, "responses_store": True}


class Route(msgspec.Struct, frozen=True):
    """An endpoint, and how its answers are read."""

    path: str
    request: dict[str, Any]
    whole: Callable[[dict[str, Any]], Any]
    piece: Callable[[dict[str, Any]], Any]
    last: str
    error: Callable[[dict[str, Any]], str]

    def body(self, tokens: int = 20, **more: Any) -> dict[str, Any]:
        body = {**self.request, **more}
        if "sampling_params" in body:
            body["sampling_params"] = {"temperature": 0, **body["sampling_params"], "max_tokens": tokens}
        else:
            bound = "max_output_tokens" if "input" in body else "max_tokens"
            body |= {bound: tokens, "temperature": 0}
        return body

    def text(self, answer: dict[str, Any]) -> Any:
        return self.whole(answer)

    def events(self, text: str) -> list[dict[str, Any]]:
        """The events of a stream, less `[DONE]`. Those with names say the same name twice."""
        found = []
        for block in text.strip().split("\n\n"):
            *head, data = block.split("\n")
            if data == "data: [DONE]":
                continue
            event = json.loads(data.removeprefix("data: "))
            assert not head or head == [f"event: {event['type']}"]
            found.append(event)
        return found

    def streamed(self, text: str) -> Any:
        """What a stream said; fails unless it ended as it should."""
        events = self.events(text)
        if self.last == "[DONE]":
            assert text.endswith("data: [DONE]\n\n")
            assert [choice["finish_reason"] for e in events[-1:] for choice in e["choices"]] == ["length"]
        else:
            assert events[-1]["type"] == self.last, text[-500:]
        pieces = [piece for event in events if (piece := self.piece(event))]
        return "".join(pieces) if isinstance(pieces[0], str) else [token for piece in pieces for token in piece]


def _block_text(event: dict[str, Any]) -> str:
    return str(event["delta"]["text"]) if event["type"] == "content_block_delta" else ""


def _output_text(event: dict[str, Any]) -> str:
    return str(event["delta"]) if event["type"] == "response.output_text.delta" else ""


ROUTES = [
    Route(
        "/v1/messages",
        {"model": "sim", "messages": [{"role": "user", "content": PROMPT}]},
        whole=lambda answer: answer["content"][0]["text"],
        piece=_block_text,
        last="message_stop",
        error=lambda answer: str(answer["error"]["message"]) if answer["type"] == "error" else "",
    ),
    Route(
        "/v1/responses",
        {"model": "sim", "input": PROMPT},
        whole=lambda answer: answer["output"][0]["content"][0]["text"],
        piece=_output_text,
        last="response.completed",
        error=lambda answer: str(answer["error"]["message"]),
    ),
    Route(
        "/inference/v1/generate",
        {"model": "sim", "token_ids": TOKENS, "sampling_params": {}},
        whole=lambda answer: answer["choices"][0]["token_ids"],
        piece=lambda event: event["choices"][0]["token_ids"] if event["choices"] else None,
        last="[DONE]",
        error=lambda answer: str(answer["error"]["message"]),
    ),
]
MESSAGES, RESPONSES, GENERATE = ROUTES
NAMES = dict(zip((route.path for route in ROUTES), ("messages", "responses", "generate"), strict=True))


def splits(route: Route, case: Case) -> bool:
    """Whether engines that speak a connector share a request on a route."""
    return NAMES[route.path] in CONNECTORS[case.name].traits.endpoints


SPLIT = [pytest.param(r, c, id=f"{NAMES[r.path]}-{c.name}") for r in ROUTES for c in CASES if splits(r, c)]
EVERY = pytest.mark.parametrize("route", ROUTES, ids=["messages", "responses", "generate"])
NAMED = pytest.mark.parametrize("route", [MESSAGES, RESPONSES], ids=["messages", "responses"])
BOTH_WAYS = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


def gateway(prefill: int = 1, decode: int = 1, *, engine: dict[str, Any] | None = None, **settings: Any) -> Any:
    return pools(prefill, decode, engine={**ENGINE, **(engine or {})}, routes={"generate": True}, **settings)


async def ask(running: Running, route: Route, body: dict[str, Any]) -> Any:
    """What the answer says, streamed or not."""
    answer = await running.http.post(route.path, json=body)
    assert answer.status_code == 200, answer.text
    for secret in ("_transfer_params", "remote_", "engine_id", "block_ids"):
        assert secret not in answer.text
    return route.streamed(answer.text) if body.get("stream") else route.text(answer.json())


async def what_one_engine_says(route: Route, **more: Any) -> Any:
    async with (
        simulators("mixed", **ENGINE) as [single],
        running_gateway(mixed=[single.url], routes={"generate": True}) as alone,
    ):
        return await ask(alone, route, route.body(**more))


@pytest.mark.parametrize(("route", "case"), SPLIT)
@BOTH_WAYS
async def test_the_answer_is_one_engines_and_decode_has_prefills_kv(route: Route, stream: bool, case: Case) -> None:
    expected = await what_one_engine_says(route)
    async with fleet(case, engine=ENGINE, routes={"generate": True}) as (running, [p], [d]):
        assert await ask(running, route, route.body(stream=stream)) == expected
        [prefill], [decode] = p.requests, d.requests
        assert (prefill.leg, decode.leg, prefill.path, decode.path) == ("prefill", "decode", route.path, route.path)
        assert (prefill.output_tokens, decode.output_tokens) == (1, 20)
        # What is shared by its content is shared in whole blocks.
        whole = len(TOKENS) if case.name != "shared_cache" else len(TOKENS) // 16 * 16
        assert d.engine.stats.external_kv_transfer == whole
        assert d.engine.stats.local_compute == len(TOKENS) - whole
        assert prefill.headers["x-request-id"] == decode.headers["x-request-id"]
        await at_rest(running, p, d)
        metrics = await running.metrics()
        endpoint = {"/v1/messages": "messages", "/v1/responses": "responses"}.get(route.path, "generate")
        assert metrics[f'pd_proxy_requests_total{{endpoint="{endpoint}",model="sim",outcome="ok"}}'] == 1
        assert metrics['pd_proxy_tokens_total{kind="completion",model="sim"}'] == 20
        assert metrics['pd_proxy_tokens_total{kind="prompt",model="sim"}'] == len(TOKENS)


@EVERY
async def test_engines_that_hand_nothing_over_on_a_route_serve_it_whole_or_not_at_all(route: Route) -> None:
    expected = await what_one_engine_says(route)
    for case in CASES:
        if splits(route, case):
            continue
        async with fleet(case, engine=ENGINE, routes={"generate": True}) as (running, [p], [d]):
            answer = await running.http.post(route.path, json=route.body())
            assert not p.requests
            if CONNECTORS[case.name].traits.plain_decode:
                assert route.text(answer.json()) == expected
                assert answer.headers["x-pd-proxy-fallback"] == "endpoint"
            else:
                assert answer.status_code == 400 and not d.requests


@EVERY
async def test_a_stream_goes_out_token_by_token(route: Route) -> None:
    async with gateway(engine={"step_time": 0.02}) as (running, _, _):
        async with running.http.stream("POST", route.path, json=route.body(stream=True)) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            reads = [piece async for piece in answer.aiter_raw()]
        assert len(reads) >= 15
        pieces = [piece for event in route.events(b"".join(reads).decode()) if (piece := route.piece(event))]
        metrics = await running.metrics()
        # Once for each pool; and a gap less than there are pieces, since some tokens have no text of their own.
        for name, count in (("time_to_first_token", 2), ("inter_token_latency", len(pieces) - 1)):
            found = [v for k, v in metrics.items() if k.startswith(f"pd_proxy_{name}_seconds_count")]
            assert sum(found) == count, name


BEFORE_THE_FIRST_TOKEN: list[tuple[str, dict[str, Any]]] = [
    ("reset", {}),
    ("status", {"status": 500}),
    ("garbage", {"form": "json"}),
    ("error_event_first", {}),
    ("die_mid_stream", {"after_tokens": 0}),
]


@EVERY
@BOTH_WAYS
@pytest.mark.parametrize("leg", ["prefill", "decode"])
@pytest.mark.parametrize(("kind", "options"), BEFORE_THE_FIRST_TOKEN, ids=lambda v: v if isinstance(v, str) else None)
async def test_a_failure_before_the_first_token_is_tried_elsewhere(
    kind: str, options: dict[str, Any], leg: str, stream: bool, route: Route
) -> None:
    expected = await what_one_engine_says(route)
    policy = {"prefill": "round_robin", "decode": "round_robin"}
    async with gateway(2, 2, policy=policy) as (running, prefill, decode):
        bad = (prefill if leg == "prefill" else decode)[0]
        bad.faults.add(kind, leg=leg, **options)
        for _ in range(2):
            assert await ask(running, route, route.body(stream=stream)) == expected
        await until(running.idle)
        hit = bad.faults.find(kind)
        assert hit is not None and hit.hits > 0
        retries = {k: v for k, v in (await running.metrics()).items() if k.startswith("pd_proxy_retries_total")}
        assert any(f'leg="{leg}"' in k for k in retries), retries


@EVERY
@pytest.mark.parametrize(
    ("ending", "resume"),
    [
        *((ending, "exact") for ending in ("reset", "kill", "truncated", "garbage", "json", "error", "done")),
        ("reset", "best_effort"),
        ("reset", "off"),
    ],
)
async def test_a_stream_that_breaks_ends_with_the_apis_own_error(route: Route, ending: str, resume: str) -> None:
    async with gateway(1, 2, resume=resume, engine={"death_delay": 0.0}) as (running, _, decode):
        for engine in decode:
            engine.faults.add("die_mid_stream", leg="decode", after_tokens=5, ending=ending)
        answer = await running.http.post(route.path, json=route.body(stream=True))
        assert answer.status_code == 200
        events = route.events(answer.text)
        assert "could not be continued" in route.error(events[-1])
        pieces = [piece for event in events[:-1] if (piece := route.piece(event))]
        assert 1 <= len(pieces) <= 5
        if route is RESPONSES:
            assert [event["sequence_number"] for event in events] == list(range(len(events)))
            assert events[-1]["type"] == "error" and events[-1]["code"] == "stream_interrupted"
        if route is MESSAGES:
            assert events[-1]["error"]["type"] == "api_error"
        why = "off" if resume == "off" else "endpoint"
        metrics = await running.metrics()
        assert metrics[f'pd_proxy_resumes_refused_total{{reason="{why}"}}'] == 1
        assert not any("return_token_ids" in (request.body or {}) for engine in decode for request in engine.requests)
        await until(running.idle)


@EVERY
@pytest.mark.parametrize("stage", ["prefill", "decode", "stream"])
async def test_a_client_that_leaves_leaves_nothing_behind(route: Route, stage: str) -> None:
    async with gateway(engine={"step_time": 0.01}) as (running, [p], [d]):
        if stage != "stream":
            (p if stage == "prefill" else d).faults.add("delay_first_byte", leg=stage, delay_s=0.5)  # type: ignore[arg-type]
        sending = asyncio.create_task(running.http.post(route.path, json=route.body(2000, stream=True)))
        engine = p if stage == "prefill" else d
        await until(lambda: bool(engine.requests))
        if stage == "stream":
            await until(lambda: d.engine.stats.generation_tokens > 5)
        sending.cancel()
        await until(running.idle)
        await at_rest(running, p, d)
        metrics = await running.metrics()
        assert metrics[f'pd_proxy_client_disconnects_total{{stage="{stage}"}}'] == 1


FORBIDDEN = {
    "kv_transfer_params": {"do_remote_prefill": True},
    "ec_transfer_params": {"peer_host": "x"},
    "request_id": "mine",
    "bootstrap_room": 7,
    "disaggregated_params": {},
}


@EVERY
@BOTH_WAYS
async def test_members_that_no_client_may_send_reach_no_engine_at_any_depth(route: Route, stream: bool) -> None:
    nested = {"extra_args": {**FORBIDDEN, "deeper": FORBIDDEN}, "vllm_xargs": FORBIDDEN}
    body = route.body(4, stream=stream, **FORBIDDEN, vllm_xargs={**FORBIDDEN, "kept": 1})
    if route is GENERATE:
        body["sampling_params"] |= nested
    async with gateway() as (running, [p], [d]):
        await ask(running, route, body)
        for engine in (p, d):
            [request] = engine.requests
            sent = dict(request.body)
            params = sent.pop("kv_transfer_params")
            assert params["do_remote_decode"] is (engine is p)
            name = sent.pop("request_id", None)
            assert name != "mine" and (name is not None) is (route is RESPONSES)
            text = json.dumps(sent)
            assert not any(f'"{forbidden}"' in text for forbidden in FORBIDDEN), text
            assert sent["vllm_xargs"] == {"kept": 1}


@EVERY
async def test_errors_have_the_apis_own_shape(route: Route) -> None:
    async with gateway(api_keys=["k"]) as (running, [p], [d]):
        key = {"authorization": "Bearer k"}

        async def refused(status: int, kind: str, code: str, content: bytes, headers: dict[str, str] = key) -> None:
            answer = await running.http.post(route.path, content=content, headers=headers)
            assert answer.status_code == status, answer.text
            body = answer.json()
            assert route.error(body)
            if route is MESSAGES:
                assert (body["type"], body["error"]["type"], set(body)) == ("error", kind, {"type", "error"})
            else:
                assert (body["error"]["code"], set(body)) == (code, {"error"})

        good = json.dumps(route.body()).encode()
        await refused(401, "authentication_error", "invalid_api_key", good, {})
        await refused(401, "authentication_error", "invalid_api_key", good, {"x-api-key": "other"})
        unknown = json.dumps(route.body(model="other")).encode()
        await refused(404, "not_found_error", "model_not_found", unknown)
        for garbage in (b"", b"{", b"[]", b'"text"', b"\xff", b'{"stream": 2}', b'{"model": 5}', b"[" * 5000):
            await refused(400, "invalid_request_error", "invalid_request", garbage)
        assert not p.requests and not d.requests
        answer = await running.http.get(route.path, headers=key)
        assert answer.status_code == 405 and answer.headers["allow"] == "POST" and route.error(answer.json())
        answer = await running.http.post(route.path, content=good, headers={"x-api-key": "k"})
        assert answer.status_code == 200
        p.kill()
        d.kill()
        await until(lambda: not any(backend.up for backend in running.gateway.fleet))
        await refused(503, "overloaded_error", "no_backend", good)


@EVERY
async def test_a_refusal_of_the_engine_has_the_apis_shape_and_frees_the_blocks(route: Route) -> None:
    async with gateway() as (running, [p], [d]):
        d.faults.add("status", leg="decode", status=404, count=1)
        answer = await running.http.post(route.path, json=route.body())
        assert answer.status_code == 404
        assert "does not exist" in route.error(answer.json())
        if route is MESSAGES:
            assert answer.json()["error"]["type"] == "not_found_error"
        await at_rest(running, p, d)
        # Decode's handler has had them freed; where none is known to do so, a leg that the engine refuses does.
        legs = [(request.path, request.status) for request in d.requests]
        assert legs == [(route.path, 404), *([("/v1/completions", 400)] if "generate" in route.path else [])]
        assert d.engine.stats.external_kv_transfer == 0


@pytest.mark.parametrize(
    ("route", "body"),
    [
        (MESSAGES, {"model": "sim", "messages": [{"role": "user", "content": "a"}]}),  # max_tokens is missing
        (MESSAGES, {"model": "sim", "messages": 5, "max_tokens": 5}),
        (MESSAGES, {"model": "sim", "messages": [{"role": "user", "content": "a"}], "max_tokens": 0}),
        (RESPONSES, {"model": "sim"}),
        (RESPONSES, {"model": "sim", "input": "a", "background": True, "store": False}),
        (GENERATE, {"model": "sim", "token_ids": []}),
        (GENERATE, {"model": "sim", "token_ids": [1], "sampling_params": {"max_tokens": 5, "min_tokens": 9}}),
    ],
)
async def test_a_request_that_an_engine_would_refuse_is_refused(route: Route, body: dict[str, Any]) -> None:
    async with gateway() as (running, [p], [d]):
        answer = await running.http.post(route.path, json=body)
        assert answer.status_code == 400, answer.text
        if route is MESSAGES:
            assert answer.json()["error"]["type"] == "invalid_request_error"
        assert route.error(answer.json())
        await at_rest(running, p, d)


async def test_an_engine_that_gives_a_request_up_for_want_of_memory_is_not_believed() -> None:
    expected = await what_one_engine_says(MESSAGES)
    async with gateway(1, 2) as (running, _, decode):
        for engine in decode:
            engine.faults.add("recomputed", leg="decode", after_tokens=0, count=1)
        for stream in (False, True):
            assert await ask(running, MESSAGES, MESSAGES.body(stream=stream)) == expected


async def test_generate_is_there_when_it_is_switched_on() -> None:
    async with pools(engine=ENGINE) as (running, [p], [d]):
        answer = await running.http.post(GENERATE.path, json=GENERATE.body())
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "unknown_route"
        assert GENERATE.path not in (await running.http.get("/openapi.json")).json()["paths"]
        assert not p.requests and not d.requests


async def test_generate_with_several_choices_or_prompt_logprobs_goes_to_one_backend_whole() -> None:
    async with gateway() as (running, [p], [d]):
        for sampling, why in (({"n": 2, "temperature": 1}, "n"), ({"prompt_logprobs": 1}, "prompt_logprobs")):
            answer = await running.http.post(GENERATE.path, json=GENERATE.body(sampling_params=sampling))
            assert answer.status_code == 200, answer.text
            assert answer.headers["x-pd-proxy-fallback"] == why
        assert not p.requests and [request.leg for request in d.requests] == ["local", "local"]


@NAMED
async def test_an_empty_answer_is_one(route: Route) -> None:
    async with gateway(engine={"eos_rate": 0.999999}) as (running, [p], [d]):
        answer = await running.http.post(route.path, json=route.body(stream=True))
        assert answer.status_code == 200
        events = route.events(answer.text)
        assert events[-1]["type"] == route.last
        assert not any(route.piece(event) for event in events)
        await at_rest(running, p, d)


@NAMED
@BOTH_WAYS
async def test_a_request_for_one_token(route: Route, stream: bool) -> None:
    expected = await what_one_engine_says(route, tokens=1)
    async with gateway() as (running, [p], [d]):
        assert await ask(running, route, route.body(1, stream=stream)) == expected
        # A prefill engine gives such an answer whole, unless it is to be kept: who keeps is decode.
        assert [len(p.requests), len(d.requests)] == ([1, 0] if route is MESSAGES else [1, 1])
        await at_rest(running, p, d)


async def test_a_route_that_not_every_kind_of_backend_has_goes_to_those_that_have_it() -> None:
    async with simulators("mixed", "mixed") as (vllm, other):
        group = {"name": "other", "kind": "openai", "mixed": [other.url]}
        async with running_gateway(mixed=[vllm.url], groups=[group]) as running:
            for _ in range(8):
                answer = await running.http.post(MESSAGES.path, json=MESSAGES.body(4))
                assert answer.status_code == 200, answer.text
            assert (len(vllm.requests), len(other.requests)) == (8, 0)


async def test_a_route_that_no_kind_has_is_left_to_the_engine() -> None:
    async with simulators("mixed") as [engine], running_gateway(mixed=[engine.url], kind="openai") as running:
        assert (await running.http.post(MESSAGES.path, json=MESSAGES.body(4))).status_code == 200
        assert len(engine.requests) == 1
