"""The order in which the parts of a gateway start and stop."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import FastAPI
from pd_proxy.assembly.lifespan import lifespan_of
from pd_proxy.assembly.parts import Parts, make_parts
from pd_proxy.http.client_connections import Connections
from pd_proxy.settings.tree import build_settings

STARTS = ["notices.start", "warmup.start", "prober.start"]
STOPS = ["flow.close", "suspicion.close", "prober.stop", "warmup.stop", "legs.close", "notices.close"]


class PartFailed(Exception):
    """A part could not start or stop."""


class Scene:
    """The parts of a gateway.

    Attributes:
        calls: the starts and stops of parts, in the order in which they were called.
        failing: the start or stop that fails.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.failing = ""
        self._parts: Parts = make_parts(build_settings({"mixed": ["http://127.0.0.1:9"]}, {}), Connections(), None)
        service, engines = self._parts.service, self._parts.engines
        parts = {
            "flow": service.flow,
            "suspicion": service.suspicion,
            "prober": engines.prober,
            "warmup": engines.warmup,
            "legs": engines.legs,
            "notices": self._parts.messages.notices,
        }
        for name in STARTS + STOPS:
            part, _, method = name.partition(".")
            monkeypatch.setattr(parts[part], method, self._noted(name, getattr(parts[part], method)))

    def _noted(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """A method that notes its call, and then fails where it is to fail."""

        async def called_async(*arguments: Any) -> None:
            self.calls.append(name)
            await method(*arguments)
            if name == self.failing:
                raise PartFailed

        def called(*arguments: Any) -> None:
            self.calls.append(name)
            if name == self.failing and name in STARTS:
                raise PartFailed
            method(*arguments)
            if name == self.failing:
                raise PartFailed

        return called_async if inspect.iscoroutinefunction(method) else called

    async def run(self) -> None:
        """Start the gateway, and stop it at once."""
        async with lifespan_of(self._parts)(FastAPI()):
            pass


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(monkeypatch)


async def test_each_part_stops_before_the_parts_that_it_uses(scene: Scene) -> None:
    await scene.run()
    assert scene.calls == STARTS + STOPS


@pytest.mark.parametrize("failing", STOPS)
async def test_a_part_that_fails_to_stop_does_not_keep_others_from_stopping(scene: Scene, failing: str) -> None:
    scene.failing = failing
    with pytest.raises(PartFailed):
        await scene.run()
    assert scene.calls == STARTS + STOPS


async def test_where_a_part_fails_to_start_the_parts_before_it_are_stopped(scene: Scene) -> None:
    scene.failing = "prober.start"
    with pytest.raises(PartFailed):
        await scene.run()
    assert scene.calls == [*STARTS, "warmup.stop", "legs.close", "notices.close"]
