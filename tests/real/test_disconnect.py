"""A client that disconnects stops the engines' work and frees their KV blocks, wherever the request was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from .bed import Bed
from .engines import BATCHED_TOKENS, MAX_MODEL_LEN
from .gateway import Gateway, serving
from .processes import wait_until
from .questions import Api, asked, body_for, events, prompt_of
from .relay import relaying

pytestmark = pytest.mark.real

MANY_TOKENS = 1800
"""About six seconds of decoding: enough time to disconnect."""
FREED_SECONDS = 10.0
"""Less than prefill's lease of 30 s, after which blocks are freed whatever the gateway does."""


def endless_body(api: Api, salt: str) -> dict[str, Any]:
    return body_for(api, prompt_of(100, salt), max_tokens=MANY_TOKENS, ignore_eos=True)


def wait_until_freed(bed: Bed) -> None:
    wait_until(bed.decode.is_idle, FREED_SECONDS, "decode to drop the request and free its blocks")
    wait_until(bed.prefill.is_idle, FREED_SECONDS, "prefill to drop the request and free its blocks")


def generated_tokens(bed: Bed) -> float:
    return bed.decode.metrics()["generation_tokens_total"]


@pytest.mark.parametrize("api", Api, ids=lambda api: api.name.lower())
def test_a_client_that_leaves_a_stream_ends_the_decoding(bed: Bed, gateway: Gateway, api: Api) -> None:
    before = generated_tokens(bed)
    body = {**endless_body(api, "left"), "stream": True}
    with httpx.stream("POST", gateway.url + api.value, json=body, timeout=30) as response:
        assert response.status_code == 200
        received = events(response)
        for _ in range(5):
            next(received)
    wait_until_freed(bed)
    assert generated_tokens(bed) - before < MANY_TOKENS


@pytest.mark.parametrize("api", Api, ids=lambda api: api.name.lower())
def test_a_client_that_stops_waiting_for_a_whole_answer_ends_the_decoding(bed: Bed, gateway: Gateway, api: Api) -> None:
    before = generated_tokens(bed)
    with asked(gateway.url, api, endless_body(api, "unwaited")):
        wait_until(lambda: generated_tokens(bed) > before, 20, "decode to begin")
    wait_until_freed(bed)
    assert generated_tokens(bed) - before < MANY_TOKENS


@pytest.mark.parametrize("api", Api, ids=lambda api: api.name.lower())
def test_a_client_that_leaves_during_prefill_ends_the_prefill(bed: Bed, logs: Path, api: Api) -> None:
    decoded = generated_tokens(bed)
    prompt = prompt_of(MAX_MODEL_LEN - 200, "abandoned")
    assert len(prompt.split()) > 3 * BATCHED_TOKENS  # several steps: after the thaw one may finish, but never all
    with (
        relaying(bed.prefill.url) as relay,
        # Without the gateway's own warm-up request the first leg is the client's.
        serving(
            relay.url, bed.decode.url, logs / f"gateway-prefill-{api.name.lower()}.log", "--warmup", "false"
        ) as gateway,
    ):
        # Frozen, so that prefill is computing until the client has disconnected.
        with bed.prefill.frozen():
            with asked(gateway.url, api, {**body_for(api, prompt), "stream": True}):
                wait_until(lambda: bool(relay.legs), 20, "the prefill leg to leave the gateway")
            wait_until(lambda: relay.legs[0].abandoned, 5, "the gateway to close its prefill leg")
        wait_until_freed(bed)
    assert not relay.legs[0].answered
    assert generated_tokens(bed) == decoded
