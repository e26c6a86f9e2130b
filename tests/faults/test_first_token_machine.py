"""Engines join, restart and come back with other block sizes in any order, at any moment, while requests run: no decode
engine is ever made to go on behind a first token with blocks that are too few, or not what was learnt of them.

A simulator dies of it as vLLM does. (An ordinary hand-off between engines with unlike blocks kills one too, whoever is
in front of them; what is looked at here is each leg that decode is given, and only those behind a first token.)
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, ExitStack
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from pd_proxy_simulator.engine import Engine
from pd_proxy_simulator.sequences import Sequence

from tests.faults import bed as beds
from tests.faults.bed import Bed, Heard
from tests.faults.clock import virtual_time

SIZES = st.sampled_from([8, 16, 16, 32])
MOMENTS = st.sampled_from([0.0, 0.003, 0.01, 0.03, 0.1, 1.2])
NUMBERS = st.integers(0, 3)


class FirstTokenMachine(RuleBasedStateMachine):
    """A fleet whose engines are not what they were a moment ago."""

    def __init__(self) -> None:
        super().__init__()
        self.ahead = 0
        self.unsafe: list[str] = []
        self._exit = ExitStack()
        self._runner = self._exit.enter_context(virtual_time())
        self._exit.enter_context(mock.patch.object(Engine, "_load", self._looking(Engine._load)))
        self._open = AsyncExitStack()
        self.clients: list[asyncio.Task[Heard]] = []
        self.bed: Bed = self._runner.run(self._open.enter_async_context(beds.made()))

    def _looking(self, load: Any) -> Any:
        def loads(engine: Engine, sequence: Sequence) -> None:
            remote = sequence.transfer.params
            assert remote is not None
            handed = remote.params.get("remote_num_tokens")
            if isinstance(handed, int) and sequence.prompt_length > handed:
                self.ahead += 1
                have = len(remote.block_ids[0])
                need = -(-sequence.prompt_length // engine.config.block_size)
                if sequence.prompt_length != handed + 1 or need != have:
                    self.unsafe.append(f"{sequence.prompt_length} tokens need {need} blocks, and there are {have}")
            load(engine, sequence)

        return loads

    @rule(
        tokens=st.integers(1, 70),
        chat=st.booleans(),
        stream=st.booleans(),
        max_tokens=st.sampled_from([1, 2, 6, 20]),
        seconds=MOMENTS,
    )
    def ask(self, tokens: int, chat: bool, stream: bool, max_tokens: int, seconds: float) -> None:
        ids = [40 + (7 * tokens + place) % 400 for place in range(tokens)]
        body: dict[str, Any] = {"model": "sim", "max_tokens": max_tokens, "temperature": 0, "stream": stream}
        if chat:
            body["messages"] = [{"role": "user", "content": "word " * tokens}]
        else:
            body["prompt"] = ids
        endpoint = "chat" if chat else "completions"
        self.clients.append(self._runner.get_loop().create_task(self.bed.ask(endpoint, body)))
        self.time_passes(seconds)

    @rule(number=NUMBERS, size=SIZES)
    def an_engine_is_another_one(self, number: int, size: int) -> None:
        """Its process ends, and one that listens at the same port is there at once."""
        engine = self.bed.engines[number]
        engine.config = replace(engine.config, block_size=size)
        self._runner.run(engine.restart())

    @rule(tokens=st.integers(1, 70), number=NUMBERS, size=SIZES, before=MOMENTS, after=MOMENTS)
    def a_request_meets_another_engine(self, tokens: int, number: int, size: int, before: float, after: float) -> None:
        """It comes while the engine is being exchanged, or at once after."""
        self.ask(tokens, False, True, 20, before)
        self.an_engine_is_another_one(number, size)
        self.ask(tokens, False, True, 20, after)

    @rule(number=NUMBERS, size=SIZES, seconds=MOMENTS)
    def an_engine_is_away_for_a_while(self, number: int, size: int, seconds: float) -> None:
        engine = self.bed.engines[number]
        if engine.alive:
            self._runner.run(self._kill(number))
        self.time_passes(seconds)
        engine.config = replace(engine.config, block_size=size)
        self._runner.run(engine.restart())

    @rule(size=SIZES)
    def all_are_made_alike(self, size: int) -> None:
        for number in range(len(self.bed.engines)):
            self.an_engine_is_another_one(number, size)
        self._runner.run(self.bed.repair())

    @rule(number=NUMBERS)
    def an_engine_fails_a_leg(self, number: int) -> None:
        async def fail() -> None:
            self.bed.engines[number].faults.add("status", status=500, count=1)

        self._runner.run(fail())

    @rule(number=NUMBERS)
    def a_connection_is_idle_for_too_long(self, number: int) -> None:
        """The engine closes all that it does not need."""

        async def close() -> None:
            for connection in list(self.bed.engines[number].connections):
                if connection.exchange is None:
                    connection.kill()

        self._runner.run(close())

    @rule(seconds=MOMENTS)
    def time_passes(self, seconds: float) -> None:
        self._runner.run(asyncio.sleep(seconds))

    async def _kill(self, number: int) -> None:
        self.bed.engines[number].kill()

    @invariant()
    def no_hand_off_was_unsafe(self) -> None:
        assert not self.unsafe, self.unsafe

    def teardown(self) -> None:
        try:
            self._runner.run(self._end())
            assert not self.unsafe, self.unsafe
        finally:
            self._exit.close()

    async def _end(self) -> None:
        async with self._open:
            for engine in self.bed.engines:
                if not engine.alive:
                    await engine.restart()
            if self.clients:
                await asyncio.wait(self.clients)
            assert await self.bed.until(lambda: not self.bed.gateway_idle(), 10), self.bed.gateway_idle()
            TOTAL.append(self.ahead)


TOTAL: list[int] = []
FirstTokenMachine.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink),
)
TestFirstTokenMachine = pytest.mark.slow(FirstTokenMachine.TestCase)
