"""Whether requests can be served as they are meant to be, as the log tells it: a line for each change."""

from __future__ import annotations

import asyncio
import logging
from time import monotonic

from pd_proxy.fleet.fleet import Fleet

log = logging.getLogger("pd_proxy.fleet")

_TICK = 0.2  # seconds between looks
_SHARE = 0.01  # of the event loop's time, at most: of hundreds of engines that do not match every pair is looked at
_START = 1.0  # seconds in which a fleet that is not ready yet is not worth a line


async def tell_readiness(fleet: Fleet) -> None:
    """Log what /ready says whenever that changes, until cancelled."""
    told: str | None = None
    started = monotonic()
    while True:
        before = monotonic()
        reason = fleet.not_ready()
        now = monotonic()
        if reason != told and (told is not None or not reason or now - started > _START):
            if reason:
                log.warning("not ready: %s", reason)
            else:
                log.info("ready: requests can be served")
            told = reason
        await asyncio.sleep(max(_TICK, (now - before) / _SHARE))
