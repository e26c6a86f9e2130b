"""The engines of one test run: a pair, a second decode engine where a test needs one, and the answers of a single
engine for comparison."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from .engines import Engine
from .questions import Answer, Api, Question, ask, body_for, prompt_of

FIRST_CONNECTION_SECONDS = 90.0
"""Decode's first connection to a prefill engine takes milliseconds as a rule, and sometimes half a minute (UCX)."""


@dataclass(frozen=True, slots=True)
class Bed:
    """The engines of a test run, and what an engine without a connector answered before it was stopped."""

    prefill: Engine
    decode: Engine
    second_decode: Engine | None
    """For tests that break one decode engine while the other must take over."""
    single: Mapping[Question, Answer]


def hand_off_by_hand(prefill: Engine, decode: Engine, api: Api, body: dict[str, Any], timeout: float = 60) -> Answer:
    """The two legs without a gateway, as in vLLM's documentation."""
    prefill_leg = {
        **body,
        "max_tokens": 1,
        "kv_transfer_params": {"do_remote_decode": True, "do_remote_prefill": False},
    }
    prefilled = httpx.post(prefill.url + api.value, json=prefill_leg, timeout=timeout).raise_for_status().json()
    decode_leg = {**body, "kv_transfer_params": prefilled["kv_transfer_params"]}
    return ask(decode.url, api, decode_leg, stream=False, timeout=timeout)[0]


def connect(prefill: Engine, decode: Engine) -> None:
    """Make the pair's first connection now, so that no test has to wait for it."""
    body = body_for(Api.COMPLETIONS, prompt_of(40, "first"))
    hand_off_by_hand(prefill, decode, Api.COMPLETIONS, body, FIRST_CONNECTION_SECONDS)
