"""Two real prefill engines with prefix caches: sessions find in them nearly as much as in one engine for all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from .bed import Bed, connect
from .engines import BLOCK_SIZE, MODEL_NAME, Engine, Role, running
from .gateway import serving
from .questions import Answer, Api, as_whole_answer, ask, prompt_of

pytestmark = pytest.mark.real

SESSIONS = 5
TURNS = 6
FIRST_TOKENS = 400
TURN_TOKENS = 130
"""Few compared with what a session's engine has of it, so that no session moves because of noise in the learnt
speeds of the engines on a busy machine."""
ANSWER_TOKENS = 16
CLOSE = 0.03
"""The share of all prompt tokens by which the engines may find less than one with an endless cache."""


@dataclass
class Session:
    """A chat that continues from its own answers."""

    messages: list[dict[str, str]]
    bodies: list[dict[str, Any]] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    cached: int = 0
    """Prompt tokens that its answers reported as cached."""

    def go_on(self, url: str, said: str) -> None:
        """Send one more turn."""
        self.messages.append({"role": "user", "content": said})
        body = {"model": MODEL_NAME, "temperature": 0, "max_tokens": ANSWER_TOKENS, "messages": [*self.messages]}
        told = httpx.post(url + Api.CHAT.value, json=body, timeout=60).raise_for_status().json()
        self.cached += (told["usage"]["prompt_tokens_details"] or {}).get("cached_tokens") or 0
        self.bodies.append(body)
        self.answers.append(as_whole_answer(Api.CHAT, told))
        self.messages.append({"role": "assistant", "content": self.answers[-1].text})


def hold(url: str, salt: str) -> list[Session]:
    """Run several sessions, turn by turn. Another salt leads to other words, which no engine has cached.

    They begin at the same time, so that both prefill engines get some. Then one continues after the other: the tiny
    model prefills in some milliseconds, so behind another request it would be right to compute everything again on the
    idle engine.
    """
    systems = [prompt_of(FIRST_TOKENS, f"{salt} {number}") for number in range(SESSIONS)]
    sessions = [Session([{"role": "system", "content": system}]) for system in systems]
    for turn in range(TURNS):
        said = [prompt_of(TURN_TOKENS, f"{salt} {number} {turn}") for number in range(SESSIONS)]
        with ThreadPoolExecutor(1 if turn else SESSIONS) as pool:
            list(pool.map(lambda session, words: session.go_on(url, words), sessions, said))
    return sessions


def in_turn(sessions: Sequence[Session]) -> list[dict[str, Any]]:
    """The requests in the order in which they were sent."""
    return [session.bodies[turn] for turn in range(TURNS) for session in sessions]


def tokens_of(engine: Engine, body: dict[str, Any]) -> list[int]:
    """A chat's prompt, as engines tokenize it."""
    asked = {"model": MODEL_NAME, "messages": body["messages"]}
    tokens: list[int] = httpx.post(f"{engine.url}/tokenize", json=asked, timeout=60).raise_for_status().json()["tokens"]
    return tokens


def ideal(prompts: Iterable[list[int]]) -> float:
    """The share of the prompts' tokens that one engine with an endless cache would have found."""
    kept: set[tuple[int, ...]] = set()
    found = total = 0
    for prompt in prompts:
        blocks = [tuple(prompt[:end]) for end in range(BLOCK_SIZE, len(prompt) + 1, BLOCK_SIZE)]
        # The last token is computed in any case, since the next one is drawn from it.
        found += BLOCK_SIZE * sum(block in kept for block in blocks if len(block) < len(prompt))
        total += len(prompt)
        kept.update(blocks)
    return found / total


@pytest.fixture(scope="module")
def prefills(bed: Bed, venv_python: Path, model: Path, logs: Path) -> Iterator[list[Engine]]:
    """The bed's prefill engine, and another one."""
    folder = logs / "second-prefill"
    folder.mkdir()
    with running(venv_python, model, [Role.PREFILL], folder) as (second,):
        connect(second, bed.decode)
        yield [bed.prefill, second]


@dataclass
class Held:
    """The result of sessions with one policy.

    Attributes:
        each: prompt tokens that each prefill engine was asked for.
        rate: the share of the prompts' tokens that prefill engines found in their caches, by their own counters.
        ideal: the share that one engine with an endless cache would have found.
    """

    sessions: list[Session]
    each: list[float]
    rate: float
    ideal: float


def held(bed: Bed, prefills: Sequence[Engine], log: Path, policy: str) -> Held:
    def counted(series: str) -> list[float]:
        return [engine.metrics()[f"prefix_cache_{series}_total"] for engine in prefills]

    # No other prompt is computed: no hand-off to try a pair out, no prefill on decode.
    flags = ("--warmup", "false", "--fallback", "reject", "--policy.prefill", policy)
    first, second = prefills
    with serving(first.url, bed.decode.url, log, "--prefill", second.url, *flags) as gateway:
        before = counted("hits"), counted("queries")
        sessions = hold(gateway.url, policy)
        hits, queries = (
            [now - then for now, then in zip(counted(series), counts, strict=True)]
            for series, counts in zip(("hits", "queries"), before, strict=True)
        )
    prompts = [tokens_of(bed.decode, body) for body in in_turn(sessions)]
    assert sum(queries) == sum(map(len, prompts)), "prompts that were computed elsewhere, or twice"
    assert sum(hits) == sum(session.cached for session in sessions), "clients are told something else"
    return Held(sessions, queries, sum(hits) / sum(queries), ideal(prompts))


def test_sessions_find_cached_what_one_engine_would_have_kept(bed: Bed, prefills: list[Engine], logs: Path) -> None:
    it = held(bed, prefills, logs / "gateway-auto.log", "auto")
    assert all(it.each), "one engine has served all"
    assert it.rate >= it.ideal - CLOSE, f"{it.rate:.3f} of {it.ideal:.3f}"

    def alone(body: dict[str, Any]) -> Answer:
        # With a salt nothing of it is in the engine's cache: what was handed over is not read again.
        return ask(bed.decode.url, Api.CHAT, {**body, "cache_salt": "alone"}, stream=False)[0]

    with ThreadPoolExecutor(4) as pool:
        expected = list(pool.map(alone, in_turn(it.sessions)))
    assert [session.answers[turn] for turn in range(TURNS) for session in it.sessions] == expected


def test_with_placement_by_load_alone_sessions_find_much_less_cached(
    bed: Bed, prefills: list[Engine], logs: Path
) -> None:
    it = held(bed, prefills, logs / "gateway-least-loaded.log", "least_loaded")
    assert it.rate < it.ideal - 2 * CLOSE, f"{it.rate:.3f} of {it.ideal:.3f}"
