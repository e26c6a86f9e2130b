"""Settings of the C library's heap, which holds bodies, reads and answers of more than half a kilobyte.

By default glibc returns free memory at the end of the heap to the system as soon as that is some hundred kilobytes,
which is as much as one long prompt. The next long prompt then costs page faults: the kernel has to find, clear and map
each page again.
"""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD = -1  # malloc.h
_M_MMAP_THRESHOLD = -3
_KEPT = 64 << 20
_MAPPED = 16 << 20


def keep_free_memory() -> None:
    """Keep up to 64 MiB of free memory in the process. Blocks of more than 16 MiB are still returned to the system at
    once. Does nothing where the C library has no `mallopt`."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MAPPED)
        mallopt(_M_TRIM_THRESHOLD, _KEPT)
