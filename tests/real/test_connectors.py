"""Other connectors than NixlConnector, as far as vLLM's CPU build starts them: one pair of engines each.

The pair answers as the single engine did, and decode has not computed the prompts: its metrics show it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from .bed import Bed
from .engines import BLOCK_SIZE, LEASE_SECONDS, Engine, Role, running
from .gateway import Gateway, serving
from .processes import wait_until
from .questions import COMPARED_QUESTIONS, Question

pytestmark = pytest.mark.real

ASKED = [question for question in COMPARED_QUESTIONS if question.tokens in (97, 200, 320)]
EXTERNAL = 'prompt_tokens_by_source_total{source="external_kv_transfer"}'
COMPUTED = 'prompt_tokens_by_source_total{source="local_compute"}'
CACHED = 'prompt_tokens_by_source_total{source="local_cache_hit"}'


@dataclass(frozen=True)
class Pair:
    """Two engines that speak a connector, and a gateway before them."""

    prefill: Engine
    decode: Engine
    gateway: Gateway


@pytest.fixture(scope="module", params=["shared_cache", "nixl_push"])
def pair(
    request: pytest.FixtureRequest, bed: Bed, venv_python: Path, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    logs = tmp_path_factory.mktemp(request.param)
    folder = tmp_path_factory.mktemp("shared")

    def config(role: Role) -> dict[str, object]:
        if request.param == "shared_cache":
            more = {"shared_storage_path": str(folder)}
            return {"kv_connector": "ExampleConnector", "kv_role": "kv_both", "kv_connector_extra_config": more}
        more = {"kv_lease_duration": LEASE_SECONDS, "num_threads": 0}
        push = {"kv_connector": "NixlPushConnector", "kv_role": role.value, "kv_buffer_device": "cpu"}
        return {**push, "kv_connector_extra_config": more}

    # Decode is written to, so its NIXL needs the thread as prefill's does: without it a transfer takes seconds.
    threads = {"NIXL_PROG_THREAD": "1"}
    roles = [Role.PREFILL, Role.DECODE]
    with running(venv_python, model, roles, logs, config=config, more_environment=threads) as (prefill, decode):
        flags = ("--connector", request.param)
        with serving(prefill.url, decode.url, logs / "gateway.log", *flags) as gateway:
            yield Pair(prefill, decode, gateway)


def test_a_pair_answers_as_one_engine_and_decode_computes_no_prompt(bed: Bed, pair: Pair) -> None:
    warm = pair.decode.metrics  # the gateway's own first request may be among them
    wait_until(lambda: warm()[EXTERNAL] > 0, 60, "the warm-up's blocks to reach decode")
    before = pair.decode.metrics()
    tokens = 0
    for question in ASKED:
        answer, headers = question.ask(pair.gateway.url)
        expected = bed.single[question]
        assert (answer.text, answer.finish_reason) == (expected.text, expected.finish_reason), question
        assert answer.usage["completion_tokens"] == expected.usage["completion_tokens"]
        assert "x-pd-proxy-fallback" not in headers
        tokens += answer.usage["prompt_tokens"]

    def found(name: str) -> float:
        return pair.decode.metrics()[name] - before[name]

    wait_until(lambda: sum(map(found, (EXTERNAL, COMPUTED, CACHED))) >= tokens, 10, "decode to have counted all")
    assert found(EXTERNAL) >= _distinct_tokens(ASKED)
    assert found(COMPUTED) <= BLOCK_SIZE * len(ASKED), "whole blocks are found, and the rest of each prompt is computed"


def _distinct_tokens(questions: list[Question]) -> int:
    """Tokens of different prompts in whole blocks: the rest may be in decode's own cache by then."""
    lengths = {(question.api, question.tokens) for question in questions}
    return sum(tokens // BLOCK_SIZE * BLOCK_SIZE - BLOCK_SIZE for _, tokens in lengths)


def test_nothing_stays_held(pair: Pair) -> None:
    for engine in (pair.prefill, pair.decode):
        wait_until(engine.is_idle, LEASE_SECONDS + 10, f"{engine.url} to be idle")
