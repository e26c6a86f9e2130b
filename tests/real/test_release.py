"""Blocks that prefill keeps for a decode leg that never comes are freed at once, and no engine reads them after that.

Prefill would free them by itself when its lease of 30 s ends, and would count that. Decode's prefix cache is at risk
too:
an engine that reads blocks which are no longer the prompt's keeps them, and then answers wrong for as long as it has
them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from .bed import Bed
from .engines import LEASE_SECONDS, MAX_MODEL_LEN, MODEL_NAME
from .gateway import Gateway, serving
from .processes import wait_until
from .questions import RELEASED_QUESTIONS, Api, Question, ask, asked, body_for, prompt_of
from .severing import Severing, severing

pytestmark = pytest.mark.real

PREFILLED = 'request_success_total{finished_reason="length"}'
RELEASED_SECONDS = 10.0
"""A release takes 0.1 s, and 1 to 4 s where the kernel has to repeat a connect; an idle machine is not assumed."""
PROMPT = prompt_of(150, "refused elsewhere")
TOO_MANY = MAX_MODEL_LEN * 2
NAMED = {"model": MODEL_NAME, "messages": [{"role": "user", "content": PROMPT}]}
REFUSED_ELSEWHERE: dict[str, tuple[str, dict[str, Any]]] = {
    "a streamed chat": (Api.CHAT.value, {**NAMED, "max_tokens": TOO_MANY, "stream": True}),
    "a streamed completion": (
        Api.COMPLETIONS.value,
        {"model": MODEL_NAME, "prompt": PROMPT, "max_tokens": TOO_MANY, "stream": True},
    ),
    "a message": ("/v1/messages", {**NAMED, "max_tokens": TOO_MANY}),
    "a streamed message": ("/v1/messages", {**NAMED, "max_tokens": TOO_MANY, "stream": True}),
    "a response": ("/v1/responses", {"model": MODEL_NAME, "input": PROMPT, "max_output_tokens": TOO_MANY}),
    "a streamed response": (
        "/v1/responses",
        {"model": MODEL_NAME, "input": PROMPT, "max_output_tokens": TOO_MANY, "stream": True},
    ),
}
AFTER_EXPIRY = "nixl_num_notifications_after_expiry_total"
NOT_HELD = "Potentially invalid KV blocks"
"""What prefill logs, and counts as `AFTER_EXPIRY`, when it is notified of blocks that it no longer holds. This is
its only sign that decode has read blocks which were another request's by then."""
CACHE_TOKENS = 32 * 1024
"""The number of tokens that fit into 64 MiB of KV cache."""

JUDGED_BY_THE_HANDLER: dict[str, dict[str, Any]] = {
    "more tokens than the context holds": {"max_tokens": MAX_MODEL_LEN * 2},
    "min_tokens above max_tokens": {"min_tokens": 9, "max_tokens": 3},
    "an invalid grammar": {"structured_outputs": {"regex": "(("}},
}
"""Requests for which vLLM itself notifies prefill that the blocks will not be fetched."""
JUDGED_BEFORE_THE_HANDLER: dict[str, dict[str, Any]] = {
    "stop tokens that are no numbers": {"stop_token_ids": ["x"]},
    "a negative number of log probabilities": {"logprobs": -3},
    "stream options without a stream": {"stream_options": {"include_usage": True}},
}
"""Requests that vLLM refuses with the body's schema, without a notification."""
REFUSED_BY_PREFILL: dict[str, dict[str, Any]] = {
    "a negative temperature": {"temperature": -1},
    "top_p above 1": {"top_p": 2},
    "a temperature that is no number": {"temperature": "x"},
}
"""Requests that both engines would refuse, so that there is nothing to hand over."""
REFUSED_BY_DECODE_ALONE = JUDGED_BY_THE_HANDLER | JUDGED_BEFORE_THE_HANDLER


@pytest.fixture(scope="module")
def relay(bed: Bed) -> Iterator[Severing]:
    """Relays that sever nothing: they show which legs decode was sent, and can hold them up."""
    with severing(bed.decode.url) as started:
        yield started


@pytest.fixture(scope="module")
def watched_gateway(bed: Bed, relay: Severing, logs: Path) -> Iterator[Gateway]:
    # Nothing detects that decode is unreachable while a client waits between the legs: no probe, no connect.
    # (With a first token from prefill, that engine would refuse what only decode is to refuse here.)
    flags = ["--first-token", "decode", "--warmup", "false", "--health.interval", "60", "--timeouts.connect", "30"]
    with serving(bed.prefill.url, relay.urls, logs / "gateway-release.log", *flags) as started:
        yield started


def wait_until_released(bed: Bed) -> None:
    assert RELEASED_SECONDS < LEASE_SECONDS / 2
    wait_until(lambda: is_released(bed), RELEASED_SECONDS, "prefill's blocks to be free")
    wait_until(bed.decode.is_idle, RELEASED_SECONDS, "decode to be idle")
    assert bed.prefill.metrics()["nixl_num_kv_expired_reqs_total"] == 0  # neither did those of any earlier test


def is_released(bed: Bed) -> bool:
    """Whether prefill holds no block. Where it does, decode is given a request to compute.

    Decode has no progress thread here (small_machine.py), so its notification sometimes waits for its next step.
    """
    if bed.prefill.is_idle():
        return True
    ask(bed.decode.url, Api.COMPLETIONS, body_for(Api.COMPLETIONS, "Kana", max_tokens=1), stream=False)
    return False


