"""The KV cache is really transferred: equal answers alone could also come from a decode engine that computes the
prompt."""

from __future__ import annotations

import pytest

from .bed import Bed
from .gateway import Gateway
from .processes import wait_until
from .questions import Api, ask, body_for, prompt_of

pytestmark = pytest.mark.real

PULLED = 'prompt_tokens_by_source_total{source="external_kv_transfer"}'
AHEAD = 'first_tokens_total{reason="exact",source="prefill"}'
COMPUTED = 'prompt_tokens_by_source_total{source="local_compute"}'


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("api", Api, ids=lambda api: api.name.lower())
def test_decode_pulls_every_prompt_token_and_computes_none(bed: Bed, gateway: Gateway, api: Api, stream: bool) -> None:
    before, prefill_before = bed.decode.metrics(), bed.prefill.metrics()
    ahead = gateway.metrics().get(AHEAD, 0)
    prompts = [prompt_of(tokens, f"pulled-{stream}") for tokens in (40, 96, 300)]
    answers = [ask(gateway.url, api, body_for(api, prompt), stream=stream)[0] for prompt in prompts]
    tokens = sum(answer.usage["prompt_tokens"] for answer in answers)
    tokens += int(gateway.metrics().get(AHEAD, 0) - ahead)  # a first token from prefill is a part of decode's prompt

    wait_until(lambda: bed.decode.metrics()[PULLED] >= before[PULLED] + tokens, 5, "decode to count the tokens pulled")
    after, prefill_after = bed.decode.metrics(), bed.prefill.metrics()
    assert after[PULLED] - before[PULLED] == tokens
    assert after[COMPUTED] == before[COMPUTED]
    assert prefill_after[COMPUTED] > prefill_before[COMPUTED]


def test_no_block_stays_held_once_the_answers_are_given(bed: Bed, gateway: Gateway) -> None:
    for salt in ("a", "b", "c"):
        ask(gateway.url, Api.CHAT, body_for(Api.CHAT, prompt_of(200, salt)), stream=True)
    # Less than the lease: prefill must have been notified by decode, and not by its own clock.
    wait_until(bed.prefill.is_idle, 10, "prefill to free the blocks that decode has pulled")
    wait_until(bed.decode.is_idle, 10, "decode to free the blocks of finished requests")
