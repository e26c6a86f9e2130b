"""Where legs report how they ended: `Fleet` acts on the reports of requests; the reports of trials are dropped."""

from __future__ import annotations

from typing import Protocol

from pd_proxy.errors import BackendError
from pd_proxy.fleet.backend import Backend
from pd_proxy.fleet.outlier.statistics import LegName


class OutcomeSink(Protocol):
    """Takes the outcomes of legs."""

    def succeeded(self, backend: Backend, leg: LegName) -> None:
        """A leg has ended well."""

    def failed(self, backend: Backend, error: BackendError, leg: LegName, handoff_from: Backend | None = None) -> None:
        """A leg has failed.

        Arguments:
            handoff_from: the prefill backend of the hand-off that the leg referred to.
        """

    def timed(self, backend: Backend, leg: LegName, seconds: float, tokens: int) -> None:
        """A leg took so many seconds for so many tokens."""

    def paced(self, backend: Backend, seconds: float) -> None:
        """A token of a stream takes so many seconds."""