def assert_prefill_was_told_once(bed: Bed, gateway: Gateway, before: dict[str, float], logged: int) -> None:
    """Since its metrics and its log's length were read, prefill has not been notified of blocks that were free
    already."""
    # Its counters are those of its last step, and it counts in a step in which it frees a hand-off.
    ask(gateway.url, Api.CHAT, body_for(Api.CHAT, prompt_of(40, f"after {logged}")), stream=False)
    wait_until_released(bed)
    assert NOT_HELD not in bed.prefill.group.logged(logged)
    assert bed.prefill.metrics()[AFTER_EXPIRY] == before[AFTER_EXPIRY]


def holds_blocks_for_decode(bed: Bed) -> bool:
    now = bed.prefill.metrics()
    return now["kv_cache_usage_perc"] > 0 and not now["num_requests_running"]


def assert_decode_knows_the_prompt_rightly(bed: Bed, question: Question) -> None:
    """Asked directly, so that its answer comes from the content of its prefix cache."""
    assert question.ask(bed.decode.url)[0] == bed.single[question]


@pytest.mark.parametrize("question", RELEASED_QUESTIONS, ids=str)
def test_a_client_that_leaves_between_the_legs_leaves_no_blocks_behind(
    bed: Bed, relay: Severing, watched_gateway: Gateway, question: Question
) -> None:
    with relay.unreachable(), asked(watched_gateway.url, question.api, question.body()):
        wait_until(lambda: holds_blocks_for_decode(bed), 20, "prefill to keep the blocks for decode")
    wait_until_released(bed)
    wait_until(lambda: watched_gateway.metrics()["handoffs_pending"] == 0, 5, "the gateway to have no hand-off left")
    assert_decode_knows_the_prompt_rightly(bed, question)


@pytest.mark.parametrize("fault", REFUSED_BY_DECODE_ALONE | REFUSED_BY_PREFILL)
@pytest.mark.parametrize("api", Api, ids=lambda api: api.name.lower())
def test_a_request_that_an_engine_refuses_leaves_no_blocks_behind(
    bed: Bed, relay: Severing, watched_gateway: Gateway, api: Api, fault: str
) -> None:
    before, logged = bed.prefill.metrics(), len(bed.prefill.group.log.read_bytes())
    relay.plan()
    body = {**body_for(api, prompt_of(150, fault)), **(REFUSED_BY_DECODE_ALONE | REFUSED_BY_PREFILL)[fault]}
    assert httpx.post(watched_gateway.url + api.value, json=body, timeout=30).status_code == 400
    decodes = fault in REFUSED_BY_DECODE_ALONE
    assert bool(relay.legs) == decodes, "decode was asked" if relay.legs else "decode was not asked"
    wait_until_released(bed)
    assert bed.prefill.metrics()[PREFILLED] == before[PREFILLED] + decodes
    assert_prefill_was_told_once(bed, watched_gateway, before, logged)


@pytest.mark.parametrize("what", REFUSED_ELSEWHERE)
def test_a_refused_request_on_another_endpoint_leaves_no_blocks_behind(
    bed: Bed, relay: Severing, watched_gateway: Gateway, what: str
) -> None:
    before, logged = bed.prefill.metrics(), len(bed.prefill.group.log.read_bytes())
    relay.plan()
    path, body = REFUSED_ELSEWHERE[what]
    answer = httpx.post(watched_gateway.url + path, json=body, timeout=30)
    assert answer.status_code == 400, answer.text
    assert relay.legs, "decode was not asked"
    wait_until_released(bed)
    assert_prefill_was_told_once(bed, watched_gateway, before, logged)


@pytest.mark.parametrize("fault", ["min_tokens above max_tokens", "an invalid grammar"])
def test_blocks_that_decode_released_itself_are_read_by_no_request(
    bed: Bed, relay: Severing, watched_gateway: Gateway, fault: str
) -> None:
    """A request that comes after that would read another request's keys and values, and decode would keep them.

    Here prefill's whole cache is reused before the gateway's release request, if there is one, reaches decode.
    """
    api = Api.COMPLETIONS
    prompt = prompt_of(320, f"given back, {fault}")
    plain = body_for(api, prompt)

    def use_the_cache_anew(predecessors: int) -> None:
        if predecessors == 1:
            length = MAX_MODEL_LEN - 48
            for number in range(CACHE_TOKENS // length + 1):
                other = body_for(api, prompt_of(length, f"{fault} {number}"), max_tokens=1)
                ask(bed.prefill.url, api, other, stream=False)

    relay.plan(before=use_the_cache_anew)
    answer = httpx.post(watched_gateway.url + api.value, json={**plain, **JUDGED_BY_THE_HANDLER[fault]}, timeout=30)
    assert answer.status_code == 400
    wait_until(lambda: watched_gateway.metrics()["handoffs_pending"] == 0, 30, "the gateway to be rid of the hand-off")
    relay.plan()
    wait_until_released(bed)
    undisturbed, _ = ask(bed.prefill.url, api, plain, stream=False)
    assert ask(bed.decode.url, api, plain, stream=False)[0] == undisturbed
