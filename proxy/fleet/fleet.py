"""The pools: who is in them, who is up, and what real requests say about that."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from math import inf
from typing import Any

from proxy.errors import BackendError, BackendUnreachable
from proxy.fleet.backend import ROLES, Backend, Role
from proxy.settings import Settings

log = logging.getLogger("pd_proxy.fleet")


class Fleet:
    """All backends by role. Changes of membership are told to `on_join` and `on_leave`.

    Attributes:
        sizes: how many backends each pool has, up or not.
        bounded: whether backends have bounds.
    """

    def __init__(self, settings: Settings) -> None:
        self._failures = settings.health.failures
        bounds = settings.admission
        self._prefill_bounds = (bounds.prefill_requests or inf, bounds.prefill_tokens or inf)
        self._decode_bounds = (bounds.decode_requests or inf, bounds.decode_tokens or inf)
        self.bounded = (*self._prefill_bounds, *self._decode_bounds) != (inf,) * 4
        self._on_room: Callable[[], object] | None = None
        self._pools: dict[Role, list[Backend]] = {role: [] for role in ROLES}
        self.sizes: dict[str, int] = dict.fromkeys(ROLES, 0)
        self.handoffs_in_limbo = 0
        self.on_join: Callable[[Backend], object] | None = None
        self.on_leave: Callable[[Backend], object] | None = None
        for role in ROLES:
            for url in getattr(settings, role):
                self.add(url, role)

    def __iter__(self) -> Iterator[Backend]:
        for pool in self._pools.values():
            yield from pool

    def pool(self, role: Role) -> list[Backend]:
        """The members of a pool, up or not."""
        return self._pools[role]

    def candidates(self, role: Role, model: str | None, tokens: int | None = None) -> list[Backend]:
        """The members of a pool that may be given a request for `model` now.

        Arguments:
            tokens: of the leg; members that it would put above their bounds are left out, as long as others have room.
                Where none has, admission lets nobody new in; what is already in, and tries again, goes to a full one
                rather than nowhere.
        """
        found = [
            b
            for b in self._pools[role]
            if b.up and not b.removed and (model is None or b.models is None or model in b.models)
        ]
        if tokens is None or not self.bounded or len(found) < 2:
            return found
        return [b for b in found if b.has_room(tokens)] or found

    def has_room(self, role: Role, model: str | None, tokens: int) -> bool | None:
        """Whether a candidate for `model` has room for a leg of so many tokens; None when there is no candidate. As
        `candidates`, but ends with the first that has."""
        found = None
        for b in self._pools[role]:
            if b.up and not b.removed and (model is None or b.models is None or model in b.models):
                if b.has_room(tokens):
                    return True
                found = False
        return found

    def watch_room(self, on_room: Callable[[], object]) -> None:
        """Have `on_room` called whenever a request that found no room may find some: a lease was released, or a pool
        has changed."""
        self._on_room = on_room
        for backend in self:
            backend.on_freed = on_room

    def _room_changed(self) -> None:
        if self._on_room is not None:
            self._on_room()

    def knows(self, model: str) -> bool:
        """Whether any backend serves `model`, or may."""
        for pool in self._pools.values():
            for backend in pool:
                if backend.serves(model):
                    return True
        return False

    def names(self, model: str) -> bool:
        """Whether some backend has named `model`."""
        for pool in self._pools.values():
            for backend in pool:
                if backend.models is not None and model in backend.models:
                    return True
        return False

    def model_cards(self) -> list[dict[str, Any]]:
        """The models a client can ask for, as /v1/models shows them: those of the backends that answer clients. The
        context is as long as the shortest backend's, prefill's included."""
        cards: dict[str, dict[str, Any]] = {}
        for backend in (*self._pools["decode"], *self._pools["mixed"], *self._pools["prefill"]):
            for model, card in (backend.models or {}).items():
                if model in cards:
                    lengths = [c["max_model_len"] for c in (cards[model], card) if c.get("max_model_len")]
                    if lengths:
                        cards[model]["max_model_len"] = min(lengths)
                elif backend.role != "prefill":
                    cards[model] = dict(card)
        return list(cards.values())

    def not_ready(self) -> str:
        """Why the fleet cannot serve a request, or an empty string when it can."""
        up = {role: any(b.up and not b.removed for b in pool) for role, pool in self._pools.items()}
        if up["mixed"] or (up["prefill"] and up["decode"]):
            return ""
        if not any(self._pools.values()):
            return "no backend is configured"
        missing = [role for role in ("prefill", "decode") if not up[role]]
        return f"no {' and no '.join(missing)} backend is up"

    # Membership

    def find(self, url: str, role: Role) -> Backend | None:
        return next((b for b in self._pools[role] if b.url == url), None)

    def add(self, url: str, role: Role) -> Backend:
        """Add a backend, or take one back that was about to leave."""
        if backend := self.find(url, role):
            backend.removed = False
            self._room_changed()
            return backend
        backend = Backend(url, role)
        bounds = self._prefill_bounds if role == "prefill" else self._decode_bounds
        backend.most_requests, backend.most_tokens = bounds
        backend.on_freed = self._on_room
        self._pools[role].append(backend)
        self.sizes[role] += 1
        if self.on_join is not None:
            self.on_join(backend)
        return backend

    def remove(self, url: str, role: Role) -> bool:
        """Take a backend out: nothing new goes there, and it is forgotten when its last leg has ended.

        Returns whether it was there.
        """
        backend = self.find(url, role)
        if backend is None:
            return False
        backend.removed = True
        self._room_changed()
        self.forget_idle()
        return True

    def forget_idle(self) -> None:
        """Forget removed backends that have nothing in flight. Called after removals and by the prober."""
        for pool in self._pools.values():
            for backend in [b for b in pool if b.removed and not b.inflight_requests]:
                pool.remove(backend)
                self.sizes[backend.role] -= 1
                log.info("%s backend %s has left", backend.role, backend.url)
                if self.on_leave is not None:
                    self.on_leave(backend)

    # What real requests tell

    def succeeded(self, backend: Backend) -> None:
        """A leg ended well."""
        backend.failures = 0
        backend.ejections = 0

    def failed(self, backend: Backend, error: BackendError) -> None:
        """A leg failed. A backend that cannot be reached leaves at once; one that fails otherwise after
        `health.failures` in a row, unless it is the last of its pool, which is better than none."""
        if not error.blame or not backend.up:
            return
        backend.failures += 1
        unreachable = isinstance(error, BackendUnreachable)
        others = any(b.up and b is not backend and not b.removed for b in self._pools[backend.role])
        if unreachable or (backend.failures >= self._failures and others):
            if not unreachable:
                backend.ejections += 1
            self.take_out(backend, f"failed a request: {error}")
        backend.attention.set()

    def take_out(self, backend: Backend, reason: str) -> None:
        """Mark a backend down; its prober brings it back."""
        if backend.up:
            log.warning("%s backend %s is out: %s", backend.role, backend.url, reason)
        backend.mark_down(reason)
        backend.attention.set()
        self._room_changed()

    def bring_in(self, backend: Backend) -> None:
        """Mark a backend up."""
        if not backend.up:
            log.info("%s backend %s is up", backend.role, backend.url)
        backend.mark_up()
        self._room_changed()
