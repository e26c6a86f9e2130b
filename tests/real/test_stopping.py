"""A decode engine is stopped under load, as operators stop it: paused, put to sleep, restarted by SIGTERM.

vLLM then ends running requests with `finish_reason: "abort"`. No client sees that: each answer is the same as without
the stop, each request counts as successful, and the engine gets requests again when it is back.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from .bed import FIRST_CONNECTION_SECONDS, Bed
from .engines import Engine
from .gateway import Gateway, serving
from .processes import wait_until
from .questions import (
    COMPARED_QUESTIONS,
    STOPPED_QUESTIONS,
    Answer,
    Question,
    as_answer,
    as_whole_answer,
    ask,
    events_of,
)

pytestmark = [pytest.mark.real, pytest.mark.restarts_second_decode]

BEGUN = 20
"""Lines that each stream has (every other one is empty) before the engine is stopped."""
MEANWHILE = [question for question in COMPARED_QUESTIONS if question.tokens in (33, 64, 97)]
"""Requests that are sent while the engine is away."""
BACK = Question(STOPPED_QUESTIONS[0].api, stream=True, tokens=200)
ADMIN_KEY = "operators"
BEARER = {"authorization": f"Bearer {ADMIN_KEY}"}
ENDED_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Stop:
    """How an engine is stopped, and how it is started again."""

    name: str
    away: Callable[[Gateway, Engine], object]
    back: Callable[[Gateway, Engine], object]
    gone: bool = False
    """Whether its processes end: on a busy machine before the engine has sent `abort` to all, so that some streams
    are lost."""
    noticed: bool = False
    """Whether the gateway's own probes see it: where they come first, they take the engine out of the rotation, and
    whole answers that wait for their first byte count as lost before the engine's `abort` comes."""

    def __str__(self) -> str:
        return self.name


def pause(_: Gateway, engine: Engine) -> None:
    httpx.post(f"{engine.url}/pause", params={"mode": "abort"}, timeout=30).raise_for_status()


def resume(_: Gateway, engine: Engine) -> None:
    httpx.post(f"{engine.url}/resume", timeout=30).raise_for_status()


def sleep(gateway: Gateway, engine: Engine) -> None:
    operate(gateway, "sleep", backend=engine.url, level="0", drain="0", force="true")


def wake_up(gateway: Gateway, engine: Engine) -> None:
    operate(gateway, "wake_up", backend=engine.url)


def restart(_: Gateway, engine: Engine) -> None:
    engine.group.process.wait(ENDED_SECONDS)
    engine.start_again()


STOPS = (
    Stop("paused", pause, resume),
    Stop("put-to-sleep", sleep, wake_up, noticed=True),
    Stop("sigterm", lambda _, engine: engine.terminate(), restart, gone=True),
)


@dataclass(slots=True)
class Asked:
    """One request, and what its client has read."""

    question: Question
    lines: list[str] = field(default_factory=list)
    begun: Event = field(default_factory=Event)

    @property
    def id(self) -> str:
        return f"stopped-{self.question}"

    def ask(self, url: str) -> None:
        body = self.question.body()
        if self.question.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        headers = {"x-request-id": self.id}
        with httpx.stream("POST", url + self.question.api.value, json=body, headers=headers, timeout=120) as response:
            for line in response.iter_lines():
                self.lines.append(line)
                if len(self.lines) == BEGUN:
                    self.begun.set()
            response.raise_for_status()

    def answer(self) -> Answer:
        if self.question.stream:
            return as_answer(self.question.api, events_of(self.lines))
        return as_whole_answer(self.question.api, json.loads("\n".join(self.lines)))


@dataclass(frozen=True, slots=True)
class Outcome:
    """The answers of clients.

    Attributes:
        stop: how the engine was stopped.
        running: requests that ran on the engine when it was stopped.
        meanwhile: answers while it was away.
        back: the answer of a request that only this engine could take, when it was back.
        lines: the gateway's log line of each request, by the request's id.
        metrics: the gateway's, at the end.
    """

    stop: Stop
    running: dict[Question, Asked]
    meanwhile: dict[Question, Answer]
    back: Answer
    lines: dict[str, dict[str, Any]]
    metrics: dict[str, float]


def operate(gateway: Gateway, path: str, **query: str) -> None:
    answer = httpx.post(f"{gateway.url}/admin/{path}", params=query, headers=BEARER, timeout=60)
    assert answer.status_code == 200, answer.text


def backend(gateway: Gateway, engine: Engine) -> dict[str, Any]:
    name = quote(engine.url, safe="")
    found: dict[str, Any] = httpx.get(f"{gateway.url}/admin/backends/{name}", headers=BEARER, timeout=10).json()
    return found


