"""A decode engine hangs in the middle of a stream: the gateway abandons it, and the client gets its answer from
another."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from .bed import Bed
from .engines import Engine
from .gateway import serving
from .processes import wait_until
from .questions import HUNG_QUESTIONS, Question, as_answer, events, streaming
from .severing import severing

pytestmark = pytest.mark.real

BEFORE = 20
"""Events that the client gets before the engine hangs."""

Hang = Callable[[Engine], AbstractContextManager[None]]
COMPUTATION: tuple[Hang, list[str], str] = (Engine.frozen, ["--timeouts.idle", "2"], "timeout")
"""Its API server still answers probes: only the stream's silence shows the hang."""
ALL_OF_IT: tuple[Hang, list[str], str] = (
    Engine.suspended,
    ["--health.interval", "0.3", "--health.timeout", "0.5"],
    "lost",
)
"""Probes fail, and then a second of the stream's silence is enough."""


@pytest.mark.parametrize(
    ("question", "how"),
    [(HUNG_QUESTIONS[0], COMPUTATION), (HUNG_QUESTIONS[1], COMPUTATION), (HUNG_QUESTIONS[0], ALL_OF_IT)],
    ids=["chat-computation", "completions-computation", "chat-all-of-it"],
)
def test_a_stream_whose_engine_hangs_goes_on_as_the_single_engines_answer(
    bed: Bed, second_decode: Engine, logs: Path, question: Question, how: tuple[Hang, list[str], str]
) -> None:
    hang, flags, reason = how
    engines = {engine.url: engine for engine in (bed.decode, second_decode)}
    log = logs / f"gateway-hang-{reason}-{question.api.name.lower()}.log"
    with (
        severing(*engines) as relays,
        serving(bed.prefill.url, relays.urls, log, "--warmup", "false", *flags) as gateway,
    ):
        with streaming(gateway.url, question.api, question.body()) as response:
            stream = events(response)
            received = [next(stream) for _ in range(BEFORE)]
            (leg,) = relays.legs
            with hang(engines[leg.engine]):
                received += stream
        assert as_answer(question.api, received) == bed.single[question]
        assert [leg.engine for leg in relays.legs] == [leg.engine, *(url for url in engines if url != leg.engine)]
        assert gateway.metrics()[f'resumes_total{{reason="{reason}"}}'] == 1
        # The gateway has closed its connection to the engine that hung, so it has nothing to do when it runs again.
        for engine in (bed.prefill, *engines.values()):
            wait_until(engine.is_idle, 10, f"the {engine.role.name.lower()} engine at {engine.url} to be idle")
