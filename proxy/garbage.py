"""When Python looks for garbage in cycles. While it looks nothing else happens, and every stream waits.

A running stream is some hundred objects: among ten thousand streams a full collection takes 200 ms. Requests leave next
to no cycles behind, so the young are looked through often, which takes 10 to 20 ms at most, and all there is only when
few would notice.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from time import monotonic

_YOUNG = 10_000  # objects that are there more than at the last look, until the next
_TIMES = 4  # looks at the young until those that survived are looked at again
_NEVER = 1_000_000_000

_FEW = 100  # requests
_LOOK = 10.0  # seconds
_LONGEST = 900.0  # seconds between full collections, however many streams run


def settle() -> None:
    """Everything is loaded that stays for good: no collection walks it again. From now on full collections are left to
    `collect_when_quiet`."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG, _TIMES, _NEVER)


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
        due = gc.get_count()[2] > 0  # something has survived two looks since the last time
        if due and (inside() < _FEW or clock() - last > _LONGEST):
            gc.collect()
            last = clock()
