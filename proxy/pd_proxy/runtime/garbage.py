"""Schedules Python's collections of cyclic garbage. During a collection every stream stands still.

A running stream holds about a hundred objects, so with ten thousand streams a full collection takes 200 ms. Requests
leave hardly any cycles behind. So while many requests run only the youngest generation is collected, which takes some
ms. Full collections are made while few requests run.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from time import monotonic

_YOUNG = 10_000  # new objects that lead to a collection of the youngest generation
_OLD = 4  # collections of the youngest generation after which a full one is due
_NEVER = 1_000_000_000

_FEW = 100  # requests; with fewer a full collection is made
_INTERVAL = 10.0  # seconds
_LONGEST = 900.0  # seconds after the last full collection from which one is made however many requests run


def freeze() -> None:
    """Exclude all present objects from collections, and leave full collections to `collect_when_quiet`.

    Called once everything is loaded that lives as long as the process.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG, _NEVER, _NEVER)


async def collect_when_quiet(
    running: Callable[[], int], clock: Callable[[], float] = monotonic, interval: float = _INTERVAL
) -> None:
    """Make full collections while few requests run, for ever.

    Arguments:
        running: returns how many requests run.
        clock: a monotonic clock, in seconds.
        interval: the seconds between checks.
    """
    last = clock()
    while True:
        await asyncio.sleep(interval)
        due = gc.get_count()[1] >= _OLD
        if due and (running() < _FEW or clock() - last > _LONGEST):
            gc.collect()
            last = clock()
