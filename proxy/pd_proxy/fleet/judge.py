"""What legs tell the fleet, as a seam: `Fleet` thinks its part of it, and a warm-up's legs are heard by nobody."""

from __future__ import annotations

from typing import Protocol

from pd_proxy.errors import BackendError
from pd_proxy.fleet.backend import Backend
from pd_proxy.fleet.outlier.statistics import LegName


class Judge(Protocol):
    """Is told how legs went."""

    def succeeded(self, backend: Backend, leg: LegName) -> None: ...

    def failed(
        self, backend: Backend, error: BackendError, leg: LegName, handoff_from: Backend | None = None
    ) -> None: ...

    def timed(self, backend: Backend, leg: LegName, seconds: float, tokens: int) -> None: ...

    def paced(self, backend: Backend, seconds: float) -> None: ...
