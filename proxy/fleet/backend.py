"""One backend as the gateway knows it, and the leases on it.

Invariant: `inflight_requests` and `inflight_tokens` change only in `Lease.__init__` and `Lease.release`, and a lease is
released once whatever happens, so both are zero when nothing is in flight.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from math import inf
from types import TracebackType
from typing import Any, Literal

from proxy.errors import BackendError, BackendLost

Role = Literal["prefill", "decode", "mixed"]
ROLES: tuple[Role, ...] = ("prefill", "decode", "mixed")


class Backend:
    """State of one engine endpoint.

    Attributes:
        up: in the rotation.
        reason: why not, for people; empty when up.
        models: its cards of /v1/models by id, or None while that is not known.
        version: as /version says, or empty.
        removed: taken out by an operator; it finishes what it has and gets nothing new.
        failures: failed requests since the last good one.
        attention: set when something happened that its prober should look at now.
        most_requests, most_tokens: what may be in flight here before new requests should go elsewhere.
        on_freed: called when a lease is released, where somebody waits for room.
    """

    __slots__ = (
        "_leases",
        "attention",
        "ejections",
        "failures",
        "inflight_requests",
        "inflight_tokens",
        "models",
        "most_requests",
        "most_tokens",
        "on_freed",
        "reason",
        "removed",
        "role",
        "up",
        "url",
        "version",
    )

    def __init__(self, url: str, role: Role) -> None:
        self.url = url
        self.role = role
        self.up = False
        self.reason = "not probed yet"
        self.models: dict[str, dict[str, Any]] | None = None
        self.version = ""
        self.removed = False
        self.failures = 0
        self.ejections = 0
        self.inflight_requests = 0
        self.inflight_tokens = 0
        self.most_requests: float = inf
        self.most_tokens: float = inf
        self.on_freed: Callable[[], object] | None = None
        self.attention = asyncio.Event()
        self._leases: set[Lease] = set()

    def serves(self, model: str | None) -> bool:
        """Whether a request for `model` may go here; what is not known is not held against it."""
        return model is None or self.models is None or model in self.models

    def has_room(self, tokens: int) -> bool:
        """Whether a leg of so many tokens stays within the bounds. An idle backend has room for any leg: a bound on
        tokens is none on the length of one prompt."""
        return not self.inflight_requests or (
            self.inflight_requests < self.most_requests and self.inflight_tokens + tokens <= self.most_tokens
        )

    def mark_up(self) -> None:
        self.up = True
        self.reason = ""
        self.failures = 0

    def mark_down(self, reason: str) -> None:
        """Leave the rotation. Legs that wait for a first byte from here are given up, so they can go elsewhere."""
        self.up = False
        self.reason = reason
        for lease in tuple(self._leases):
            lease.lose(BackendLost(f"{self.url} {reason}"))


class Lease:
    """The gateway's claim on a backend's capacity for one leg. A context manager; leaving it releases.

    Arguments:
        tokens: what the leg will put on the backend: prompt tokens for prefill; prompt and expected output for decode.
    Attributes:
        on_lost: called when the backend is given up while the leg waits for its first byte; None when the leg does
            not wish to know.
    """

    __slots__ = ("_released", "backend", "on_lost", "tokens")

    def __init__(self, backend: Backend, tokens: int) -> None:
        self.backend = backend
        self.tokens = tokens
        self.on_lost: Callable[[BackendError], None] | None = None
        self._released = False
        backend.inflight_requests += 1
        backend.inflight_tokens += tokens
        backend._leases.add(self)

    def release(self) -> None:
        if self._released:
            return
        self._released = True
        self.on_lost = None
        self.backend.inflight_requests -= 1
        self.backend.inflight_tokens -= self.tokens
        self.backend._leases.discard(self)
        if self.backend.on_freed is not None:
            self.backend.on_freed()

    def lose(self, error: BackendError) -> None:
        if self.on_lost is not None:
            self.on_lost(error)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