@pytest.fixture(scope="module", params=STOPS, ids=str)
def outcome(request: pytest.FixtureRequest, bed: Bed, second_decode: Engine, logs: Path) -> Iterator[Outcome]:
    stop: Stop = request.param
    log = logs / f"gateway-{stop}.log"
    flags = ("--admin-key", ADMIN_KEY, "--access-log", "true", "--log-format", "json")
    decodes = [bed.decode.url, second_decode.url]
    other = f"backends/{quote(bed.decode.url, safe='')}"
    with serving(bed.prefill.url, decodes, log, *flags) as gateway, ThreadPoolExecutor(len(STOPPED_QUESTIONS)) as pool:
        operate(gateway, f"{other}/drain")  # so that all requests are on the engine that will be stopped
        asked = {question: Asked(question) for question in STOPPED_QUESTIONS}
        running = [pool.submit(one.ask, gateway.url) for one in asked.values()]
        assert all(one.begun.wait(60) for question, one in asked.items() if question.stream)
        wait_until(lambda: second_decode.metrics()["num_requests_running"] == len(asked), 30, "all to run there")
        operate(gateway, f"{other}/undrain")

        stop.away(gateway, second_decode)
        for future in running:
            future.result(timeout=120)
        meanwhile = {question: question.ask(gateway.url)[0] for question in MEANWHILE}

        stop.back(gateway, second_decode)
        wait_until(lambda: backend(gateway, second_decode)["state"] in ("up", "slow_start"), 30, "it to be back")
        operate(gateway, f"{other}/drain")
        tokens = second_decode.metrics()["generation_tokens_total"]
        back, _ = ask(gateway.url, BACK.api, BACK.body(), stream=BACK.stream, timeout=FIRST_CONNECTION_SECONDS)
        assert second_decode.metrics()["generation_tokens_total"] > tokens
        metrics = gateway.metrics()
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    by_id = {line["id"]: line for line in lines if "outcome" in line}
    yield Outcome(stop, asked, meanwhile, back, by_id, metrics)


@pytest.mark.parametrize("question", STOPPED_QUESTIONS, ids=str)
def test_an_answer_is_the_single_engines_although_its_engine_was_stopped(
    bed: Bed, outcome: Outcome, question: Question
) -> None:
    assert outcome.running[question].answer() == bed.single[question]


def test_no_client_sees_abort(outcome: Outcome) -> None:
    assert not [line for asked in outcome.running.values() for line in asked.lines if '"abort"' in line]


@pytest.mark.parametrize("question", STOPPED_QUESTIONS, ids=str)
def test_each_stopped_request_was_continued_once_and_its_log_line_says_so(outcome: Outcome, question: Question) -> None:
    line = outcome.lines[outcome.running[question].id]
    assert (line["outcome"], line["status"]) == ("ok", 200)
    assert (line.get("resumes", 0), line.get("retries", 0)) == ((1, 0) if question.stream else (0, 1))


def test_each_stopped_request_is_counted_as_successful_elsewhere(outcome: Outcome) -> None:
    def counted(name: str) -> dict[str, float]:
        return {series: value for series, value in outcome.metrics.items() if series.startswith(name) and value}

    streams = sum(question.stream for question in STOPPED_QUESTIONS)
    resumes, retries = counted("resumes_total"), counted("retries_total")
    assert sum(resumes.values()) == streams
    assert sum(retries.values()) == len(STOPPED_QUESTIONS) - streams
    if not outcome.stop.gone:
        assert list(resumes) == ['resumes_total{reason="aborted"}']
        reasons = ("aborted", "lost") if outcome.stop.noticed else ("aborted",)
        assert retries.keys() <= {f'retries_total{{leg="decode",reason="{reason}"}}' for reason in reasons}
        assert any('reason="leaving"' in series for series in counted("backend_ejections_total"))
    ended = counted("requests_total")
    assert ended and all('outcome="ok"' in series for series in ended), ended
    assert sum(ended.values()) == len(STOPPED_QUESTIONS) + len(MEANWHILE) + 1


def test_requests_are_answered_while_the_engine_is_away(bed: Bed, outcome: Outcome) -> None:
    assert outcome.meanwhile == {question: bed.single[question] for question in MEANWHILE}


def test_the_engine_gets_requests_again_when_it_is_back(bed: Bed, outcome: Outcome) -> None:
    assert outcome.back == bed.single[BACK]


def test_nothing_is_left_in_flight_when_the_engine_is_back(bed: Bed, second_decode: Engine, outcome: Outcome) -> None:
    assert outcome.metrics["handoffs_pending"] == 0
    for engine in (bed.prefill, bed.decode, second_decode):
        wait_until(engine.is_idle, 10, f"the {engine.role.name.lower()} engine at {engine.url} to be idle")
