"""A bounded number of log lines about backends that are down: hundreds may go down at once."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter

from pd_proxy.fleet.backend import Backend

log = logging.getLogger("pd_proxy.fleet")

_LINES = 10  # log lines about single backends in `LINES_FOR` seconds; one more line counts the others
LINES_FOR = 5.0


class DownLog:
    """Logs which backends are not up: the first ones by name, of the others only the number."""

    def __init__(self) -> None:
        self._since = float("-inf")
        self._logged = 0
        self._left_out: Counter[str] = Counter()

    def report(self, backend: Backend, reason: str) -> None:
        """Log that a backend is not up, for another reason than before."""
        loop = asyncio.get_running_loop()
        if loop.time() - self._since > LINES_FOR and not self._left_out:
            self._since, self._logged = loop.time(), 0
        if self._logged < _LINES:
            self._logged += 1
            log.warning("%s backend %s is not up: %s", backend.role, backend.url, reason)
            return
        if not self._left_out:
            loop.call_at(self._since + LINES_FOR, self._sum_up)
        self._left_out[reason] += 1

    def _sum_up(self) -> None:
        (reason, _), number = self._left_out.most_common(1)[0], self._left_out.total()
        self._left_out.clear()
        log.warning("%d more backends are not up (GET /admin/backends), most of them: %s", number, reason)
