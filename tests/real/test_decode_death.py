"""A decode engine is killed while it streams: no request fails, and every answer is the same as without the kill.

It ends the second decode engine, so it runs after all other tests that need it.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from .bed import Bed
from .engines import Engine
from .gateway import Gateway, serving
from .processes import wait_until
from .questions import KILLED_QUESTIONS, Answer, Api, Question, as_answer, ask, body_for, events, prompt_of, streaming

pytestmark = [pytest.mark.real, pytest.mark.kills_second_decode]

STREAMED = [question for question in KILLED_QUESTIONS if question.stream]
EVENLY = ("--warmup", "false", "--policy.decode", "least_loaded")
"""So that the engine which dies has its share: `auto` sends more to the one that was faster so far."""
WAVES = 4
APART = 20
"""Events that each stream of a wave has before the next wave starts, so that the engine dies at many positions in a
stream."""


@dataclass(slots=True)
class Asked:
    """One stream: what was received of it, and how far it was when the engine died."""

    question: Question
    received: list[dict[str, Any]] = field(default_factory=list)
    underway: Event = field(default_factory=Event)
    at_the_kill: int = 0

    def ask(self, url: str) -> None:
        with streaming(url, self.question.api, self.question.body()) as response:
            for event in events(response):
                self.received.append(event)
                if len(self.received) == APART:
                    self.underway.set()


@dataclass(frozen=True, slots=True)
class Outcome:
    streams: dict[Question, Asked]
    whole: dict[Question, Answer]
    resumed: float


@pytest.fixture(scope="module")
def gateway_of_two(bed: Bed, second_decode: Engine, logs: Path) -> Iterator[Gateway]:
    urls = [bed.decode.url, second_decode.url]
    with serving(bed.prefill.url, urls, logs / "gateway-decode-death.log", *EVENLY) as started:
        yield started


@pytest.fixture(scope="module")
def outcome(gateway_of_two: Gateway, second_decode: Engine) -> Outcome:
    """All questions asked in four waves, the whole ones with the first, since one engine can die only once."""
    with ThreadPoolExecutor(len(KILLED_QUESTIONS)) as pool:
        whole = {
            question: pool.submit(question.ask, gateway_of_two.url)
            for question in KILLED_QUESTIONS
            if not question.stream
        }
        streams = [Asked(question) for question in STREAMED]
        running = []
        for wave in range(WAVES):
            now = streams[wave::WAVES]
            running += [pool.submit(stream.ask, gateway_of_two.url) for stream in now]
            assert all(stream.underway.wait(60) for stream in now)
        for stream in streams:
            stream.at_the_kill = len(stream.received)
        second_decode.kill()
        for future in running:
            future.result(timeout=60)
        answers = {question: future.result(timeout=60)[0] for question, future in whole.items()}
    metrics = gateway_of_two.metrics()
    resumed = sum(value for name, value in metrics.items() if name.startswith("resumes_total"))
    return Outcome({stream.question: stream for stream in streams}, answers, resumed)


@pytest.mark.parametrize("question", STREAMED, ids=str)
def test_a_stream_is_the_single_engines_answer_although_an_engine_died(
    bed: Bed, outcome: Outcome, question: Question
) -> None:
    stream = outcome.streams[question].received
    assert as_answer(question.api, stream) == bed.single[question]
    assert len({(event["id"], event["created"], event["model"]) for event in stream}) == 1


@pytest.mark.parametrize("question", [question for question in KILLED_QUESTIONS if not question.stream], ids=str)
def test_a_whole_answer_is_the_single_engines_although_an_engine_died(
    bed: Bed, outcome: Outcome, question: Question
) -> None:
    assert outcome.whole[question] == bed.single[question]


def test_streams_of_both_kinds_were_cut_at_many_places(outcome: Outcome) -> None:
    """Without such cuts, the tests above would show nothing."""
    cut_at = {question: asked.at_the_kill for question, asked in outcome.streams.items()}
    running = [question for question, events_then in cut_at.items() if events_then < question.length * 0.9]
    assert {question.api for question in running} == set(Api)
    assert len({cut_at[question] for question in running}) >= WAVES
    assert outcome.resumed >= 3


def test_nothing_is_left_in_flight_when_an_engine_has_died(bed: Bed, gateway_of_two: Gateway, outcome: Outcome) -> None:
    wait_until(bed.prefill.is_idle, 10, "prefill to hold no block")
    wait_until(bed.decode.is_idle, 10, "decode to hold no block")
    assert gateway_of_two.metrics()["handoffs_pending"] == 0


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_requests_are_answered_by_the_engine_that_is_left(
    bed: Bed, gateway_of_two: Gateway, outcome: Outcome, stream: bool
) -> None:
    body = body_for(Api.CHAT, prompt_of(70, f"left-{stream}"))
    answer, headers = ask(gateway_of_two.url, Api.CHAT, body, stream=stream)
    assert answer == ask(bed.prefill.url, Api.CHAT, body, stream=stream)[0]
    assert "x-pd-proxy-fallback" not in headers
