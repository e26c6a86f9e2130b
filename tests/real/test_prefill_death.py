"""Prefill dies between the legs: decode has an address where nothing answers, and the client still gets its answer. It
also gets it where decode is then lost in mid-answer and no prefill engine is left to compute what it has so far.

It ends the shared prefill engine, so it runs last.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from .bed import Bed
from .gateway import Gateway, serving
from .questions import (
    SEVERED_QUESTIONS,
    SEVERED_TOKENS,
    UNSEEN_QUESTIONS,
    Answer,
    Api,
    Question,
    ask,
    body_for,
    prompt_of,
)
from .relay import relaying
from .severing import Cut, Severing, severing

pytestmark = [pytest.mark.real, pytest.mark.kills_prefill]


@pytest.fixture(scope="module")
def gateway_of_the_dying(bed: Bed, logs: Path) -> Iterator[Gateway]:
    """A gateway whose prefill engine is killed when it has answered as many requests as there are unseen questions.

    The relay holds those answers until the engine is dead, and then passes them on.
    """
    log = logs / "gateway-death.log"
    # Its own warm-up request would be one of the answers that are counted.
    with relaying(bed.prefill.url) as relay, serving(relay.url, bed.decode.url, log, "--warmup", "false") as gateway:
        # Decode then has a connection to prefill, and notices its death at once instead of in a 5 s handshake.
        _, headers = ask(gateway.url, Api.CHAT, body_for(Api.CHAT, prompt_of(50, "before")), stream=False)
        assert "x-pd-proxy-fallback" not in headers
        relay.die_after(len(UNSEEN_QUESTIONS), bed.prefill.kill)
        yield gateway


@pytest.fixture(scope="module")
def decodes(bed: Bed) -> Iterator[Severing]:
    with severing(bed.decode.url, bed.decode.url) as started:  # two backends for a gateway
        yield started


@pytest.fixture(scope="module")
def gateway_of_the_severed(bed: Bed, decodes: Severing, logs: Path) -> Iterator[Gateway]:
    """Another gateway, which connected to prefill before it was killed."""
    with serving(bed.prefill.url, decodes.urls, logs / "gateway-no-prefill.log", "--warmup", "false") as started:
        yield started


@pytest.fixture(scope="module")
def answers(
    gateway_of_the_dying: Gateway, gateway_of_the_severed: Gateway
) -> dict[Question, tuple[Answer, httpx.Headers]]:
    """All questions asked at once, since one engine can die only once."""
    with ThreadPoolExecutor(len(UNSEEN_QUESTIONS)) as pool:
        asked = {question: pool.submit(question.ask, gateway_of_the_dying.url) for question in UNSEEN_QUESTIONS}
        return {question: future.result() for question, future in asked.items()}


@pytest.mark.parametrize("question", UNSEEN_QUESTIONS, ids=str)
def test_the_client_gets_the_single_engines_answer_when_prefill_dies_between_the_legs(
    bed: Bed, answers: dict[Question, tuple[Answer, httpx.Headers]], question: Question
) -> None:
    answer, headers = answers[question]
    assert answer == bed.single[question]
    if not question.stream:
        assert headers.get("x-pd-proxy-fallback"), "served without a hand-off, and the header does not say so"


def test_a_stream_without_a_handoff_names_its_fallback_or_had_begun_with_prefills_token(
    answers: dict[Question, tuple[Answer, httpx.Headers]], gateway_of_the_dying: Gateway
) -> None:
    silent = [headers for _, headers in answers.values() if "x-pd-proxy-fallback" not in headers]
    seen = gateway_of_the_dying.metrics()
    resumed = sum(count for name, count in seen.items() if name.startswith("resumes_total"))
    begun = seen.get('first_tokens_total{reason="exact",source="prefill"}', 0)
    assert len(silent) <= min(resumed, begun)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_requests_are_answered_while_no_prefill_engine_is_up(
    answers: object, gateway_of_the_dying: Gateway, stream: bool
) -> None:
    body = body_for(Api.CHAT, prompt_of(70, f"after-{stream}"))
    answer, headers = ask(gateway_of_the_dying.url, Api.CHAT, body, stream=stream)
    assert answer.usage["completion_tokens"] > 0
    assert headers.get("x-pd-proxy-fallback")


@pytest.mark.parametrize("question", SEVERED_QUESTIONS[:: len(SEVERED_TOKENS)], ids=str)
def test_a_stream_is_continued_while_no_prefill_engine_is_up(
    bed: Bed, answers: object, decodes: Severing, gateway_of_the_severed: Gateway, question: Question
) -> None:
    decodes.plan(Cut(10, into=9), Cut(10))
    answer, headers = question.ask(gateway_of_the_severed.url)
    assert [leg.severed for leg in decodes.legs] == [True, True, False]
    assert answer == bed.single[question]
    assert headers.get("x-pd-proxy-fallback")
