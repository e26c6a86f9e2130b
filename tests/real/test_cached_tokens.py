"""The cached tokens that a client reads are prefill's, whatever decode has in its own cache."""

from __future__ import annotations

from typing import Any

import pytest
from openai import OpenAI

from .bed import Bed
from .engines import BLOCK_SIZE, MODEL_NAME
from .gateway import Gateway
from .questions import Api, ask, body_for, prompt_of

pytestmark = pytest.mark.real

TOKENS = 200
IN_FULL_BLOCKS = TOKENS // BLOCK_SIZE * BLOCK_SIZE
"""The part of a completion's prompt that a prefix cache can have. A chat's prompt has seventeen tokens more, which
are as many blocks."""


def cached_tokens(client: OpenAI, api: Api, prompt: str, stream: bool) -> int | None:
    """What the client reads."""
    asked: dict[str, Any] = {**body_for(api, prompt, max_tokens=8), "stream": stream}
    if stream:
        asked["stream_options"] = {"include_usage": True}
    created = (client.chat.completions if api is Api.CHAT else client.completions).create(**asked)
    usage = [chunk.usage for chunk in created if chunk.usage][-1] if stream else created.usage
    assert usage is not None and usage.prompt_tokens_details is not None
    cached: int | None = usage.prompt_tokens_details.cached_tokens
    return cached


BOTH_WAYS = pytest.mark.parametrize(
    ("api", "stream"),
    [(api, stream) for api in Api for stream in (False, True)],
    ids=[f"{api.name.lower()}-{way}" for api in Api for way in ("whole", "streamed")],
)


@BOTH_WAYS
def test_tokens_that_only_decode_has_cached_are_not_reported(bed: Bed, client: OpenAI, api: Api, stream: bool) -> None:
    prompt = prompt_of(TOKENS, f"decode has it, {api.name} {stream}")
    ask(bed.decode.url, api, body_for(api, prompt), stream=False)
    assert cached_tokens(client, api, prompt, stream) == 0


@BOTH_WAYS
def test_tokens_that_only_prefill_has_cached_are_reported(bed: Bed, client: OpenAI, api: Api, stream: bool) -> None:
    prompt = prompt_of(TOKENS, f"prefill has it, {api.name} {stream}")
    ask(bed.prefill.url, api, body_for(api, prompt), stream=False)
    assert cached_tokens(client, api, prompt, stream) == IN_FULL_BLOCKS


@BOTH_WAYS
def test_where_both_have_a_part_cached_prefills_number_is_reported(
    bed: Bed, client: OpenAI, api: Api, stream: bool
) -> None:
    """Prefill has the first three blocks cached, decode all of them."""
    prompt = prompt_of(TOKENS, f"both have it, {api.name} {stream}")
    known = prompt.split(" ")[: 3 * BLOCK_SIZE + 1]
    ask(bed.prefill.url, Api.COMPLETIONS, body_for(Api.COMPLETIONS, " ".join(known)), stream=False)
    ask(bed.decode.url, api, body_for(api, prompt), stream=False)
    # A chat's prompt begins with its template, which that completion does not have.
    assert cached_tokens(client, api, prompt, stream) == (3 * BLOCK_SIZE if api is Api.COMPLETIONS else 0)


def test_the_gateways_metrics_count_the_reported_tokens(bed: Bed, gateway: Gateway, client: OpenAI) -> None:
    def counted() -> float:
        return gateway.metrics().get(f'tokens_total{{kind="cached",model="{MODEL_NAME}"}}', 0)

    prompt = prompt_of(TOKENS, "counted")
    before = counted()
    told = [cached_tokens(client, Api.CHAT, prompt, stream=False) for _ in range(2)]
    assert told == [0, IN_FULL_BLOCKS]
    assert counted() == before + IN_FULL_BLOCKS
