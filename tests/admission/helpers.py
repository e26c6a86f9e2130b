"""Tickets, and a stand-in for the backends, for the parts of admission that have no clock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from pd_proxy.admission.clients import Client, Level
from pd_proxy.admission.schedule import Schedule
from pd_proxy.admission.ticket import Ticket
from pd_proxy.errors import GatewayError
from pd_proxy.settings.bounds import AdmissionSettings


def client(name: str = "a", level: Level | None = None, **more: Any) -> Client:
    return Client(name, level or Level(0), **more)


def ticket(of: Client, tokens: int = 10, *, now: float = 0.0, timeout: float = 30.0, **more: Any) -> Ticket:
    fields = {"model": "m", "split": True, "prefill_tokens": max(1, tokens // 2), "size": 100, **more}
    return Ticket(client=of, tokens=tokens, arrived=now, deadline=now + timeout, **fields)


def schedule(capacity: Any = None, **settings: Any) -> Schedule:
    return Schedule(AdmissionSettings(**settings), capacity)


class Decisions:
    """The decisions about waiting tickets, in order."""

    def __init__(self) -> None:
        self.all: list[tuple[Ticket, GatewayError | None]] = []

    def listen(self, waiting: Ticket) -> Ticket:
        waiting.on_decision = lambda error: self.all.append((waiting, error))
        return waiting

    @property
    def let_in(self) -> list[Ticket]:
        return [t for t, error in self.all if error is None]

    @property
    def refused(self) -> list[tuple[Ticket, str]]:
        return [(t, error.code) for t, error in self.all if error is not None]


class Slots:
    """A `Capacity` with a number of places for each model in `places`, and unlimited places for others."""

    def __init__(self, places: Mapping[str, int]) -> None:
        self.places = dict(places)
        self.taken: Counter[str] = Counter()

    def has(self, asking: Ticket) -> bool:
        model = asking.model or ""
        return self.taken[model] < self.places.get(model, 10**9)

    def reserve(self, asking: Ticket) -> Place:
        return Place(self, asking.model or "")


class Place:
    """One place; it can be released once."""

    def __init__(self, slots: Slots, model: str) -> None:
        self._slots: Slots | None = slots
        self._model = model
        slots.taken[model] += 1

    def release(self) -> None:
        if self._slots is not None:
            self._slots.taken[self._model] -= 1
            self._slots = None
