"""When a request that failed is tried again, on every kind of route."""

from __future__ import annotations

_FIRST_BACKOFF = 0.05  # seconds before a backend that has just failed is tried again
LONGEST_BACKOFF = 1.0


def backoff(tries: int) -> float:
    """Seconds before try number `tries`."""
    return min(_FIRST_BACKOFF * 2.0 ** (tries - 2), LONGEST_BACKOFF)
