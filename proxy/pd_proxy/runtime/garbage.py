"""When Python looks for garbage in cycles. While it looks nothing else happens, and every stream waits.

A running stream is some hundred objects: among ten thousand streams a full collection takes 200 ms. Requests leave next
to no cycles behind, so only the young are looked through while many run, once and some ms at a time, and all there is
when few would notice.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from time import monotonic

_YOUNG = 10_000  # objects that are there more than at the last look, until the next
_OLD = 4  # looks at the young since a full collection that make the next one worth its while
_NEVER = 1_000_000_000

_FEW = 100  # requests
_LOOK = 10.0  # seconds
_LONGEST = 900.0  # seconds between full collections, however many streams run


def settle() -> None:
    """Everything is loaded that stays for good: no collection walks it again. From now on full collections are left to
    `collect_when_quiet`."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG, _NEVER, _NEVER)


async def collect_when_quiet(
    inside: Callable[[], int], clock: Callable[[], float] = monotonic, look: float = _LOOK
) -> None:
    """Collect all garbage now and then, for ever.

    Arguments:
        inside: how many requests are running.
        look: seconds between looks at that.
    """
    last = clock()
    while True:
        await asyncio.sleep(look)
        due = gc.get_count()[1] >= _OLD
        if due and (inside() < _FEW or clock() - last > _LONGEST):
            gc.collect()
            last = clock()
