"""The C library's heap, from which bodies, reads and answers of more than half a kilobyte come.

By itself glibc gives the system back what is free at the heap's end as soon as that is some hundred kilobytes, and each
long prompt is. The next one is paid for page by page then: the kernel has to find, clear and map them.
"""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD = -1  # malloc.h
_M_MMAP_THRESHOLD = -3
_KEPT = 64 << 20
_MAPPED = 16 << 20


def keep() -> None:
    """Keep up to 64 MiB that are free. Blocks of more than 16 MiB are not part of it: the system has each back at once.
    Where there is another C library than glibc, nothing happens."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MAPPED)
        mallopt(_M_TRIM_THRESHOLD, _KEPT)
