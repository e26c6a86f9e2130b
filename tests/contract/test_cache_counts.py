"""The numbers of a prompt's cached and written tokens are prefill's, whatever decode's version reports."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from pd_proxy.handoff.connectors.registry import CONNECTORS

from tests.contract.cases import CASES, IDS, MOST, Case, fleet
from tests.support import Running, chat, completion

pytestmark = pytest.mark.cross_product

EVERY = pytest.mark.parametrize("case", MOST, ids=IDS)
BEGINNING = "the first half of a prompt that prefill has seen before, and decode never has; " * 2
PROMPT = BEGINNING + "and the other half, which is new to both of them. " * 3
PATHS = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "messages": "/v1/messages",
    "responses": "/v1/responses",
}


def body_of(endpoint: str, prompt: str, *, stream: bool, max_tokens: int = 20) -> dict[str, Any]:
    common: dict[str, Any] = {"model": "sim", "temperature": 0, "stream": stream}
    if endpoint in ("chat", "completions"):
        make = chat if endpoint == "chat" else completion
        usage = {"stream_options": {"include_usage": True}} if stream else {}
        return make(prompt, stream=stream, max_tokens=max_tokens, ignore_eos=True, **usage)
    if endpoint == "messages":
        return {**common, "max_tokens": max_tokens, "messages": [{"role": "user", "content": prompt}]}
    return {**common, "max_output_tokens": max_tokens, "input": prompt}


async def usage_of(running: Running, endpoint: str, *, stream: bool) -> dict[str, Any]:
    """The last usage that a client receives."""
    answer = await running.http.post(PATHS[endpoint], json=body_of(endpoint, PROMPT, stream=stream))
    assert answer.status_code == 200, answer.text
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    told = [(event.get("response") or event).get("usage") for event in events] if stream else [answer.json()["usage"]]
    return [usage for usage in told if usage][-1]  # type: ignore[no-any-return]


def counts(endpoint: str, usage: dict[str, Any]) -> tuple[int, int | None, int | None]:
    """Prompt, cached and written tokens."""
    if endpoint == "messages":
        read, written = usage.get("cache_read_input_tokens"), usage.get("cache_creation_input_tokens")
        return usage["input_tokens"] + (read or 0) + (written or 0), read, written
    details = usage["input_tokens_details" if endpoint == "responses" else "prompt_tokens_details"] or {}
    if endpoint == "responses":
        assert details["cached_tokens_per_turn"] == [details["cached_tokens"]]
    prompt = usage["input_tokens" if endpoint == "responses" else "prompt_tokens"]
    name = "cache_write_tokens" if endpoint == "responses" else "created_cache_tokens"
    return prompt, details.get("cached_tokens"), details.get(name)


@EVERY
@pytest.mark.parametrize("endpoint", PATHS)
async def test_cached_and_written_tokens_are_prefills_in_every_answer(case: Case, endpoint: str) -> None:
    if endpoint not in CONNECTORS[case.name].traits.endpoints:
        pytest.skip("its engines do not share such a request")
    if not CONNECTORS[case.name].traits.plain_prefill:
        pytest.skip("its prefill engines answer nobody but a gateway")
    engine = {"written_tokens": True, "handoff_cached": False}
    for stream in (False, True):
        async with fleet(case, engine=engine) as (running, [p], [d]):
            async with httpx.AsyncClient(base_url=p.url, verify=False) as straight:
                await straight.post(PATHS[endpoint], json=body_of(endpoint, BEGINNING, stream=False, max_tokens=1))
            prompt, cached, written = counts(endpoint, await usage_of(running, endpoint, stream=stream))
            assert cached == p.engine.stats.prefix_hits > 0
            assert d.engine.stats.pulls == 1
            if endpoint != "completions":  # vLLM does not report it there
                assert written == prompt - cached
            metrics = await running.metrics()
            assert metrics['pd_proxy_tokens_total{kind="cached",model="sim"}'] == cached
            assert metrics['pd_proxy_tokens_total{kind="prompt",model="sim"}'] == prompt


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("endpoint", PATHS)
async def test_a_prompt_that_no_engine_had_cached_is_not_reported_as_cached(endpoint: str, stream: bool) -> None:
    [case] = [case for case in CASES if case.name == "nixl"]
    engine = {"written_tokens": True, "handoff_cached": False}
    async with fleet(case, engine=engine) as (running, _, _):
        prompt, cached, written = counts(endpoint, await usage_of(running, endpoint, stream=stream))
        assert cached == 0
        assert written in (prompt, None)
        assert (await running.metrics())['pd_proxy_tokens_total{kind="cached",model="sim"}'] == 0


async def test_the_hand_off_has_the_number_that_prefills_usage_lacks() -> None:
    [case] = [case for case in CASES if case.name == "nixl"]
    for stream in (False, True):
        async with fleet(case) as (running, [p], [d]):
            object.__setattr__(p.config, "prompt_tokens_details", False)
            assert not p.engine.config.prompt_tokens_details and d.engine.config.prompt_tokens_details
            _, cached, _ = counts("chat", await usage_of(running, "chat", stream=stream))
            assert cached == 0


async def test_numbers_that_no_engine_reports_are_left_out() -> None:
    [case] = [case for case in CASES if case.name == "nixl"]
    for stream in (False, True):
        async with fleet(case, engine={"handoff_cached": False}) as (running, [p], _):
            object.__setattr__(p.config, "prompt_tokens_details", False)
            _, cached, _ = counts("chat", await usage_of(running, "chat", stream=stream))
            assert cached is None
