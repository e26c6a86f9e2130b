"""Streams with logprobs have an entry for each token, whichever engine sampled it, and even for parts of characters."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.support import pools

pytestmark = pytest.mark.cross_product

LETTERS = "日本語 🦀 naïve héllo ☃"  # answers to it have tokens that are parts of characters
MESSAGES = [{"role": "user", "content": LETTERS}]
COMMON: dict[str, Any] = {"model": "sim", "max_tokens": 40, "temperature": 0, "stream": True}
USAGE = {"stream_options": {"include_usage": True}}


async def chat_entries(client: openai.AsyncOpenAI, **more: Any) -> tuple[list[str], str, int]:
    """The tokens of the logprobs' entries, the text, and how many tokens the engine counted."""
    entries, text, counted = [], "", 0
    body = {**COMMON, "messages": MESSAGES, "logprobs": True, **USAGE, **more}
    async for chunk in await client.chat.completions.create(**body):
        counted = chunk.usage.completion_tokens if chunk.usage else counted
        for choice in chunk.choices:
            text += choice.delta.content or ""
            if choice.logprobs is not None:
                entries += [entry.token for entry in choice.logprobs.content or ()]
    return entries, text, counted


async def text_entries(client: openai.AsyncOpenAI, **more: Any) -> tuple[list[str], str, int]:
    entries, text, counted = [], "", 0
    body = {**COMMON, "prompt": LETTERS, "logprobs": 1, **USAGE, **more}
    async for chunk in await client.completions.create(**body):
        counted = chunk.usage.completion_tokens if chunk.usage else counted
        for choice in chunk.choices:
            text += choice.text
            if choice.logprobs is not None:
                entries += choice.logprobs.tokens or ()
    return entries, text, counted


ENTRIES = {"chat": chat_entries, "completions": text_entries}
CONTINUOUS = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
@pytest.mark.parametrize(
    ("parser", "first_token", "broken", "more"),
    [
        (False, "decode", False, {}),
        (True, "decode", False, {}),
        (True, "prefill", False, {}),
        (True, "decode", True, {}),
        (True, "prefill", True, {}),
        (True, "prefill", True, {"extra_body": {"return_token_ids": True}}),
        (True, "prefill", True, CONTINUOUS),
    ],
    ids=["plain", "parser", "prefill's", "resumed", "both", "ids", "usage"],
)
async def test_a_stream_with_logprobs_has_an_entry_for_each_token(
    endpoint: str, parser: bool, first_token: str, broken: bool, more: dict[str, Any]
) -> None:
    settings = {"first_token": first_token, "resume": "best_effort"}
    async with (
        pools(1, 2, engine={"parser": parser, "eos_rate": 0.0}, **settings) as (running, _, d),
        openai.AsyncOpenAI(
            base_url=f"{running.url}/v1",
            api_key="k",
            max_retries=0,
            http_client=openai.DefaultAsyncHttpxClient(verify=False),
        ) as client,
    ):
        entries = ENTRIES[endpoint]
        alone = openai.AsyncOpenAI(
            base_url=f"{d[0].url}/v1",
            api_key="k",
            max_retries=0,
            http_client=openai.DefaultAsyncHttpxClient(verify=False),
        )
        expected = await entries(alone, **more)
        await alone.close()
        assert len(expected[0]) == 40
        assert any("\ufffd" in token for token in expected[0]), "no token of it is a part of a character"
        if broken:
            for engine in d:
                engine.faults.add("die_mid_stream", leg="decode", count=1, after_tokens=9)
        assert await entries(client, **more) == expected
        assert expected[2] == 40
        if broken:
            assert (await running.metrics())['pd_proxy_resumes_total{reason="cut"}'] >= 1
