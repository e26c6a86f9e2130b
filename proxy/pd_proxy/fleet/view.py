"""The fleet as a scrape of metrics reads it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from pd_proxy.fleet.backend import LEGS, ROLES, Backend, Role
from pd_proxy.fleet.fleet import Fleet, State
from pd_proxy.fleet.readiness import not_ready, readiness


class FleetView:
    """The values of a fleet that metrics show. It has no state of its own."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def __iter__(self) -> Iterator[Backend]:
        return iter(self._fleet)

    @property
    def handoffs_pending(self) -> int:
        """Hand-offs that decode has not begun to use."""
        return self._fleet.handoffs_pending

    def states(self) -> list[tuple[Backend, State]]:
        """All backends with their states."""
        return [(backend, self._fleet.state(backend)) for backend in self._fleet]

    def panicking(self) -> list[tuple[Role, bool]]:
        """All pools, and for each whether so few of its backends are fit that ejections are ignored."""
        fleet = self._fleet
        return [
            (role, fleet.outlier_detector.panics(fleet.serving(role, None), LEGS[role][-1], fleet.members(role, None)))
            for role in ROLES
        ]

    @property
    def ejections(self) -> Counter[tuple[str, str, str, str]]:
        """How often backends were ejected, by pool, backend, leg and reason."""
        return self._fleet.outlier_detector.ejections

    @property
    def budget_refusals(self) -> Counter[str]:
        """How often a retry budget was used up, by pool."""
        return self._fleet.budgets.refusals

    @property
    def excused_checks(self) -> Counter[str]:
        """The number of failed health checks that did not count, by reason."""
        return self._fleet.excused_checks

    @property
    def messages(self) -> Mapping[str, Mapping[str, int]]:
        """Messages of engines over ZeroMQ, by kind and by what became of them."""
        return self._fleet.messages

    @property
    def warmups(self) -> Counter[str]:
        """Warm-ups by what was found."""
        return self._fleet.warmups

    def names(self, model: str) -> bool:
        """Whether a backend has listed a model."""
        return self._fleet.names(model)

    def not_ready(self) -> str:
        """Why the fleet cannot serve a request; empty where it can."""
        return not_ready(self._fleet)

    def readiness(self) -> dict[str, str]:
        """What each group lacks to serve requests; empty where it lacks nothing."""
        return readiness(self._fleet)
